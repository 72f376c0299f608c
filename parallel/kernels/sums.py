"""Weighted sums of rows that lie scattered, on CUDA: each row of the result is read together and written once.

In rank processes. What a row adds up stands anywhere, told by places; it is added in the order of these, so that equal
inputs give equal bits. The references are `Copies.sums` in parallel/expert.py, and parallel/travel.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_SUMMED_AT_ONCE = 1024


def weighted_sums(outputs: Tensor, weights: Tensor, places: Tensor) -> Tensor:
    """outputs [copies, h], weights [r, k] float32, places [r, k] int32 -> [r, h]; each product is rounded to the dtype,
    and the sum once."""
    rows, chosen = weights.shape
    hidden = outputs.shape[1]
    sums = outputs.new_empty(rows, hidden)
    if rows:
        wide = min(triton.next_power_of_2(hidden), _SUMMED_AT_ONCE)
        _sum[rows, triton.cdiv(hidden, wide)](
            *(outputs, weights.contiguous(), places, sums, chosen, hidden, wide), num_warps=4
        )
    return sums


@triton.jit
def _sum(outputs, weights, places, sums, CHOSEN: tl.constexpr, HIDDEN: tl.constexpr, WIDE: tl.constexpr):
    """A row, or a part of a wide one."""
    row = tl.program_id(0).to(tl.int64)
    number = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    inside = number < HIDDEN
    total = tl.zeros([WIDE], tl.float32)
    for choice in tl.static_range(CHOSEN):
        place = tl.load(places + row * CHOSEN + choice).to(tl.int64)
        weight = tl.load(weights + row * CHOSEN + choice)
        where = place * HIDDEN + number  # less than 0 for one that is elsewhere
        output = tl.load(outputs + where, mask=inside & (where >= 0), other=0.0).to(tl.float32)
        total += tl.where(where >= 0, (output * weight).to(sums.dtype.element_ty).to(tl.float32), 0.0)
    tl.store(sums + row * HIDDEN + number, total.to(sums.dtype.element_ty), mask=inside)
