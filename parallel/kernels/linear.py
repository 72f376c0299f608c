"""Products of few rows with a matrix, on CUDA: they take as long as it takes to read the matrix.

In rank processes. Neurons fill the rows of tensor cores, which few rows would leave empty; one row alone needs no
tensor cores: each thread multiplies sixteen bytes at a time, and sums are joined once at the end. A program
goes through all inputs of its neurons, so that nothing is joined across programs: a row's products are the same each
time. The reference is torch's product.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a product is cut: neurons and inputs of a tile, and Triton's warps and stages.

    rows: of a tile, 16 or more; or 1 for one alone, without tensor cores. A warp has an equal part of a tile's inputs.
    """

    rows: int
    neurons: int
    inputs: int
    warps: int
    stages: int


# Programs of few neurons: all of them start at once and end at once, and 132 processors have enough to read.
ONE, GATED_ONE = Tiling(1, 8, 512, 4, 4), Tiling(1, 4, 1024, 4, 3)
FEW, GATED_FEW = Tiling(16, 16, 256, 4, 4), Tiling(16, 16, 256, 4, 3)


def tiling_of(rows: int, gated: bool) -> Tiling:
    """What was found best. Each is compiled anew, so they are few."""
    if rows == 1:
        return GATED_ONE if gated else ONE
    return GATED_FEW if gated else FEW


def linear_of_few_rows(x: Tensor, weight: Tensor, bias: Tensor | None, tiling: Tiling | None = None) -> Tensor:
    """x [r, inputs] of 16 rows or fewer, weight [neurons, inputs], whole -> x W^T + b, [r, neurons], rounded once."""
    return _multiply(x, weight, bias, len(weight), tiling)


def gated_of_few_rows(x: Tensor, gate_up: Tensor, tiling: Tiling | None = None) -> Tensor:
    """gate_up [2 * neurons, inputs], whole, gate first -> silu(x G^T) * x U^T, [r, neurons], rounded once."""
    return _multiply(x, gate_up, None, len(gate_up) // 2, tiling, gated=True)


def _multiply(
    x: Tensor, weight: Tensor, bias: Tensor | None, neurons: int, tiling: Tiling | None, gated: bool = False
) -> Tensor:
    (rows, inputs), output = x.shape, x.new_empty(len(x), neurons)
    if not rows:
        return output
    cut = tiling or tiling_of(rows, gated)
    assert rows <= cut.rows, f"{rows} rows in a tile of {cut.rows}"
    grid, tensors, sizes = (
        (triton.cdiv(neurons, cut.neurons),),
        (x.contiguous(), weight, bias, output),
        (inputs, neurons),
    )
    if cut.rows == 1:
        _multiply_one[grid](*tensors, *sizes, gated, cut.neurons, cut.inputs, cut.stages, num_warps=cut.warps)
    else:
        parts, inputs_of_part = cut.warps, cut.inputs // cut.warps
        _multiply_few[grid](
            *(*tensors, rows, *sizes, gated, cut.neurons, inputs_of_part, cut.stages, cut.rows, parts),
            num_warps=cut.warps,
        )
    return output


@triton.jit
def _gated(gates, ups):
    return gates / (1 + tl.exp(-gates)) * ups


@triton.jit
def _multiply_one(
    x, weights, bias, output, INPUTS: tl.constexpr, NEURONS: tl.constexpr, GATED: tl.constexpr,
    NEURON_TILE: tl.constexpr, INPUT_TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x [INPUTS] -> output [NEURONS]. Sums stay apart by where an input stands in a tile, until the end."""
    neuron = tl.program_id(0) * NEURON_TILE + tl.arange(0, NEURON_TILE)
    number, held = tl.arange(0, INPUT_TILE), neuron < NEURONS
    weight = weights + neuron.to(tl.int64)[:, None] * INPUTS + number
    sums = tl.zeros([NEURON_TILE, INPUT_TILE], tl.float32)
    ups = tl.zeros([NEURON_TILE, INPUT_TILE], tl.float32)
    for start in tl.range(0, INPUTS, INPUT_TILE, num_stages=STAGES):
        inside = start + number < INPUTS
        given = tl.load(x + start + number, mask=inside, other=0.0).to(tl.float32)[None, :]
        read = held[:, None] & inside
        sums += tl.load(weight + start, mask=read, other=0.0).to(tl.float32) * given
        if GATED:
            to_up = tl.load(weight + NEURONS * INPUTS + start, mask=read, other=0.0)
            ups += to_up.to(tl.float32) * given
    made = tl.sum(sums, 1)
    if GATED:
        made = _gated(made, tl.sum(ups, 1))
    if bias is not None:
        made += tl.load(bias + neuron, mask=held, other=0.0).to(tl.float32)
    tl.store(output + neuron, made.to(output.dtype.element_ty), mask=held)


@triton.jit(do_not_specialize=["count"])
def _multiply_few(
    x, weights, bias, output, count, INPUTS: tl.constexpr, NEURONS: tl.constexpr, GATED: tl.constexpr,
    NEURON_TILE: tl.constexpr, INPUT_TILE: tl.constexpr, STAGES: tl.constexpr,
    ROW_TILE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """x [count, INPUTS] -> output [count, NEURONS]. Warps have parts of a tile's inputs, and sums of their own."""
    neuron = tl.program_id(0) * NEURON_TILE + tl.arange(0, NEURON_TILE)
    row, held = tl.arange(0, ROW_TILE), neuron < NEURONS
    number = tl.arange(0, PARTS)[:, None, None] * INPUT_TILE + tl.arange(0, INPUT_TILE)[None, None, :]
    weight = weights + neuron.to(tl.int64)[None, :, None] * INPUTS + number
    given = x + row[None, :, None] * INPUTS + number
    sums = tl.zeros([PARTS, NEURON_TILE, ROW_TILE], tl.float32)
    ups = tl.zeros([PARTS, NEURON_TILE, ROW_TILE], tl.float32)
    for start in tl.range(0, INPUTS, PARTS * INPUT_TILE, num_stages=STAGES):
        inside = start + number < INPUTS
        numbers = tl.permute(tl.load(given + start, mask=(row < count)[None, :, None] & inside, other=0.0), 0, 2, 1)
        read = held[None, :, None] & inside
        sums = tl.dot(tl.load(weight + start, mask=read, other=0.0), numbers, sums)
        if GATED:
            ups = tl.dot(tl.load(weight + NEURONS * INPUTS + start, mask=read, other=0.0), numbers, ups)
    made = tl.sum(sums, 0)
    if GATED:
        made = _gated(made, tl.sum(ups, 0))
    if bias is not None:
        made += tl.load(bias + neuron, mask=held, other=0.0).to(tl.float32)[:, None]
    where = row[:, None] * NEURONS + neuron
    tl.store(output + where, tl.trans(made).to(output.dtype.element_ty), mask=(row < count)[:, None] & held)
