"""The largest logit of each row, over a vocabulary that ranks share, and whether all logits are numbers.

In rank processes: what a greedy draw needs. A rank finds the largest of its part, and two numbers a row are gathered
instead of logits. On CUDA a kernel reads logits once; plain torch is its reference. It knows no model and no sampling.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parallel import kernels

NOT_FINITE = -2  # stands for the id where a logit is NaN or infinite


def largest(logits: Tensor, first_id: int = 0, width: int | None = None) -> Tensor:
    """logits [S, V], of the ids from first_id on, of which `width` count -> [S, 2] float64: the largest logit and its
    id, the lowest among equals; infinity and NOT_FINITE for a row with a logit that is not finite."""
    width = logits.shape[1] if width is None else max(min(width, logits.shape[1]), 0)
    if logits.dtype in kernels.DTYPES and logits.stride(1) == 1 and kernels.can_run(logits.device):
        from parallel.kernels.largest import largest as by_kernel

        return by_kernel(logits, first_id, width)
    return plain(logits, first_id, width)


def plain(logits: Tensor, first_id: int, width: int) -> Tensor:
    """The same, on every device, step by step."""
    if not width:  # a rank that holds padding alone
        return torch.tensor([-torch.inf, first_id], dtype=torch.float64, device=logits.device).repeat(len(logits), 1)
    counting = logits[:, :width]
    # The sum tells of all logits whether they are finite; what begins finite in float64 is no sum of infinities.
    finite = counting.sum(dim=-1, dtype=torch.float64).abs() < torch.inf
    ids = counting.argmax(dim=-1, keepdim=True)
    values = counting.gather(1, ids).squeeze(1).double().masked_fill_(~finite, torch.inf)
    return torch.stack((values, (ids.squeeze(1) + first_id).double().masked_fill_(~finite, NOT_FINITE)), dim=1)


def winners(parts: Tensor, ranks: int) -> Tensor:
    """parts [ranks * S, 2], what `largest` found in the parts of a vocabulary, in order -> ids [S] float64."""
    if ranks == 1:
        return parts[:, 1]
    values, ids = parts.view(ranks, -1, 2).unbind(-1)
    return ids.gather(0, values.argmax(0, keepdim=True)).squeeze(0)
