"""Attention of decode rows, one token each, over the blocks that hold what their requests have stored.

In rank processes. What reads the blocks is chosen once a forward pass: a kernel where there is one for the device, and
else torch over blocks that are gathered side by side, which is the reference. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from models.attention_rule import AttentionRule, attend
from models.batch import ForwardBatch
from parallel import kernels


class DecodeAttention(Protocol):
    """What a batch's D decode rows read of a layer's cache."""

    def __call__(self, rule: AttentionRule, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """query [D, heads, key_dim] -> [D, heads, value_dim].

        keys [blocks, block_tokens, key/value heads, key_dim], values the same with value_dim; or values are a view of
        keys: the first numbers of each (`begin_keys`).
        """
        ...


def decode_attention(
    batch: ForwardBatch, block_tokens: int, keys: Tensor, windows: Iterable[int | None]
) -> DecodeAttention:
    """Of a batch over such a cache. windows: all that the layers' rules have."""
    if kernels.can_run(keys.device) and keys.dtype in kernels.DTYPES:
        from models.kernels.paged_decode import PagedDecode

        return PagedDecode.of(batch)
    return GatheredDecode(batch, block_tokens, windows)


def begin_keys(keys: Tensor, values: Tensor) -> bool:
    """Whether values are what keys begin with."""
    return keys.data_ptr() == values.data_ptr()


class GatheredDecode:
    """Gathers each row's blocks, then attends all rows at once. Query heads that share a key/value head are attended
    together, so keys and values are never repeated in memory."""

    def __init__(self, batch: ForwardBatch, block_tokens: int, windows: Iterable[int | None]) -> None:
        self._tables = batch.decode_block_tables
        slots = self._tables.shape[1] * block_tokens
        offsets = torch.arange(slots, device=batch.decode_context_lens.device)
        ends = batch.decode_context_lens[:, None]
        stored = offsets < ends  # [D, slots]
        self._visible = {
            window: stored if window is None else stored & (offsets >= ends - window) for window in windows
        }

    def __call__(self, rule: AttentionRule, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        visible = self._visible[rule.window]
        grouped = query.unflatten(1, (keys.shape[2], -1))  # query heads by the key/value head they share
        stored = self._gather(keys, visible)
        held = stored[..., : values.shape[-1]] if begin_keys(keys, values) else self._gather(values, visible)
        return attend(rule, grouped, stored, held, visible[:, None, None, :]).flatten(1, 2)

    def _gather(self, paged: Tensor, visible: Tensor) -> Tensor:
        """[D, key/value heads, slots, head_dim], zeros where nothing is visible."""
        tokens = paged[self._tables].flatten(1, 2)  # [D, slots, key/value heads, head_dim]
        # A block keeps what its last owner wrote; zeros keep a NaN of theirs out of this row's sums.
        return tokens.masked_fill_(~visible[:, :, None, None], 0).transpose(1, 2)
