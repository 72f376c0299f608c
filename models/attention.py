"""Attention over the paged key/value cache: new keys and values are stored, then decode rows and prompts read.

In rank processes, one object per forward pass: what depends on the batch alone is made once and serves every layer.
How they read is chosen beside it, for each kind of rows. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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
        self._prefill = prefill_attention(batch, cache.keys[0], windows)

    def places(self, layer: int) -> Places:
        """Of the batch's tokens."""
        values = self._cache.values[layer] if self._cache.values else None
        return Places(self._cache.keys[layer], values, self._batch.slot_mapping)

    def __call__(self, layer: int, rule: AttentionRule, query: Tensor) -> Tensor:
        """query [T, heads, head_dim] -> [T, heads, head_dim]."""
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        decoded = self._batch.num_decode_rows
        if not self._batch.prefill:
            return self._decode(rule, query, keys, values)
        output = query.new_empty(*query.shape[:2], values.shape[-1])
        if decoded:
            output[:decoded] = self._decode(rule, query[:decoded], keys, values)
        self._prefill(rule, query, keys, values, output)
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
        self._prefill.latent(rule, heads, keys, output)
        return output
