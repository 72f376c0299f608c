"""Routers: which experts a row passes through, and its share of each, as transformers' gates compute them.

In rank processes, on the device, without waiting for it. Each takes hidden [m, hidden] and returns expert ids [m, k]
int64 and their shares [m, k] float32: by a kernel where there is one for the device, else step by step. Every rank of a
stage has the same weights, and chooses alike. It knows no expert's weights and no rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from models.routing import Groups
from parallel import kernels

_LEAST_SUM = 1e-20  # is added to sums that shares are divided by, as transformers does


class Router(Protocol):
    """Chooses experts."""

    def __call__(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [m, hidden] -> expert ids [m, k] int64 and their shares [m, k] float32."""

    def plain(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The same, step by step, on every device."""


@dataclass(frozen=True, slots=True)
class SoftmaxRouter:
    """Of Mixtral and Qwen3-MoE. weight: [experts, hidden].

    Shares are a softmax over all experts in float32, the greatest are chosen; normalizes: those of the chosen ones are
    divided by their sum; rounds: they are rounded to the dtype of the model.
    """

    weight: Tensor
    experts_per_token: int
    normalizes: bool
    rounds: bool

    def __call__(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        if not _takes(hidden, self.weight):
            return self.plain(hidden)
        from models.kernels.routing import Choosing, route

        choosing = Choosing(
            self.experts_per_token, normalizes=self.normalizes, rounds_scores=True, rounds_shares=self.rounds
        )
        return route(hidden, self.weight, None, choosing)

    def plain(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The same, step by step, on every device."""
        shares = F.linear(hidden, self.weight).softmax(-1, dtype=torch.float32)
        chosen, ids = shares.topk(self.experts_per_token, dim=-1)
        if self.normalizes:
            chosen = chosen / chosen.sum(-1, keepdim=True)
        return ids, chosen.to(hidden.dtype).float() if self.rounds else chosen


@dataclass(frozen=True, slots=True)
class GroupedSoftmaxRouter:
    """Of DeepSeek-V2. weight: [experts, hidden]. Source: DeepSeek-V2 (2024), section 2.2; transformers' deepseek_v2.

    Shares are a softmax over all experts, in float32 from the product on. With groups, experts are chosen from those
    whose best expert is greatest. scale multiplies the shares.
    """

    weight: Tensor
    experts_per_token: int
    groups: Groups | None
    scale: float

    def __call__(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        if not _takes(hidden, self.weight):
            return self.plain(hidden)
        from models.kernels.routing import Choosing, route

        choosing = Choosing(self.experts_per_token, groups=self.groups, scale=self.scale)
        return route(hidden, self.weight, None, choosing)

    def plain(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The same, step by step, on every device."""
        shares = _wide_scores(hidden, self.weight).softmax(-1)
        if self.groups is not None:
            best = shares.unflatten(-1, (self.groups.count, -1)).amax(-1)
            shares = shares.masked_fill(_outside(best, self.groups, shares.shape[-1]), 0.0)
        chosen, ids = shares.topk(self.experts_per_token, dim=-1, sorted=False)
        return ids, chosen * self.scale


@dataclass(frozen=True, slots=True)
class SigmoidRouter:
    """Of DeepSeek-V3. weight: [experts, hidden]; correction: [experts] float32. Source: DeepSeek-V3 (2024), section
    2.1.2; transformers' deepseek_v3.

    Shares are a sigmoid, in float32 from the product on. The correction is added for the choice alone: of groups the
    ones whose best two experts add up to most, of their experts the greatest. normalizes: the shares of the chosen ones
    are divided by their sum. scale multiplies them.
    """

    weight: Tensor
    correction: Tensor
    experts_per_token: int
    groups: Groups | None
    normalizes: bool
    scale: float

    def __call__(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        if not _takes(hidden, self.weight):
            return self.plain(hidden)
        from models.kernels.routing import Choosing, route

        choosing = Choosing(
            self.experts_per_token,
            sigmoid=True,
            groups=self.groups,
            normalizes=self.normalizes,
            least_sum=_LEAST_SUM,
            scale=self.scale,
        )
        return route(hidden, self.weight, self.correction, choosing)

    def plain(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The same, step by step, on every device."""
        shares = _wide_scores(hidden, self.weight).sigmoid()
        scores = shares + self.correction
        if self.groups is not None:
            judged = scores.unflatten(-1, (self.groups.count, -1)).topk(2, dim=-1)[0].sum(-1)
            scores = scores.masked_fill(_outside(judged, self.groups, scores.shape[-1]), -torch.inf)
        ids = scores.topk(self.experts_per_token, dim=-1, sorted=False)[1]
        chosen = shares.gather(-1, ids)
        if self.normalizes:
            chosen = chosen / (chosen.sum(-1, keepdim=True) + _LEAST_SUM)
        return ids, chosen * self.scale


def _takes(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the kernel, two launches, is for these."""
    return hidden.dtype == weight.dtype and hidden.dtype in kernels.DTYPES and kernels.can_run(hidden.device)


def _wide_scores(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden [m, hidden] W^T in float32, whatever their dtype: [m, experts]."""
    return F.linear(hidden.float(), weight.float())


def _outside(scores: Tensor, groups: Groups, experts: int) -> Tensor:
    """scores [m, groups] -> [m, experts]: whether an expert lies in none of the chosen groups, the greatest ones."""
    best = scores.topk(groups.chosen, dim=-1, sorted=False)[1]
    outside = torch.ones_like(scores, dtype=torch.bool).scatter_(-1, best, False)
    return outside.unsqueeze(-1).expand(-1, -1, experts // groups.count).flatten(-2)
