"""Experts for the few rows of a decode step, on CUDA: two launches that read each chosen expert's weights once.

In rank processes. Shapes alone set the grids; which experts are chosen is read on the device. A program has a slot and
a tile of its neurons, and goes through the slot's rows, which are gathered as they are read; outputs are put where a
choice stands, weighted. One launch for all experts is the grouped product of MegaBlocks (2022), section 5. Weights fill
the rows of tensor cores, which few rows would leave empty. The reference is models/moe.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import triton
import triton.language as tl
from torch import Tensor

from parallel.expert import Copies


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a product is cut: neurons and rows of a tile, inputs read at once, and Triton's warps and stages."""

    neurons: int
    inputs: int
    warps: int
    stages: int
    rows: int | None = None  # None: by how many rows a slot has on average


GATE_UP = Tiling(neurons=64, inputs=64, warps=4, stages=4)
DOWN = Tiling(neurons=128, inputs=64, warps=4, stages=4)
ROW_TILES = (16, 32, 64)  # each of them is compiled anew, so they are few


def experts_of_few_rows(
    rows: Tensor, gate_up: Tensor, down: Tensor, copies: Copies, first: Tiling = GATE_UP, second: Tiling = DOWN
) -> Tensor:
    """rows [r, h], gate_up [slots, 2 * neurons, h], down [slots, h, neurons] -> the weighted sum of each row's outputs
    down(silu(gate(x)) * up(x)), [r, h]; each product with a weight is rounded to the dtype, and the sum once."""
    slots, hidden, neurons = down.shape
    chosen, taken = copies.weights.shape[1], len(copies.order)
    inner = rows.new_empty(taken, neurons)
    spread = copies.spread(rows.dtype, hidden)
    if taken:
        fitting = next((tile for tile in ROW_TILES if 2 * slots * tile >= 3 * taken), ROW_TILES[-1])
        places = (copies.order, copies.ends)
        _gate_up[triton.cdiv(neurons, first.neurons), slots](
            *(rows.contiguous(), gate_up, inner, *places, hidden, neurons, chosen),
            *(first.neurons, first.rows or fitting, first.inputs),
            num_warps=first.warps,
            num_stages=first.stages,
        )
        _down[triton.cdiv(hidden, second.neurons), slots](
            *(inner, down, spread, copies.weights.contiguous(), *places, neurons, hidden),
            *(second.neurons, second.rows or fitting, second.inputs),
            num_warps=second.warps,
            num_stages=second.stages,
        )
    return spread.sum(1)


def try_row_tiles(rows: Tensor, gate_up: Tensor, down: Tensor, copies: Copies) -> None:
    """Launches all that any number of rows may ask for."""
    for tile in ROW_TILES:
        first, second = replace(GATE_UP, rows=tile), replace(DOWN, rows=tile)
        experts_of_few_rows(rows, gate_up, down, copies, first, second)


@triton.jit
def _bounds(ends, slot):
    """The first and the last copy of a slot, but one."""
    return tl.load(ends + slot - 1, mask=slot > 0, other=0), tl.load(ends + slot)


@triton.jit
def _gate_up(
    rows, weights, inner, order, ends,
    INPUTS: tl.constexpr, NEURONS: tl.constexpr, CHOSEN: tl.constexpr,
    NEURON_TILE: tl.constexpr, ROW_TILE: tl.constexpr, INPUT_TILE: tl.constexpr,
):  # fmt: skip
    """rows [r, INPUTS], weights [slots, 2 * NEURONS, INPUTS], gate first -> silu(gate) * up, [copies, NEURONS]."""
    slot = tl.program_id(1).to(tl.int64)
    begin, end = _bounds(ends, slot)
    neuron = tl.program_id(0) * NEURON_TILE + tl.arange(0, NEURON_TILE)
    gate = weights + (slot * 2 * NEURONS + neuron)[:, None] * INPUTS
    number = tl.arange(0, INPUT_TILE)
    for first in range(begin, end, ROW_TILE):
        copy = first + tl.arange(0, ROW_TILE)
        choice = tl.load(order + copy, mask=copy < end, other=0)
        read = rows + (choice // CHOSEN)[:, None] * INPUTS
        gates = tl.zeros([NEURON_TILE, ROW_TILE], tl.float32)
        ups = tl.zeros([NEURON_TILE, ROW_TILE], tl.float32)
        for start in range(0, INPUTS, INPUT_TILE):
            inside, held = start + number < INPUTS, (neuron < NEURONS)[:, None]
            x = tl.load(read + start + number, mask=(copy < end)[:, None] & inside, other=0.0)
            to_gate = tl.load(gate + start + number, mask=held & inside, other=0.0)
            to_up = tl.load(gate + NEURONS * INPUTS + start + number, mask=held & inside, other=0.0)
            gates = tl.dot(to_gate, tl.trans(x), gates)
            ups = tl.dot(to_up, tl.trans(x), ups)
        made = tl.trans(gates / (1 + tl.exp(-gates)) * ups).to(inner.dtype.element_ty)
        where = copy.to(tl.int64)[:, None] * NEURONS + neuron
        tl.store(inner + where, made, mask=(copy < end)[:, None] & (neuron < NEURONS))


@triton.jit
def _down(
    inner, weights, spread, shares, order, ends,
    INPUTS: tl.constexpr, NEURONS: tl.constexpr,
    NEURON_TILE: tl.constexpr, ROW_TILE: tl.constexpr, INPUT_TILE: tl.constexpr,
):  # fmt: skip
    """inner [copies, INPUTS], weights [slots, NEURONS, INPUTS], shares [r, k] -> spread [r, k, NEURONS]: of choices."""
    slot = tl.program_id(1).to(tl.int64)
    begin, end = _bounds(ends, slot)
    neuron = tl.program_id(0) * NEURON_TILE + tl.arange(0, NEURON_TILE)
    weight = weights + (slot * NEURONS + neuron)[:, None] * INPUTS
    number = tl.arange(0, INPUT_TILE)
    for first in range(begin, end, ROW_TILE):
        copy = first + tl.arange(0, ROW_TILE)
        read = inner + copy.to(tl.int64)[:, None] * INPUTS
        sums = tl.zeros([NEURON_TILE, ROW_TILE], tl.float32)
        for start in range(0, INPUTS, INPUT_TILE):
            inside, held = start + number < INPUTS, (neuron < NEURONS)[:, None]
            x = tl.load(read + start + number, mask=(copy < end)[:, None] & inside, other=0.0)
            sums = tl.dot(tl.load(weight + start + number, mask=held & inside, other=0.0), tl.trans(x), sums)
        choice = tl.load(order + copy, mask=copy < end, other=0)
        share = tl.load(shares + choice, mask=copy < end, other=0.0)[:, None]
        made = (tl.trans(sums).to(spread.dtype.element_ty).to(tl.float32) * share).to(spread.dtype.element_ty)
        tl.store(spread + choice[:, None] * NEURONS + neuron, made, mask=(copy < end)[:, None] & (neuron < NEURONS))
