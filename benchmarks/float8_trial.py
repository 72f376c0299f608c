"""Products of 8 bit floats by 8 bit floats, in Triton, to be measured beside torch's: rows are quantised on the way.

For benchmarks/float8.py alone; what is served multiplies rows as they are.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from parallel.kernels.float8 import Tiling
from parallel.kernels.float8_rows import quantised_rows

GROUP = 128


def linear_of_quantised(rows: Tensor, weight: Tensor, scales: Tensor, tiling: Tiling) -> Tensor:
    """rows [r, inputs] times the transpose of weight [neurons, inputs] with scales [neurons / 128, inputs / 128]."""
    found = quantised_rows(rows)
    made = rows.new_empty(len(rows), len(weight))
    _linear_of_quantised[triton.cdiv(len(weight), tiling.neurons), triton.cdiv(len(rows), tiling.rows)](
        *(found.values, found.scales, weight, scales, made),
        *(len(rows), *weight.shape, tiling.neurons, tiling.rows, GROUP),
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    return made


@triton.jit(do_not_specialize=["count"])
def _linear_of_quantised(
    rows, row_scales, weights, scales, made, count, neurons, inputs,
    NEURON_TILE: tl.constexpr, ROW_TILE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    neuron = tl.program_id(0) * NEURON_TILE + tl.arange(0, NEURON_TILE)
    row = tl.program_id(1) * ROW_TILE + tl.arange(0, ROW_TILE)
    number = tl.arange(0, GROUP)
    held, is_row = neuron < neurons, row < count
    weight = weights + neuron.to(tl.int64)[:, None] * inputs + number
    read = rows + row.to(tl.int64)[:, None] * inputs + number
    scale = scales + neuron // GROUP * (inputs // GROUP)
    total = tl.zeros([NEURON_TILE, ROW_TILE], tl.float32)
    for group in range(inputs // GROUP):
        by_neuron = tl.load(scale + group, mask=held, other=0.0)
        by_row = tl.load(row_scales + group * count + row, mask=is_row, other=0.0)
        w = tl.load(weight + group * GROUP, mask=held[:, None], other=0.0)
        x = tl.load(read + group * GROUP, mask=is_row[:, None], other=0.0)
        total += tl.dot(w, tl.trans(x)) * by_neuron[:, None] * by_row[None, :]
    where = row.to(tl.int64)[:, None] * neurons + neuron
    tl.store(made + where, tl.trans(total).to(made.dtype.element_ty), mask=is_row[:, None] & held)
