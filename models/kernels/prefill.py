"""Attention of all of a batch's prompts in one launch, on CUDA: over blocks of the cache, or over rows side by side.

In rank processes. Chunks are cut into tiles of some tokens by all query heads that share a key/value head; which tokens
a tile has, and where its request's keys lie, stands in a table that is made once a batch and serves every layer. Tiles
with most to read begin first. Each reads its keys in turn, with the softmax kept online (FlashAttention-2, Dao, 2023,
section 3.1). models/prefill_attention.py is the plain reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.attention_rule import AttentionRule
from models.batch import ForwardBatch, PrefillRow
from models.prefill_attention import LatentHeads

_MADE_BYTES = 1 << 28  # of keys and values that are made at once, where a request needs no more


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a product is cut: rows (tokens by heads) of queries, keys read at once, and Triton's warps and stages."""

    rows: int
    keys: int
    warps: int
    stages: int


NARROW = Tiling(rows=128, keys=64, warps=8, stages=3)
WIDE = Tiling(rows=64, keys=64, warps=8, stages=2)  # of more than 128 numbers a value


@dataclass(frozen=True, slots=True)
class Parts:
    """What a layer reads, each part [.., .., numbers] with its numbers side by side: queries and keys are their first
    numbers and the rest. block_tokens: of the cache that keys and values are; 0 where they are rows by token."""

    query: Tensor
    query_rest: Tensor
    keys: Tensor
    keys_rest: Tensor
    values: Tensor
    block_tokens: int


class PagedPrefill:
    """A PrefillAttention of a batch on CUDA. tiling: None for what was found best."""

    def __init__(self, batch: ForwardBatch, tiling: Tiling | None = None) -> None:
        self._rows, self._tiling = batch.prefill, tiling
        self._tables: dict[tuple[int, int], Tensor] = {}
        self._groups: list[_Group] | None = None

    def __call__(self, rule: AttentionRule, query: Tensor, keys: Tensor, values: Tensor, output: Tensor) -> None:
        if not self._rows:
            return
        assert keys.is_contiguous() and values.is_contiguous(), "caches lie whole"
        first = _first_numbers(query.shape[-1])
        (query, query_rest), (all_keys, keys_rest) = _cut(query, first), _cut(keys.flatten(0, 1), first)
        parts = Parts(query, query_rest, all_keys, keys_rest, values.flatten(0, 1), keys.shape[1])

        def table(tokens: int) -> Tensor:
            places = [row.block_table.data_ptr() for row in self._rows]
            return tiles_of(self._rows, places, tokens, keys.device)

        _launch(rule, parts, output, self._tiling or best_tiling(values.shape[-1]), self._made(-1, table))

    def latent(self, rule: AttentionRule, heads: LatentHeads, keys: Tensor, output: Tensor) -> None:
        """Keys and values of heads are made for chunks of any length, for some requests at a time."""
        if not self._rows:
            return
        if self._groups is None:
            token_bytes = output.shape[1] * (heads.plain.shape[-1] + output.shape[-1]) * output.element_size()
            self._groups = grouped(self._rows, keys.shape[1], max(1, _MADE_BYTES // token_bytes))
        for number, group in enumerate(self._groups):
            cached = keys[group.blocks].flatten(0, 1)  # [tokens, 1, cached numbers]
            plain, values = heads.made(cached[:, 0, : heads.rank])
            keys_rest = cached[..., heads.rank :].expand(-1, plain.shape[1], -1)
            parts = Parts(heads.plain, heads.rotated, plain, keys_rest, values, 0)

            def table(tokens: int, group: _Group = group) -> Tensor:
                return tiles_of(group.rows, group.starts, tokens, keys.device)

            _launch(rule, parts, output, self._tiling or best_tiling(values.shape[-1]), self._made(number, table))

    def _made(self, number: int, table: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
        """The table, made once for a number of tokens of a tile."""

        def made(tokens: int) -> Tensor:
            if (number, tokens) not in self._tables:
                self._tables[number, tokens] = table(tokens)
            return self._tables[number, tokens]

        return made


@dataclass(frozen=True, slots=True)
class _Group:
    """Requests whose stored tokens lie side by side once they are gathered: each request's begin at its start."""

    rows: Sequence[PrefillRow]
    starts: Sequence[int]
    blocks: Tensor


def grouped(rows: Sequence[PrefillRow], block_tokens: int, most_tokens: int) -> list[_Group]:
    """Neighbours together, while no more than so many tokens are stored; one alone may have more."""
    parts: list[list[PrefillRow]] = []
    stored = 0
    for row in rows:
        tokens = _blocks(row, block_tokens) * block_tokens
        if not parts or stored + tokens > most_tokens:
            parts.append([])
            stored = 0
        parts[-1].append(row)
        stored += tokens
    groups = []
    for part in parts:
        counts = [_blocks(row, block_tokens) for row in part]
        starts = [sum(counts[:number]) * block_tokens for number in range(len(part))]
        tables = [row.block_table[:count] for row, count in zip(part, counts, strict=True)]
        groups.append(_Group(part, starts, torch.cat(tables)))
    return groups


def _blocks(row: PrefillRow, block_tokens: int) -> int:
    return -(-row.context_len // block_tokens)


def tiles_of(rows: Sequence[PrefillRow], places: Sequence[int], tokens: int, device: torch.device) -> Tensor:
    """[tiles, 4] int64: the place of its request, its first token in the batch, how many it has, and the position of
    the first. Those with most to read first: the last ones to end are short."""
    tiles = [
        (place, row.offset + start, min(tokens, row.tokens - start), row.context_len - row.tokens + start)
        for row, place in zip(rows, places, strict=True)
        for start in range(0, row.tokens, tokens)
    ]
    table = torch.tensor(sorted(tiles, key=lambda tile: -tile[3]), dtype=torch.int64)
    return (table.pin_memory() if device.type == "cuda" else table).to(device, non_blocking=True)


def best_tiling(value_dim: int) -> Tiling:
    return NARROW if value_dim <= 128 else WIDE


def _first_numbers(dim: int) -> int:
    """The greatest power of two that a head has numbers for; tensor cores take no fewer than 16."""
    return max(16, 1 << (dim.bit_length() - 1))


def _cut(heads: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """The first numbers and the rest; if there is none, any tensor stands for it."""
    return (heads[..., :first], heads[..., first:]) if heads.shape[-1] > first else (heads, heads)


def _launch(rule: AttentionRule, parts: Parts, output: Tensor, tiling: Tiling, table: Callable[[int], Tensor]) -> None:
    heads, value_dim = output.shape[1:]
    kv_heads, first = parts.values.shape[1], parts.query.shape[-1]
    rest = parts.query_rest.shape[-1] if parts.query_rest is not parts.query else 0
    sharing = heads // kv_heads
    at_once = max(tiling.rows, triton.next_power_of_2(sharing))
    tokens = at_once // sharing
    tiles = table(tokens)
    given = (parts.query, parts.query_rest, parts.keys, parts.keys_rest, parts.values)
    assert all(part.stride(-1) == 1 for part in given) and output.is_contiguous(), "numbers lie side by side"
    _attend[kv_heads, len(tiles)](
        *given,
        *(output, tiles, *(stride for part in given for stride in part.stride()[:2])),
        *(rule.scale, rule.window or 0, rule.cap, rule.window is not None, sharing, parts.block_tokens),
        *(first, triton.next_power_of_2(max(first, 16)), rest, triton.next_power_of_2(max(rest, 16)), value_dim),
        *(triton.next_power_of_2(max(value_dim, 16)), at_once, tiling.keys),
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )


@triton.jit
def _bent(products, scale, CAP: tl.constexpr):
    """CAP * tanh(products * scale / CAP), for powers of two. tanh(x) = 1 - 2 / (exp(2 x) + 1)"""
    LOG2_E: tl.constexpr = 1.4426950408889634
    return (1 - 2 / (tl.exp2(products * (scale / CAP * 2 * LOG2_E)) + 1)) * (CAP * LOG2_E)


@triton.jit
def _numbers(read, number, stored, COUNT: tl.constexpr, UP: tl.constexpr, MASKED: tl.constexpr):
    """[KEYS, UP]: COUNT numbers of each key, zeros behind them and where nothing is stored."""
    if MASKED:
        made = tl.load(read + number, mask=stored & (number < COUNT), other=0.0)
    elif COUNT < UP:
        made = tl.load(read + number, mask=number[None, :] < COUNT, other=0.0)
    else:
        made = tl.load(read + number)
    return made


@triton.jit
def _read(
    highest, total, sums, asks, asks_rest, at, keys, keys_rest, values, place, begin, end,
    k_far, kr_far, v_far, scale, window, MASKED: tl.constexpr, CAP: tl.constexpr, WINDOWED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, FIRST: tl.constexpr, FIRST_UP: tl.constexpr, REST: tl.constexpr, REST_UP: tl.constexpr,
    VALUE: tl.constexpr, VALUE_UP: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Keys of the request from begin to end; unless MASKED, every row of the tile sees all of them."""
    number, rest, value_number = tl.arange(0, FIRST_UP), tl.arange(0, REST_UP), tl.arange(0, VALUE_UP)
    for start in range(begin, end, KEYS):
        token = start + tl.arange(0, KEYS)
        stored = token < end
        if BLOCK_TOKENS > 0:
            table = place.to(tl.pointer_type(tl.int64)) + token // BLOCK_TOKENS
            block = tl.load(table, mask=stored, other=0) if MASKED else tl.load(table)
            where = (block * BLOCK_TOKENS + token % BLOCK_TOKENS)[:, None]
        else:
            where = (place + token)[:, None]
        key = _numbers(keys + where * k_far, number, stored[:, None], FIRST, FIRST_UP, MASKED)
        products = tl.dot(asks, tl.trans(key))
        if REST > 0:
            key_rest = _numbers(keys_rest + where * kr_far, rest, stored[:, None], REST, REST_UP, MASKED)
            products = tl.dot(asks_rest, tl.trans(key_rest), products)
        factor = scale * 1.4426950408889634  # of log2(e)
        if CAP is not None:
            products, factor = _bent(products, scale, CAP), 1.0
        if MASKED:
            seen = token[None, :] <= at[:, None]
            if WINDOWED:
                seen = seen & (token[None, :] > at[:, None] - window)
            products = tl.where(seen, products, float("-inf"))
        higher = tl.maximum(highest, tl.max(products, 1) * factor)
        weights = tl.exp2(products * factor - higher[:, None])
        fade = tl.exp2(highest - higher)
        total = total * fade + tl.sum(weights, 1)
        highest = higher
        value = _numbers(values + where * v_far, value_number, stored[:, None], VALUE, VALUE_UP, MASKED)
        sums = tl.dot(weights.to(value.dtype), value, sums * fade[:, None])
    return highest, total, sums


@triton.jit(do_not_specialize=["window"])
def _attend(
    query, query_rest, keys, keys_rest, values, output, tiles,
    q_far, q_near, qr_far, qr_near, k_far, k_near, kr_far, kr_near, v_far, v_near,
    scale, window, CAP: tl.constexpr, WINDOWED: tl.constexpr, SHARING: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    FIRST: tl.constexpr, FIRST_UP: tl.constexpr, REST: tl.constexpr, REST_UP: tl.constexpr,
    VALUE: tl.constexpr, VALUE_UP: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A tile of tokens by the query heads that share a key/value head. far: to the next token, near: to the next
    head."""
    shared, tile = tl.program_id(0), tiles + tl.program_id(1) * 4
    place, first = tl.load(tile), tl.load(tile + 1)
    count, position = tl.load(tile + 2).to(tl.int32), tl.load(tile + 3).to(tl.int32)
    member = tl.arange(0, ROWS)
    token, head = member // SHARING, shared * SHARING + member % SHARING
    held, at = (token < count)[:, None], position + tl.minimum(token, count - 1)
    number, rest, value_number = tl.arange(0, FIRST_UP), tl.arange(0, REST_UP), tl.arange(0, VALUE_UP)
    batch_token = (first + token)[:, None]
    asks = query + batch_token * q_far + head[:, None] * q_near + number
    asks = tl.load(asks, mask=held & (number < FIRST), other=0.0)
    asks_rest = asks
    if REST > 0:
        asks_rest = query_rest + batch_token * qr_far + head[:, None] * qr_near + rest
        asks_rest = tl.load(asks_rest, mask=held & (rest < REST), other=0.0)
    # Less than any score, and a number: a row that sees nothing yet has weights of 0.
    highest = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, VALUE_UP], tl.float32)
    end = position + count
    begin, masked_from = 0, (position + 1) // KEYS * KEYS
    if WINDOWED:
        begin = tl.maximum(position - window + 1, 0) // KEYS * KEYS
        masked_from = begin
    keys, keys_rest, values = keys + shared * k_near, keys_rest + shared * kr_near, values + shared * v_near
    if not WINDOWED:
        highest, total, sums = _read(
            highest, total, sums, asks, asks_rest, at, keys, keys_rest, values, place, begin, masked_from,
            k_far, kr_far, v_far, scale, window, False, CAP, WINDOWED,
            BLOCK_TOKENS, FIRST, FIRST_UP, REST, REST_UP, VALUE, VALUE_UP, KEYS,
        )  # fmt: skip
    highest, total, sums = _read(
        highest, total, sums, asks, asks_rest, at, keys, keys_rest, values, place, masked_from, end,
        k_far, kr_far, v_far, scale, window, True, CAP, WINDOWED,
        BLOCK_TOKENS, FIRST, FIRST_UP, REST, REST_UP, VALUE, VALUE_UP, KEYS,
    )  # fmt: skip
    heads = tl.num_programs(0) * SHARING
    where = (batch_token * heads + head[:, None]) * VALUE + value_number
    tl.store(output + where, (sums / total[:, None]).to(output.dtype.element_ty), mask=held & (value_number < VALUE))
