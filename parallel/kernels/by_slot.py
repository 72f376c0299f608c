"""Sorts choices by the slot that serves them: those of few rows in one launch, those of many in three.

In rank processes, on CUDA. Of few, a program for each slot counts the choices of slots before it and places its own
behind those, in their order: a counting sort whose keys are so few that each may read all choices. Of many, programs
count their part's choices of every slot, and place them behind what a running sum over all slots and parts says. The
reference is torch's stable sort, in parallel/expert.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_CHOICES = 1 << 14  # that each program of a slot reads
_TILE = 1024
_PART = 256


def by_slot(slots: Tensor, held: int) -> tuple[Tensor, Tensor]:
    """slots [r, k] int64 from 0 to held -> the choices sorted by slot [r * k] int64, and where each of the held slots
    ends among them [held] int32; those of slot `held`, which is elsewhere, come last."""
    choices = slots.numel()
    order = torch.empty(choices, dtype=torch.int64, device=slots.device)
    ends = torch.empty(held, dtype=torch.int32, device=slots.device)
    if choices <= MOST_CHOICES:
        _place[(held + 1,)](slots.contiguous(), order, ends, choices, held, _TILE)
    else:
        _place_parts(slots.contiguous(), order, ends)
    return order, ends


def try_parts(held: int, device: torch.device) -> None:
    """Launches what sorts many choices, for one."""
    slots = torch.zeros(1, dtype=torch.int64, device=device)
    _place_parts(slots, torch.empty_like(slots), torch.empty(held, dtype=torch.int32, device=device))


def _place_parts(slots: Tensor, order: Tensor, ends: Tensor) -> None:
    choices, held = len(order), len(ends)
    parts, wide = triton.cdiv(choices, _PART), triton.next_power_of_2(held + 1)
    counts = torch.empty(held + 1, parts, dtype=torch.int32, device=slots.device)
    _count_part[(parts,)](slots, counts, choices, parts, held, wide, _PART)
    behind = counts.flatten().cumsum(0, dtype=torch.int32)
    _place_part[(parts,)](slots, counts, behind, order, ends, choices, parts, held, wide, _PART)


@triton.jit(do_not_specialize=["choices", "held"])
def _place(slots, order, ends, choices, held, TILE: tl.constexpr):
    slot = tl.program_id(0)
    before = 0
    own = 0
    for first in range(0, choices, TILE):
        choice = first + tl.arange(0, TILE)
        chosen = tl.load(slots + choice, mask=choice < choices, other=held + 1)
        before += tl.sum((chosen < slot).to(tl.int32), 0)
        own += tl.sum((chosen == slot).to(tl.int32), 0)
    if slot < held:
        tl.store(ends + slot, before + own)
    if own > 0:
        for first in range(0, choices, TILE):
            choice = first + tl.arange(0, TILE)
            mine = tl.load(slots + choice, mask=choice < choices, other=held + 1) == slot
            place = before + tl.cumsum(mine.to(tl.int32), 0) - 1
            tl.store(order + place, choice.to(tl.int64), mask=mine)
            before += tl.sum(mine.to(tl.int32), 0)


@triton.jit(do_not_specialize=["choices", "parts", "held"])
def _count_part(slots, counts, choices, parts, held, WIDE: tl.constexpr, PART: tl.constexpr):
    """A part's choices of each slot. What is behind the last choice counts as elsewhere, and comes last there."""
    part = tl.program_id(0)
    choice = part * PART + tl.arange(0, PART)
    chosen = tl.load(slots + choice, mask=choice < choices, other=held).to(tl.int32)
    slot = tl.arange(0, WIDE)
    tl.store(counts + slot * parts + part, tl.histogram(chosen, WIDE), mask=slot <= held)


@triton.jit(do_not_specialize=["choices", "parts", "held"])
def _place_part(slots, counts, behind, order, ends, choices, parts, held, WIDE: tl.constexpr, PART: tl.constexpr):
    """counts [slots, parts]; behind: their running sums. A choice stands behind those of its part and slot."""
    AT_ONCE: tl.constexpr = 32
    part = tl.program_id(0)
    choice = part * PART + tl.arange(0, PART)
    chosen = tl.load(slots + choice, mask=choice < choices, other=held).to(tl.int32)
    where = chosen * parts + part
    place = tl.load(behind + where) - tl.load(counts + where)
    for first in range(part * PART, part * PART + PART, AT_ONCE):
        other = first + tl.arange(0, AT_ONCE)
        others = tl.load(slots + other, mask=other < choices, other=held).to(tl.int32)
        earlier = (others[None, :] == chosen[:, None]) & (other[None, :] < choice[:, None])
        place += tl.sum(earlier.to(tl.int32), 1)
    tl.store(order + place, choice.to(tl.int64), mask=choice < choices)
    if part == 0:
        slot = tl.arange(0, WIDE)
        tl.store(ends + slot, tl.load(behind + (slot + 1) * parts - 1, mask=slot < held, other=0), mask=slot < held)
