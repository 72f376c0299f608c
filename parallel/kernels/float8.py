"""Products of few rows with matrices of 8 bit floats, on CUDA: what is read is a byte a number, and scales of blocks.

In rank processes. Weights become the dtype of the rows in registers, which holds every 8 bit float exactly; a block's
scale multiplies its sums in float32, so that nothing is rounded that a dequantised weight would not be. A program has a
tile of neurons, of rows, and a piece of the inputs, as otherwise few would be busy; a second launch adds the pieces.
The reference is a product with what the floats stand for.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.float8 import Float8

LEAST_STEPS = 4  # of a piece: less would not hide how long memory takes
ADDED = 1024  # numbers that a program adds the pieces of


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a product is cut: neurons, rows and inputs of a tile, Triton's warps and stages, and the programs wanted for
    each processor, by which inputs are cut. inputs: must divide the columns of a block."""

    neurons: int
    rows: int
    inputs: int
    warps: int
    stages: int
    programs: int = 2


FEW, MORE = Tiling(64, 16, 128, 4, 4), Tiling(64, 64, 128, 4, 4)


def linear_of_few_rows(
    rows: Tensor, weight: Float8, tiling: Tiling | None = None, processors: int | None = None
) -> Tensor:
    """rows [r, inputs], weight [neurons, inputs] -> rows times the transpose of what it stands for, [r, neurons].

    processors: of the device, if it is not to be asked.
    """
    count, inputs = rows.shape
    neurons, cut = len(weight.values), tiling or (FEW if count <= FEW.rows else MORE)
    tiles = triton.cdiv(neurons, cut.neurons), triton.cdiv(count, cut.rows)
    steps = triton.cdiv(inputs, cut.inputs)
    wanted = cut.programs * (processors or _processors(rows.device)) // max(1, tiles[0] * tiles[1])
    steps_of_piece = triton.cdiv(steps, max(1, min(steps // LEAST_STEPS, wanted)))
    pieces = triton.cdiv(steps, steps_of_piece)
    made = rows.new_empty(count, neurons)
    if not count:
        return made
    sums = made if pieces == 1 else weight.scales.new_empty(pieces, count, neurons)
    _linear[(*tiles, pieces)](
        *(rows.contiguous(), weight.values, weight.scales, sums, count, neurons, inputs, weight.scales.shape[1]),
        *(steps_of_piece * cut.inputs, *weight.block, cut.neurons, cut.rows, cut.inputs),
        num_warps=cut.warps,
        num_stages=cut.stages,
    )
    if pieces > 1:
        _add_pieces[(triton.cdiv(count * neurons, ADDED),)](sums, made, count, neurons, pieces, ADDED)
    return made


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit(do_not_specialize=["count", "scale_columns"])
def _linear(
    rows, weights, scales, sums, count, neurons, inputs, scale_columns, piece_inputs,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    NEURON_TILE: tl.constexpr, ROW_TILE: tl.constexpr, INPUT_TILE: tl.constexpr,
):  # fmt: skip
    """rows [count, inputs], weights [neurons, inputs] -> sums [pieces, count, neurons]."""
    neuron = tl.program_id(0) * NEURON_TILE + tl.arange(0, NEURON_TILE)
    row = tl.program_id(1) * ROW_TILE + tl.arange(0, ROW_TILE)
    begin = tl.program_id(2) * piece_inputs
    end = tl.minimum(begin + piece_inputs, inputs)
    number = tl.arange(0, INPUT_TILE)
    held, is_row = neuron < neurons, row < count
    weight = weights + neuron.to(tl.int64)[:, None] * inputs
    read = rows + row.to(tl.int64)[:, None] * inputs
    scale = scales + neuron // BLOCK_ROWS * scale_columns
    total = tl.zeros([NEURON_TILE, ROW_TILE], tl.float32)
    by_neuron = tl.load(scale + begin // BLOCK_COLUMNS, mask=held, other=0.0)
    for start in range(begin, end, INPUT_TILE):
        # One step ahead, as a load that is no copy of a tile would be waited for.
        behind = tl.minimum(start + INPUT_TILE, inputs - 1) // BLOCK_COLUMNS
        following = tl.load(scale + behind, mask=held, other=0.0)
        inside = start + number < end
        w = tl.load(weight + start + number, mask=held[:, None] & inside, other=0.0)
        x = tl.load(read + start + number, mask=is_row[:, None] & inside, other=0.0)
        total += tl.dot(w.to(tl.float32).to(x.dtype), tl.trans(x)) * by_neuron[:, None]
        by_neuron = following
    where = (tl.program_id(2).to(tl.int64) * count + row)[:, None] * neurons + neuron
    tl.store(sums + where, tl.trans(total).to(sums.dtype.element_ty), mask=is_row[:, None] & held)


@triton.jit(do_not_specialize=["count", "pieces"])
def _add_pieces(sums, made, count, neurons, pieces, TILE: tl.constexpr):
    """sums [pieces, count, neurons] -> made [count, neurons]."""
    number, numbers = tl.program_id(0) * TILE + tl.arange(0, TILE), count * neurons
    inside = number < numbers
    total = tl.zeros([TILE], tl.float32)
    for piece in range(pieces):
        total += tl.load(sums + piece * numbers + number, mask=inside, other=0.0)
    tl.store(made + number, total.to(made.dtype.element_ty), mask=inside)


def dequantised(matrix: Float8, dtype: torch.dtype) -> Tensor:
    """[.., rows, columns]: each number times its block's scale, rounded once."""
    *stacked, rows, columns = matrix.shape
    made = torch.empty(matrix.shape, dtype=dtype, device=matrix.values.device)
    _dequantise[triton.cdiv(rows, 32), triton.cdiv(columns, 128), math.prod(stacked)](
        *(matrix.values, matrix.scales, made, rows, columns, *matrix.scales.shape[-2:], *matrix.block, 32, 128)
    )
    return made


@triton.jit(do_not_specialize=["scale_rows", "scale_columns"])
def _dequantise(
    weights, scales, made, rows, columns, scale_rows, scale_columns,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, ROW_TILE: tl.constexpr, COLUMN_TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROW_TILE + tl.arange(0, ROW_TILE)[:, None]
    column = tl.program_id(1) * COLUMN_TILE + tl.arange(0, COLUMN_TILE)[None, :]
    matrix = tl.program_id(2).to(tl.int64)
    inside = (row < rows) & (column < columns)
    where = (matrix * rows + row) * columns + column
    of = (matrix * scale_rows + row // BLOCK_ROWS) * scale_columns + column // BLOCK_COLUMNS
    scaled = tl.load(weights + where, mask=inside, other=0.0).to(tl.float32) * tl.load(
        scales + of, mask=inside, other=0.0
    )
    tl.store(made + where, scaled.to(made.dtype.element_ty), mask=inside)
