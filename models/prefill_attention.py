"""Attention of prompts: each chunk over everything that its request has stored, itself included.

In rank processes. What reads the blocks is chosen once a forward pass: a kernel for all chunks at once where there is
one for the device, and else torch, chunk by chunk over blocks that are gathered, which is the reference. Query heads
that share a key/value head are attended together, so keys and values are never repeated in memory. Nothing here waits
for the device.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from models.attention_rule import AttentionRule, attend
from models.batch import ForwardBatch, PrefillRow
from parallel import kernels


class LatentHeads(Protocol):
    """A batch's queries where keys and values of all heads are made of one vector a token, which is what is cached.

    rank: so many of its numbers, the first, make values. plain and rotated [T, heads, ..]: the parts of queries.
    """

    @property
    def rank(self) -> int: ...
    @property
    def plain(self) -> Tensor: ...
    @property
    def rotated(self) -> Tensor: ...

    def absorbed(self, tokens: slice) -> Tensor:
        """[T, heads, cached numbers]: their products with what is cached are the queries' with the heads' keys."""
        ...

    def values(self, read: Tensor) -> Tensor:
        """What heads read of what is cached, [T, heads, rank], as their values: [T, heads, value_dim]."""
        ...

    def expanding_pays(self, tokens: int) -> bool:
        """Whether so many queries of a chunk are answered sooner by keys and values of heads."""
        ...

    def made(self, compressed: Tensor) -> tuple[Tensor, Tensor]:
        """compressed [context, rank] -> the plain part of keys [context, heads, plain_dim], and values."""
        ...

    def expanded(self, tokens: slice, cached: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """cached [context, cached numbers] -> queries [heads, T, head_dim], keys [heads, context, head_dim], values."""
        ...


class PrefillAttention(Protocol):
    """What a batch's chunks of prompts read of a layer's cache. output [T, heads, value_dim], whole: their rows of it
    are written."""

    def __call__(self, rule: AttentionRule, query: Tensor, keys: Tensor, values: Tensor, output: Tensor) -> None:
        """query [T, heads, head_dim]; keys and values [blocks, block_tokens, key/value heads, head_dim]."""
        ...

    def latent(self, rule: AttentionRule, heads: LatentHeads, keys: Tensor, output: Tensor) -> None:
        """keys [blocks, block_tokens, 1, cached numbers]."""
        ...


def prefill_attention(batch: ForwardBatch, keys: Tensor, windows: Iterable[int | None]) -> PrefillAttention:
    """Of a batch over such a cache. windows: all that the layers' rules have."""
    if kernels.can_run(keys.device) and keys.dtype in kernels.DTYPES:
        from models.kernels.prefill import PagedPrefill

        return PagedPrefill(batch)
    return GatheredPrefill(batch, windows)


class GatheredPrefill:
    """Gathers each request's blocks, then attends its chunk with torch's scaled_dot_product_attention."""

    def __init__(self, batch: ForwardBatch, windows: Iterable[int | None]) -> None:
        self._rows = batch.prefill
        self._masks = {window: [_causal_mask(row, window) for row in batch.prefill] for window in windows}

    def __call__(self, rule: AttentionRule, query: Tensor, keys: Tensor, values: Tensor, output: Tensor) -> None:
        for row, mask in zip(self._rows, self._masks[rule.window], strict=True):
            tokens = slice(row.offset, row.offset + row.tokens)
            output[tokens] = _of_heads(rule, row, mask, query[tokens], keys, values)

    def latent(self, rule: AttentionRule, heads: LatentHeads, keys: Tensor, output: Tensor) -> None:
        """Long chunks make keys and values of heads first."""
        for row, mask in zip(self._rows, self._masks[rule.window], strict=True):
            output[row.offset : row.offset + row.tokens] = _of_latent(rule, row, mask, heads, keys)


def _of_heads(
    rule: AttentionRule, row: PrefillRow, mask: Tensor | None, query: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """One request's chunk over everything the request has stored so far."""
    tokens, _, head_dim = query.shape
    grouped = query.reshape(tokens, keys.shape[2], -1, head_dim).permute(1, 2, 0, 3)  # [kv heads, shared by, T, dim]

    def gather(paged: Tensor) -> Tensor:
        return _stored(row, paged).transpose(0, 1).unsqueeze(1).expand(-1, grouped.shape[1], -1, -1)

    return attend(rule, grouped, gather(keys), gather(values), mask).permute(2, 0, 1, 3).flatten(1, 2)


def _of_latent(rule: AttentionRule, row: PrefillRow, mask: Tensor | None, heads: LatentHeads, keys: Tensor) -> Tensor:
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
