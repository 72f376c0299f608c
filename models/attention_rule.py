"""How a layer attends, and the sums that it makes of keys and values that lie side by side.

In rank processes, on every device; what kernels compute is measured against it. Models that cap the products of
queries and keys are computed step by step, as torch's kernels cap nothing. It knows no batch and no cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionRule:
    """How a layer attends: softmax of the products of query and key times scale, each x bent to cap * tanh(x / cap).

    With a window, each token sees itself and the window - 1 before it; the cache keeps all of them.
    """

    window: int | None
    scale: float
    cap: float | None


def attend(rule: AttentionRule, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """query [..., T, head_dim], keys and values [..., context, head_dim] -> [..., T, head_dim]. mask None: causal.

    Values may be narrower than keys, and outputs then are. The window is the mask's matter.
    """
    if rule.cap is None:
        return F.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, is_causal=mask is None, scale=rule.scale
        )
    products = query @ keys.transpose(-2, -1) * rule.scale
    if mask is None:
        mask = torch.ones(products.shape[-2:], dtype=torch.bool, device=products.device).tril()
    capped = torch.tanh(products / rule.cap) * rule.cap
    # In float32 whatever the dtype, as transformers does.
    weights = capped.masked_fill(~mask, -torch.inf).softmax(-1, dtype=torch.float32).to(query.dtype)
    return weights @ values
