"""Attention over the paged key/value cache: new keys and values are stored, then decode rows and prompts read.

In rank processes, one object per forward pass: what depends on the batch alone is made once and serves every layer.
How they read is chosen beside it, for each kind of rows. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from torch import Tensor

from models.attention_rule import AttentionRule
from models.batch import ForwardBatch
from models.decode_attention import decode_attention
from models.prefill_attention import LatentHeads, prefill_attention


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


class PagedAttention:
    """Attention of one batch. Call it once per layer: it stores the new keys and values, then reads.

    windows: all that the layers' rules have.
    """

    def __init__(self, batch: ForwardBatch, cache: PagedCache, windows: Iterable[int | None]) -> None:
        self._batch = batch
        self._cache = cache
        windows = frozenset(windows)
        self._decode = decode_attention(batch, cache.block_tokens, cache.keys[0], windows)
        self._prefill = prefill_attention(batch, cache.keys[0], windows)

    def __call__(self, layer: int, rule: AttentionRule, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [T, heads, head_dim], key and value [T, key/value heads, head_dim] -> [T, heads, head_dim]."""
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        keys.flatten(0, 1).index_copy_(0, self._batch.slot_mapping, key)
        values.flatten(0, 1).index_copy_(0, self._batch.slot_mapping, value)
        decoded = self._batch.num_decode_rows
        if not self._batch.prefill:
            return self._decode(rule, query[:decoded], keys, values)
        output = query.new_empty(*query.shape[:2], values.shape[-1])
        if decoded:
            output[:decoded] = self._decode(rule, query[:decoded], keys, values)
        self._prefill(rule, query, keys, values, output)
        return output

    def latent(self, layer: int, rule: AttentionRule, heads: LatentHeads, key: Tensor) -> Tensor:
        """key [T, 1, cached numbers]: what is cached of each token -> [T, heads, value_dim].

        Decode rows read what is cached as it is; long chunks of prompts make keys and values of heads of it first.
        """
        keys, decoded = self._cache.keys[layer], self._batch.num_decode_rows
        keys.flatten(0, 1).index_copy_(0, self._batch.slot_mapping, key)
        query = heads.absorbed(slice(0, decoded))
        read = heads.values(self._decode(rule, query, keys, keys[..., : heads.rank]))
        if not self._batch.prefill:
            return read
        output = read.new_empty(len(key), *read.shape[1:])
        output[:decoded] = read
        self._prefill.latent(rule, heads, keys, output)
        return output
