"""Attention over the paged key/value cache: new keys and values are stored, then decode rows and prompts read.

In rank processes, one object per forward pass: what depends on the batch alone is made once and serves every layer.
Prompts are read with torch's scaled_dot_product_attention; query heads that share a key/value head are attended
together, so keys and values are never repeated in memory. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from models.attention_rule import AttentionRule, attend
from models.batch import ForwardBatch, PrefillRow
from models.decode_attention import decode_attention


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


@dataclass(frozen=True, slots=True)
class Places:
    """Where a batch's tokens are kept: keys and values of a layer's cache, as PagedCache has them, and slots [T], which
    count their tokens. values: None where keys begin with them."""

    keys: Tensor
    values: Tensor | None
    slots: Tensor

    def put(self, key: Tensor, value: Tensor | None = None) -> None:
        """key and value [T, key/value heads, head_dim]."""
        self.keys.flatten(0, 1).index_copy_(0, self.slots, key)
        if self.values is not None and value is not None:
            self.values.flatten(0, 1).index_copy_(0, self.slots, value)


class PagedAttention:
    """Attention of one batch. Of each layer first all that is new must be put in its places, then it is read.

    windows: all that the layers' rules have.
    """

    def __init__(self, batch: ForwardBatch, cache: PagedCache, windows: Iterable[int | None]) -> None:
        self._batch = batch
        self._cache = cache
        windows = frozenset(windows)
        self._decode = decode_attention(batch, cache.block_tokens, cache.keys[0], windows)
        self._prefill_masks = {window: [_causal_mask(row, window) for row in batch.prefill] for window in windows}

    def places(self, layer: int) -> Places:
        """Of the batch's tokens."""
        values = self._cache.values[layer] if self._cache.values else None
        return Places(self._cache.keys[layer], values, self._batch.slot_mapping)

    def __call__(self, layer: int, rule: AttentionRule, query: Tensor) -> Tensor:
        """query [T, heads, head_dim] -> [T, heads, head_dim]."""
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        decoded = self._batch.num_decode_rows
        if decoded and not self._batch.prefill:
            return self._decode(rule, query, keys, values)
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        if decoded:
            output[:decoded] = self._decode(rule, query[:decoded], keys, values)
        for row, mask in zip(self._batch.prefill, self._prefill_masks[rule.window], strict=True):
            tokens = slice(row.offset, row.offset + row.tokens)
            output[tokens] = _prefill(rule, row, mask, query[tokens], keys, values)
        return output

    def latent(self, layer: int, rule: AttentionRule, heads: LatentHeads) -> Tensor:
        """-> [T, heads, value_dim].

        Decode rows read what is cached as it is; long chunks of prompts make keys and values of heads of it first.
        """
        keys, decoded = self._cache.keys[layer], self._batch.num_decode_rows
        query = heads.absorbed(slice(0, decoded))
        read = heads.values(self._decode(rule, query, keys, keys[..., : heads.rank]))
        if not self._batch.prefill:
            return read
        output = read.new_empty(self._batch.tokens, *read.shape[1:])
        output[:decoded] = read
        for row, mask in zip(self._batch.prefill, self._prefill_masks[rule.window], strict=True):
            tokens = slice(row.offset, row.offset + row.tokens)
            output[tokens] = _prefill_latent(rule, row, mask, heads, keys)
        return output


def _prefill(
    rule: AttentionRule, row: PrefillRow, mask: Tensor | None, query: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """One request's chunk over everything the request has stored so far."""
    tokens, _, head_dim = query.shape
    grouped = query.reshape(tokens, keys.shape[2], -1, head_dim).permute(1, 2, 0, 3)  # [kv heads, shared by, T, dim]

    def gather(paged: Tensor) -> Tensor:
        return _stored(row, paged).transpose(0, 1).unsqueeze(1).expand(-1, grouped.shape[1], -1, -1)

    return attend(rule, grouped, gather(keys), gather(values), mask).permute(2, 0, 1, 3).flatten(1, 2)


def _prefill_latent(
    rule: AttentionRule, row: PrefillRow, mask: Tensor | None, heads: LatentHeads, keys: Tensor
) -> Tensor:
    tokens, cached = slice(row.offset, row.offset + row.tokens), _stored(row, keys).squeeze(1)
    if heads.expanding_pays(row.tokens):
        query, key, value = heads.expanded(tokens, cached)
        return attend(rule, query[None], key[None], value[None], mask)[0].transpose(0, 1)
    query = heads.absorbed(tokens).transpose(0, 1)
    shared = cached.expand(len(query), -1, -1)
    read = attend(rule, query[None], shared[None], shared[None, ..., : heads.rank], mask)[0]
    return heads.values(read.transpose(0, 1))


def _stored(row: PrefillRow, paged: Tensor) -> Tensor:
    """What a request has stored, [context, key/value heads, head_dim]."""
    return paged[row.block_table].flatten(0, 1)[: row.context_len]


def _causal_mask(row: PrefillRow, window: int | None) -> Tensor | None:
    """[tokens, context]: what each token sees. None for a whole prompt within the window, which is plainly causal."""
    if row.tokens == row.context_len and (window is None or row.tokens <= window):
        return None
    before = row.context_len - row.tokens
    seen = torch.ones(row.tokens, row.context_len, dtype=torch.bool, device=row.block_table.device).tril(before)
    return seen if window is None else seen.triu(before - window + 1)
