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

    With a window, each token sees itself and the window - 1 before it; the cache keeps all of them.
    """

    window: int | None
    scale: float
    cap: float | None


class LatentHeads(Protocol):
    """A batch's queries where keys and values of all heads are made of one vector a token, which is what is cached.

    rank: so many of its numbers, the first, make values.
    """

    @property
    def rank(self) -> int: ...

    def absorbed(self, tokens: slice) -> Tensor:
        """[T, heads, cached numbers]: their products with what is cached are the queries' with the heads' keys."""
        ...

    def values(self, read: Tensor) -> Tensor:
        """What heads read of what is cached, [T, heads, rank], as their values: [T, heads, value_dim]."""
        ...

    def expanding_pays(self, tokens: int) -> bool:
        """Whether so many queries of a chunk are answered sooner by keys and values of heads."""
        ...

    def expanded(self, tokens: slice, cached: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """cached [context, cached numbers] -> queries [heads, T, head_dim], keys [heads, context, head_dim], values."""
        ...


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

    def __call__(self, layer: int, rule: AttentionRule, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [T, heads, head_dim], key and value [T, key/value heads, head_dim] -> [T, heads, head_dim]."""
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        keys.flatten(0, 1).index_copy_(0, self._batch.slot_mapping, key)
        values.flatten(0, 1).index_copy_(0, self._batch.slot_mapping, value)
        decoded = self._batch.num_decode_rows
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        if decoded:
            output[:decoded] = self._decode(rule, query[:decoded], keys, values)
        for row, mask in zip(self._batch.prefill, self._prefill_masks[rule.window], strict=True):
            tokens = slice(row.offset, row.offset + row.tokens)
            output[tokens] = _prefill(rule, row, mask, query[tokens], keys, values)
        return output

    def latent(self, layer: int, rule: AttentionRule, heads: LatentHeads, key: Tensor) -> Tensor:
        """key [T, 1, cached numbers]: what is cached of each token -> [T, heads, value_dim].

        Decode rows read what is cached as it is; long chunks of prompts make keys and values of heads of it first.
        """
        keys, decoded = self._cache.keys[layer], self._batch.num_decode_rows
        keys.flatten(0, 1).index_copy_(0, self._batch.slot_mapping, key)
        read = self._decode_latent(rule, heads, keys)
        output = read.new_empty(len(key), *read.shape[1:])
        output[:decoded] = read
        for row, mask in zip(self._batch.prefill, self._prefill_masks[rule.window], strict=True):
            tokens = slice(row.offset, row.offset + row.tokens)
            output[tokens] = _prefill_latent(rule, row, mask, heads, keys)
        return output

    def _decode(self, rule: AttentionRule, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """All decode rows at once, over their blocks gathered side by side."""
        rows, _, head_dim = query.shape
        grouped = query.reshape(rows, keys.shape[2], -1, head_dim)  # query heads by the key/value head they share
        visible = self._decode_visible[rule.window]
        stored, held = self._gather(keys, visible), self._gather(values, visible)
        return _attend(rule, grouped, stored, held, visible[:, None, None, :]).flatten(1, 2)

    def _decode_latent(self, rule: AttentionRule, heads: LatentHeads, keys: Tensor) -> Tensor:
        """The same where all heads share what is cached, which begins with what values are made of."""
        visible = self._decode_visible[rule.window]
        query, stored = heads.absorbed(slice(0, len(visible))), self._gather(keys, visible)
        read = _attend(rule, query.unsqueeze(1), stored, stored[..., : heads.rank], visible[:, None, None, :])
        return heads.values(read.squeeze(1))

    def _gather(self, paged: Tensor, visible: Tensor) -> Tensor:
        """[D, key/value heads, slots, head_dim], zeros where nothing is visible."""
        tokens = paged[self._batch.decode_block_tables].flatten(1, 2)  # [D, slots, key/value heads, head_dim]
        # A block keeps what its last owner wrote; zeros keep a NaN of theirs out of this row's sums.
        return tokens.masked_fill_(~visible[:, :, None, None], 0).transpose(1, 2)


def _prefill(
    rule: AttentionRule, row: PrefillRow, mask: Tensor | None, query: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """One request's chunk over everything the request has stored so far."""
    tokens, _, head_dim = query.shape
    grouped = query.reshape(tokens, keys.shape[2], -1, head_dim).permute(1, 2, 0, 3)  # [kv heads, shared by, T, dim]

    def gather(paged: Tensor) -> Tensor:
        return _stored(row, paged).transpose(0, 1).unsqueeze(1).expand(-1, grouped.shape[1], -1, -1)

    return _attend(rule, grouped, gather(keys), gather(values), mask).permute(2, 0, 1, 3).flatten(1, 2)


def _prefill_latent(
    rule: AttentionRule, row: PrefillRow, mask: Tensor | None, heads: LatentHeads, keys: Tensor
) -> Tensor:
    tokens, cached = slice(row.offset, row.offset + row.tokens), _stored(row, keys).squeeze(1)
    if heads.expanding_pays(row.tokens):
        query, key, value = heads.expanded(tokens, cached)
        return _attend(rule, query[None], key[None], value[None], mask)[0].transpose(0, 1)
    query = heads.absorbed(tokens).transpose(0, 1)
    shared = cached.expand(len(query), -1, -1)
    read = _attend(rule, query[None], shared[None], shared[None, ..., : heads.rank], mask)[0]
    return heads.values(read.transpose(0, 1))


def _stored(row: PrefillRow, paged: Tensor) -> Tensor:
    """What a request has stored, [context, key/value heads, head_dim]."""
    return paged[row.block_table].flatten(0, 1)[: row.context_len]


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
