"""Attention over the paged key/value cache with torch's scaled_dot_product_attention: the reference on every device.

In rank processes, one object per forward pass: what depends on the batch alone is made once and serves every layer.
Query heads that share a key/value head are attended together, so keys and values are never repeated in memory.
Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from models.batch import ForwardBatch, PrefillRow


class PagedCache(Protocol):
    """Keys and values of every layer: [blocks, block_tokens, key/value heads held, head_dim]."""

    @property
    def block_tokens(self) -> int: ...
    @property
    def keys(self) -> Sequence[Tensor]: ...
    @property
    def values(self) -> Sequence[Tensor]: ...


class PagedAttention:
    """Attention of one batch. Call it once per layer: it stores the new keys and values, then reads.

    With a window, each token sees itself and the window - 1 before it; the cache keeps all of them.
    """

    def __init__(self, batch: ForwardBatch, cache: PagedCache, window: int | None = None) -> None:
        self._batch = batch
        self._cache = cache
        slots = batch.decode_block_tables.shape[1] * cache.block_tokens
        offsets = torch.arange(slots, device=batch.decode_context_lens.device)
        ends = batch.decode_context_lens[:, None]
        self._decode_visible = offsets < ends  # [D, slots]
        if window is not None:
            self._decode_visible &= offsets >= ends - window
        self._prefill_masks = [_causal_mask(row, window) for row in batch.prefill]

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [T, heads, head_dim], key and value [T, key/value heads, head_dim] -> [T, heads, head_dim]."""
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        keys.flatten(0, 1).index_copy_(0, self._batch.slot_mapping, key)
        values.flatten(0, 1).index_copy_(0, self._batch.slot_mapping, value)
        decoded = self._batch.num_decode_rows
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        if decoded:
            output[:decoded] = self._decode(query[:decoded], keys, values)
        for row, mask in zip(self._batch.prefill, self._prefill_masks, strict=True):
            tokens = slice(row.offset, row.offset + row.tokens)
            output[tokens] = _prefill(row, mask, query[tokens], keys, values)
        return output

    def _decode(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """All decode rows at once, over their blocks gathered side by side."""
        rows, _, head_dim = query.shape
        grouped = query.reshape(rows, keys.shape[2], -1, head_dim)  # query heads by the key/value head they share
        hidden = ~self._decode_visible[:, :, None, None]

        def gather(paged: Tensor) -> Tensor:
            tokens = paged[self._batch.decode_block_tables].flatten(1, 2)  # [D, slots, key/value heads, head_dim]
            # A block keeps what its last owner wrote; zeros keep a NaN of theirs out of this row's sums.
            return tokens.masked_fill_(hidden, 0).transpose(1, 2)

        mask = self._decode_visible[:, None, None, :]
        return F.scaled_dot_product_attention(grouped, gather(keys), gather(values), attn_mask=mask).flatten(1, 2)


def _prefill(row: PrefillRow, mask: Tensor | None, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One request's chunk over everything the request has stored so far."""
    tokens, _, head_dim = query.shape
    grouped = query.reshape(tokens, keys.shape[2], -1, head_dim).permute(1, 2, 0, 3)  # [kv heads, shared by, T, dim]

    def gather(paged: Tensor) -> Tensor:
        stored = paged[row.block_table].flatten(0, 1)[: row.context_len]  # [context, key/value heads, head_dim]
        return stored.transpose(0, 1).unsqueeze(1).expand(-1, grouped.shape[1], -1, -1)

    attended = F.scaled_dot_product_attention(
        grouped, gather(keys), gather(values), attn_mask=mask, is_causal=mask is None
    )
    return attended.permute(2, 0, 1, 3).flatten(1, 2)


def _causal_mask(row: PrefillRow, window: int | None) -> Tensor | None:
    """[tokens, context]: what each token sees. None for a whole prompt within the window, which is plainly causal."""
    if row.tokens == row.context_len and (window is None or row.tokens <= window):
        return None
    before = row.context_len - row.tokens
    seen = torch.ones(row.tokens, row.context_len, dtype=torch.bool, device=row.block_table.device).tril(before)
    return seen if window is None else seen.triu(before - window + 1)
