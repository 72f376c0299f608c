"""Experts of 8 bit floats for the few rows of a decode step, on CUDA: what few_rows.py makes, of half the bytes.

In rank processes. Weights become the dtype of the rows in registers, and a block's scale multiplies its sums in
float32, as in parallel/kernels/float8.py. The reference is models/moe.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from models.kernels.few_rows import ROW_TILES, _bounds
from parallel.expert import Copies
from parallel.float8 import Float8
from parallel.kernels.float8 import Tiling, dequantised


def experts_of_few_rows(
    rows: Tensor,
    gate_up: Float8,
    down: Float8,
    copies: Copies,
    first: Tiling | None = None,
    second: Tiling | None = None,
) -> Tensor:
    """rows [r, h], gate_up [slots, 2 * neurons, h], down [slots, h, neurons] -> the weighted sum of each row's outputs
    down(silu(gate(x)) * up(x)), [r, h]; each product with a weight is rounded to the dtype, and the sum once."""
    slots, hidden, neurons = down.shape
    chosen, taken = copies.weights.shape[1], len(copies.order)
    inner = rows.new_empty(taken, neurons)
    spread = copies.spread(rows.dtype, hidden)
    if taken:
        fitting = next((tile for tile in ROW_TILES if 2 * slots * tile >= 3 * taken), ROW_TILES[-1])
        one, two = first or Tiling(64, fitting, 128, 4, 4), second or Tiling(64, fitting, 128, 4, 4)
        places = (copies.order, copies.ends)
        _gate_up[triton.cdiv(neurons, one.neurons), slots](
            *(rows.contiguous(), gate_up.values, gate_up.scales, inner, *places, hidden, neurons, chosen),
            *(*gate_up.scales.shape[1:], *gate_up.block, one.neurons, one.rows, one.inputs),
            num_warps=one.warps,
            num_stages=one.stages,
        )
        _down[triton.cdiv(hidden, two.neurons), slots](
            *(inner, down.values, down.scales, spread, copies.weights.contiguous(), *places, neurons, hidden),
            *(*down.scales.shape[1:], *down.block, two.neurons, two.rows, two.inputs),
            num_warps=two.warps,
            num_stages=two.stages,
        )
    return spread.sum(1)


def try_row_tiles(rows: Tensor, gate_up: Float8, down: Float8, copies: Copies) -> None:
    """Launches all that any number of rows may ask for: where other ranks send them, no plan says how many come."""
    for matrix in (gate_up, down):
        dequantised(Float8(matrix.values[:1], matrix.scales[:1], matrix.block), rows.dtype)
    for tile in ROW_TILES:
        experts_of_few_rows(rows, gate_up, down, copies, *[Tiling(64, tile, 128, 4, 4)] * 2)


@triton.jit(do_not_specialize=["chosen", "scale_rows", "scale_columns"])
def _gate_up(
    rows, weights, scales, inner, order, ends, inputs, neurons, chosen, scale_rows, scale_columns,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    NEURON_TILE: tl.constexpr, ROW_TILE: tl.constexpr, INPUT_TILE: tl.constexpr,
):  # fmt: skip
    """rows [r, inputs], weights [slots, 2 * neurons, inputs], gate first -> silu(gate) * up, [copies, neurons]."""
    slot = tl.program_id(1).to(tl.int64)
    begin, end = _bounds(ends, slot)
    neuron = tl.program_id(0) * NEURON_TILE + tl.arange(0, NEURON_TILE)
    held = neuron < neurons
    gate = weights + (slot * 2 * neurons + neuron)[:, None] * inputs
    up = gate + neurons.to(tl.int64) * inputs
    gate_scale = scales + (slot * scale_rows + neuron // BLOCK_ROWS) * scale_columns
    up_scale = gate_scale + scale_rows // 2 * scale_columns
    number = tl.arange(0, INPUT_TILE)
    for first in range(begin, end, ROW_TILE):
        copy = first + tl.arange(0, ROW_TILE)
        choice = tl.load(order + copy, mask=copy < end, other=0)
        read = rows + (choice // chosen)[:, None] * inputs
        gates = tl.zeros([NEURON_TILE, ROW_TILE], tl.float32)
        ups = tl.zeros([NEURON_TILE, ROW_TILE], tl.float32)
        of_gate = tl.load(gate_scale, mask=held, other=0.0)
        of_up = tl.load(up_scale, mask=held, other=0.0)
        for start in range(0, inputs, INPUT_TILE):
            behind = tl.minimum(start + INPUT_TILE, inputs - 1) // BLOCK_COLUMNS
            next_of_gate = tl.load(gate_scale + behind, mask=held, other=0.0)
            next_of_up = tl.load(up_scale + behind, mask=held, other=0.0)
            inside = start + number < inputs
            x = tl.load(read + start + number, mask=(copy < end)[:, None] & inside, other=0.0)
            to_gate = tl.load(gate + start + number, mask=held[:, None] & inside, other=0.0)
            to_up = tl.load(up + start + number, mask=held[:, None] & inside, other=0.0)
            gates += tl.dot(to_gate.to(tl.float32).to(x.dtype), tl.trans(x)) * of_gate[:, None]
            ups += tl.dot(to_up.to(tl.float32).to(x.dtype), tl.trans(x)) * of_up[:, None]
            of_gate, of_up = next_of_gate, next_of_up
        made = tl.trans(gates / (1 + tl.exp(-gates)) * ups).to(inner.dtype.element_ty)
        where = copy.to(tl.int64)[:, None] * neurons + neuron
        tl.store(inner + where, made, mask=(copy < end)[:, None] & held)


@triton.jit(do_not_specialize=["scale_rows", "scale_columns"])
def _down(
    inner, weights, scales, spread, shares, order, ends, inputs, neurons, scale_rows, scale_columns,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    NEURON_TILE: tl.constexpr, ROW_TILE: tl.constexpr, INPUT_TILE: tl.constexpr,
):  # fmt: skip
    """inner [copies, inputs], weights [slots, neurons, inputs], shares [r, k] -> spread [r, k, neurons]: of choices."""
    slot = tl.program_id(1).to(tl.int64)
    begin, end = _bounds(ends, slot)
    neuron = tl.program_id(0) * NEURON_TILE + tl.arange(0, NEURON_TILE)
    held = neuron < neurons
    weight = weights + (slot * neurons + neuron)[:, None] * inputs
    scale = scales + (slot * scale_rows + neuron // BLOCK_ROWS) * scale_columns
    number = tl.arange(0, INPUT_TILE)
    for first in range(begin, end, ROW_TILE):
        copy = first + tl.arange(0, ROW_TILE)
        read = inner + copy.to(tl.int64)[:, None] * inputs
        sums = tl.zeros([NEURON_TILE, ROW_TILE], tl.float32)
        by_neuron = tl.load(scale, mask=held, other=0.0)
        for start in range(0, inputs, INPUT_TILE):
            behind = tl.minimum(start + INPUT_TILE, inputs - 1) // BLOCK_COLUMNS
            following = tl.load(scale + behind, mask=held, other=0.0)
            inside = start + number < inputs
            x = tl.load(read + start + number, mask=(copy < end)[:, None] & inside, other=0.0)
            w = tl.load(weight + start + number, mask=held[:, None] & inside, other=0.0)
            sums += tl.dot(w.to(tl.float32).to(x.dtype), tl.trans(x)) * by_neuron[:, None]
            by_neuron = following
        choice = tl.load(order + copy, mask=copy < end, other=0)
        share = tl.load(shares + choice, mask=copy < end, other=0.0)[:, None]
        made = (tl.trans(sums).to(spread.dtype.element_ty).to(tl.float32) * share).to(spread.dtype.element_ty)
        tl.store(spread + choice[:, None] * neurons + neuron, made, mask=(copy < end)[:, None] & held)
