"""Products of many rows with matrices of 8 bit floats, on Hopper: rows become them too, and cuBLAS multiplies.

In rank processes. Each 128 numbers of a row share a scale, each 128 x 128 of a matrix do. Nothing waits for the device.
The reference of what rows become is `parallel/float8.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from parallel.float8 import LEAST_SCALE, ROW_BLOCK, Float8

_ALIGNED_ROWS, _ALIGNED_BLOCKS = 4, 4  # which cuBLAS wants scales of: whole groups of so many rows, and of columns
_BLOCK = (128, 128)  # of the matrices that it multiplies
_TILE_ROWS = 8


def linear_of_quantised(rows: Tensor, weight: Float8) -> Tensor:
    """rows [r, inputs], weight [neurons, inputs] -> both as 8 bit floats, multiplied, [r, neurons]."""
    if not len(rows):
        return rows.new_empty(0, weight.shape[0])
    quantised = quantised_rows(rows, _ALIGNED_ROWS)
    missing = -weight.scales.shape[1] % _ALIGNED_BLOCKS  # they are read as part of a tile, and multiply nothing
    scales = F.pad(weight.scales, (0, missing)) if missing else weight.scales
    made = F.scaled_mm(
        *(quantised.values, weight.values.t(), quantised.scales, F.ScalingType.BlockWise1x128),
        *(scales.t(), F.ScalingType.BlockWise128x128),
        output_dtype=rows.dtype,
    )
    return made[: len(rows)]


def attempt(device: torch.device) -> None:
    """A product of nothing but zeros. Raises what torch does where it has none: cuBLAS before 12.9, or torch before it
    had a name for these."""
    zeros = torch.zeros(*_BLOCK, dtype=torch.bfloat16, device=device)
    weight = Float8(zeros.to(torch.float8_e4m3fn), zeros.new_zeros(1, 1, dtype=torch.float32), _BLOCK)
    linear_of_quantised(zeros, weight)


def quantised_rows(rows: Tensor, multiple: int = 1) -> Float8:
    """rows [r, n], n a multiple of 128 -> 8 bit floats with scales, which lie columns first; with rows of zeros behind
    them up to a multiple of so many rows."""
    (count, inputs), group = rows.shape, ROW_BLOCK[1]
    filled = triton.cdiv(count, multiple) * multiple
    values = torch.empty(filled, inputs, dtype=torch.float8_e4m3fn, device=rows.device)
    scales = torch.empty(inputs // group, filled, dtype=torch.float32, device=rows.device)
    _quantise[triton.cdiv(filled, _TILE_ROWS), inputs // group](
        *(rows.contiguous(), values, scales, count, filled, inputs, LEAST_SCALE, _TILE_ROWS, group), num_warps=4
    )
    return Float8(values, scales.t(), ROW_BLOCK)


@triton.jit(do_not_specialize=["count", "filled"])
def _quantise(
    rows, values, scales, count, filled, inputs,
    LEAST: tl.constexpr, ROW_TILE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROW_TILE + tl.arange(0, ROW_TILE)
    where = row.to(tl.int64)[:, None] * inputs + tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    numbers = tl.load(rows + where, mask=(row < count)[:, None], other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(numbers), 1), LEAST) / 448.0
    made = (numbers / scale[:, None]).to(values.dtype.element_ty)
    tl.store(values + where, made, mask=(row < filled)[:, None])
    tl.store(scales + tl.program_id(1).to(tl.int64) * filled + row, scale, mask=row < filled)
