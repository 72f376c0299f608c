"""Attention over the paged key/value cache with torch's scaled_dot_product_attention: the reference on every device.

In rank processes, one object per forward pass: what depends on the batch alone is made once and serves every layer.
Query heads that share a key/value head are attended together, so keys and values are never repeated in memory. Models
that cap the products of queries and keys are computed step by step instead. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from models.batch import ForwardBatch, PrefillRow


class PagedCache(Protocol):
    """Keys and values of every layer: [blocks, block_tokens, key/value heads held, head_dim].

    There are no values where keys begin with them.
    """

    @property
    def block_tokens(self) -> int: ...
    @property
    def keys(self) -> Sequence[Tensor]: ...
    @property
    def values(self) -> Sequence[Tensor]: ...


@dataclass(frozen=True, slots=True)
class AttentionRule:
    """How a layer attends: softmax of the products of query and key times scale, each x bent to cap * tanh(x / cap).

    With a window, each token sees itself and the window - 1 before it; the cache keeps all of them. key_holds: so many
    numbers of each key, the first, are the value; None if values are stored apart.
    """

    window: int | None
    scale: float
    cap: float | None
    key_holds: int | None = None


class PagedAttention:
    """Attention of one batch. Call it once per layer: it stores the new keys and values, then reads.

    windows: all that the layers' rules have.
    """

    def __init__(self, batch: ForwardBatch, cache: PagedCache, windows: Iterable[int | None]) -> None:
        self._batch = batch
        self._cache = cache
        slots = batch.decode_block_tables.shape[1] * cache.block_tokens
        offsets = torch.arange(slots, device=batch.decode_context_lens.device)
        ends = batch.decode_context_lens[:, None]
        stored = offsets < ends  # [D, slots]
        self._decode_visible = {
            window: stored if window is None else stored & (offsets >= ends - window) for window in windows
        }
        self._prefill_masks = {window: [_causal_mask(row, window) for row in batch.prefill] for window in windows}

    def __call__(self, layer: int, rule: AttentionRule, query: Tensor, key: Tensor, value: Tensor | None) -> Tensor:
        """query [T, heads, head_dim], key and value [T, key/value heads, head_dim] -> [T, heads, head_dim].

        value None: keys hold it, and outputs are as wide as it is.
        """
        keys, values = self._cache.keys[layer], None if value is None else self._cache.values[layer]
        keys.flatten(0, 1).index_copy_(0, self._batch.slot_mapping, key)
        if value is not None and values is not None:
            values.flatten(0, 1).index_copy_(0, self._batch.slot_mapping, value)
        decoded = self._batch.num_decode_rows
        output = query.new_empty(*query.shape[:-1], rule.key_holds or query.shape[-1])
        if decoded:
            output[:decoded] = self._decode(rule, query[:decoded], keys, values)
        for row, mask in zip(self._batch.prefill, self._prefill_masks[rule.window], strict=True):
            tokens = slice(row.offset, row.offset + row.tokens)
            output[tokens] = _prefill(rule, row, mask, query[tokens], keys, values)
        return output

    def _decode(self, rule: AttentionRule, query: Tensor, keys: Tensor, values: Tensor | None) -> Tensor:
        """All decode rows at once, over their blocks gathered side by side."""
        rows, _, head_dim = query.shape
        grouped = query.reshape(rows, keys.shape[2], -1, head_dim)  # query heads by the key/value head they share
        visible = self._decode_visible[rule.window]
        hidden = ~visible[:, :, None, None]

        def gather(paged: Tensor) -> Tensor:
            tokens = paged[self._batch.decode_block_tables].flatten(1, 2)  # [D, slots, key/value heads, head_dim]
            # A block keeps what its last owner wrote; zeros keep a NaN of theirs out of this row's sums.
            return tokens.masked_fill_(hidden, 0).transpose(1, 2)

        stored = gather(keys)
        held = stored[..., : rule.key_holds] if values is None else gather(values)
        return _attend(rule, grouped, stored, held, visible[:, None, None, :]).flatten(1, 2)


def _prefill(
    rule: AttentionRule, row: PrefillRow, mask: Tensor | None, query: Tensor, keys: Tensor, values: Tensor | None
) -> Tensor:
    """One request's chunk over everything the request has stored so far."""
    tokens, _, head_dim = query.shape
    grouped = query.reshape(tokens, keys.shape[2], -1, head_dim).permute(1, 2, 0, 3)  # [kv heads, shared by, T, dim]

    def gather(paged: Tensor) -> Tensor:
        stored = paged[row.block_table].flatten(0, 1)[: row.context_len]  # [context, key/value heads, head_dim]
        return stored.transpose(0, 1).unsqueeze(1).expand(-1, grouped.shape[1], -1, -1)

    stored = gather(keys)
    held = stored[..., : rule.key_holds] if values is None else gather(values)
    return _attend(rule, grouped, stored, held, mask).permute(2, 0, 1, 3).flatten(1, 2)


def _attend(rule: AttentionRule, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """query [..., T, head_dim], keys and values [..., context, head_dim] -> [..., T, head_dim]. mask None: causal.

    Values may be narrower than keys, and outputs then are.
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


def _causal_mask(row: PrefillRow, window: int | None) -> Tensor | None:
    """[tokens, context]: what each token sees. None for a whole prompt within the window, which is plainly causal."""
    if row.tokens == row.context_len and (window is None or row.tokens <= window):
        return None
    before = row.context_len - row.tokens
    seen = torch.ones(row.tokens, row.context_len, dtype=torch.bool, device=row.block_table.device).tril(before)
    return seen if window is None else seen.triu(before - window + 1)
