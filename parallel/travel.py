"""Which rows go to which ranks, and the sums of what comes back for them: index work of an exchange of rows.

In rank processes. Nothing here waits for the device: how many rows go is told to the host apart. It knows no group and
no expert.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from parallel import kernels


def travelling(asked: Tensor) -> tuple[Tensor, Tensor]:
    """asked [ranks, m] bool -> the rows that go, rank after rank [ranks * m] int64, of no use behind the last that is
    asked for; and where each row stands among them, by rank [m, ranks] int32, -1 where it does not go."""
    ranks, rows = asked.shape
    places = asked.flatten().cumsum(0).view_as(asked) - 1
    nowhere = asked.numel()
    every = torch.arange(rows, device=asked.device).expand(ranks, rows)
    tokens = torch.zeros(nowhere + 1, dtype=torch.int64, device=asked.device)
    tokens.scatter_(0, places.where(asked, nowhere).flatten(), every.flatten())
    return tokens[:nowhere], places.where(asked, -1).t().int()


def returned_sums(back: Tensor, tokens: Tensor, sent: Sequence[int], places: Tensor) -> Tensor:
    """back [sum of sent, h], what ranks made of the rows that went to them, and which rows those were -> the sum for
    each row [m, h], added in the order of ranks in float32 or wider, and rounded once."""
    if kernels.can_run(back.device) and back.dtype in kernels.DTYPES:
        from parallel.kernels.sums import weighted_sums

        return weighted_sums(back, torch.ones(places.shape, device=back.device), places.contiguous())
    wide = torch.promote_types(back.dtype, torch.float32)
    total = torch.zeros(len(places), back.shape[1], dtype=wide, device=back.device)
    for part, where in zip(back.split(sent), tokens.split(sent), strict=True):
        total.index_add_(0, where, part.to(wide))  # no row twice in a part, so the order is fixed
    return total.to(back.dtype)
