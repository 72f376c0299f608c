"""Experts for the many rows of prompts, on CUDA: torch's grouped product, and what stands around it in a launch each.

In rank processes. Rows are gathered for the slots that want them, which also tells where each choice will stand; gate
and up are joined; then each row adds up its own outputs from where they stand, weighted, in the order of its choices.
Nothing is spread, zeroed or added by chance, and nothing waits for the device. The reference is models/moe.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from models.kernels.rows import silu_and_multiply
from parallel.expert import Copies
from parallel.kernels.sums import weighted_sums

_MOST_NUMBERS = 4096  # of a row, that a program moves


def experts_of_many_rows(rows: Tensor, gate_up: Tensor, down: Tensor, copies: Copies) -> Tensor:
    """rows [r, h], gate_up [slots, 2 * neurons, h], down [slots, h, neurons] -> the weighted sum of each row's outputs
    down(silu(gate(x)) * up(x)), [r, h]; what is rounded, and when, is as in the reference."""
    taken, places = taken_and_places(rows, copies)
    if not len(taken):
        return torch.zeros_like(rows)
    inner = silu_and_multiply(F.grouped_mm(taken, gate_up.mT, offs=copies.ends))
    return weighted_sums(F.grouped_mm(inner, down.mT, offs=copies.ends), copies.weights, places)


def try_steps(rows: Tensor, width: int, copies: Copies) -> None:
    """Launches what stands around the products, for nothing. width: of gate and up."""
    taken, places = taken_and_places(rows, copies)
    silu_and_multiply(rows.new_zeros(len(taken), width))
    weighted_sums(taken, copies.weights, places)


def taken_and_places(rows: Tensor, copies: Copies) -> tuple[Tensor, Tensor]:
    """rows [r, h] -> copies [copies, h], of no use behind the last end, and where each choice's copy stands, [r, k]
    int32: -1 where it is computed elsewhere."""
    shape, hidden = copies.weights.shape, rows.shape[1]
    count = len(copies.order)
    taken = rows.new_empty(count, hidden)
    # Choices that have no place in the order are elsewhere.
    places = torch.empty(shape, dtype=torch.int32, device=rows.device)
    if count < copies.weights.numel():
        places.fill_(-1)
    if count:
        wide = min(triton.next_power_of_2(hidden), _MOST_NUMBERS)
        _take[count, triton.cdiv(hidden, wide)](
            *(rows.contiguous(), copies.order, copies.ends, taken, places, len(copies.ends), shape[1], hidden, wide),
            num_warps=4,
        )
    return taken, places


@triton.jit
def _take(
    rows, order, ends, taken, places,
    SLOTS: tl.constexpr, CHOSEN: tl.constexpr, HIDDEN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A copy, or a part of a wide one."""
    copy = tl.program_id(0).to(tl.int64)
    choice = tl.load(order + copy)
    here = copy < tl.load(ends + SLOTS - 1)
    if tl.program_id(1) == 0:
        tl.store(places + choice, tl.where(here, copy, -1).to(tl.int32))
    if here:
        number = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
        inside = number < HIDDEN
        tl.store(
            taken + copy * HIDDEN + number,
            tl.load(rows + choice // CHOSEN * HIDDEN + number, mask=inside, other=0.0),
            mask=inside,
        )
