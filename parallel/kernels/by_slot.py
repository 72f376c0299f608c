"""Sorts the choices of a few rows by the slot that serves them, in one launch.

In rank processes, on CUDA. A program for each slot counts the choices of slots before it and places its own behind
those, in their order: a counting sort whose keys are so few that each may read all choices. The reference is torch's
stable sort, in parallel/expert.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_CHOICES = 1 << 14  # that are sorted so; each program reads them all
_TILE = 1024


def by_slot(slots: Tensor, held: int) -> tuple[Tensor, Tensor]:
    """slots [r, k] int64 from 0 to held -> the choices sorted by slot [r * k] int64, and where each of the held slots
    ends among them [held] int32; those of slot `held`, which is elsewhere, come last."""
    choices = slots.numel()
    order = torch.empty(choices, dtype=torch.int64, device=slots.device)
    ends = torch.empty(held, dtype=torch.int32, device=slots.device)
    _place[(held + 1,)](slots.contiguous(), order, ends, choices, held, _TILE)
    return order, ends


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
