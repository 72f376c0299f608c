"""Attention of decode rows straight from the blocks of the cache, on CUDA: for heads, and for a latent that all share.

In rank processes. Grids follow from shapes alone, and what a row has stored is read on the device: a launch waits for
nothing and fits a CUDA graph. Flash-decoding (Dao, Haziza, Massa, Sizov, 2023): a row's context is cut into pieces that
are read side by side, each with the softmax kept online (FlashAttention, 2022, algorithm 1), then joined by their
sums of exponentials. models/decode_attention.py is the plain reference.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.attention_rule import AttentionRule
from models.batch import ForwardBatch
from models.decode_attention import begin_keys

_NO_WINDOW = 2**31 - 1
_MOST_PIECES = 128  # a power of two
_FIXED_TILES = 2  # what a piece costs besides the tiles that it reads: its start, its end, and its part of joining
_MOST_PARTIAL_BYTES = 256 << 20  # what pieces leave to be joined: memory that no cache of blocks can have
_LEAST_HEADS = 16  # that tensor cores take
_ROOMY_BYTES = 228 << 10  # of shared memory, which a processor of Hopper has
_UNSPECIALIZED = ["window", "width", "pieces"]  # numbers that change between steps; each must not be compiled anew


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a kernel is cut: tokens read at once, most heads attended at once, and Triton's warps and stages.

    resident: programs that a processor holds at once, by their shared memory. least_tiles: of a piece.
    """

    tokens: int
    heads: int
    warps: int
    stages: int
    resident: int
    least_tiles: int = 2


# With fewer stages a program waits for what it reads before it multiplies; then programs beside it fill the time.
HEADS = Tiling(tokens=64, heads=16, warps=4, stages=5, resident=2)
LATENT = Tiling(tokens=32, heads=16, warps=4, stages=5, resident=2)
LATENT_MANY_HEADS = Tiling(tokens=32, heads=64, warps=8, stages=5, resident=1)
_CRAMPED_STAGES = 3  # where there is less shared memory; heads of 256 numbers then fit in 99 KiB


@dataclass(frozen=True, slots=True)
class PagedDecode:
    """A DecodeAttention. tables [D, W] and context_lens [D] int64; a length of 0, which pads a graph, counts as 1.

    processors: streaming multiprocessors of the device. tiling: None for what was found best. roomy: whether the device
    has the shared memory that this was found with.
    """

    tables: Tensor
    context_lens: Tensor
    processors: int
    tiling: Tiling | None = None
    roomy: bool = True

    @classmethod
    def of(cls, batch: ForwardBatch) -> PagedDecode:
        """Of a batch on CUDA."""
        tables = batch.decode_block_tables
        device = torch.cuda.get_device_properties(tables.device)
        roomy = device.shared_memory_per_multiprocessor >= _ROOMY_BYTES
        return cls(tables.contiguous(), batch.decode_context_lens, device.multi_processor_count, roomy=roomy)

    def __call__(self, rule: AttentionRule, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """As DecodeAttention has it: query [D, heads, key_dim] -> [D, heads, value_dim]."""
        shared, (rows, heads, key_dim), (_, block_tokens, kv_heads, value_dim) = (
            begin_keys(keys, values),
            query.shape,
            values.shape,
        )
        assert keys.is_contiguous() and (shared or values.is_contiguous()), "caches lie whole"
        output = query.new_empty(rows, heads, value_dim)
        if not rows:
            return output
        tiling = self.tiling or best_tiling(shared, heads // kv_heads, self.roomy)
        at_once = min(max(triton.next_power_of_2(heads // kv_heads), _LEAST_HEADS), tiling.heads)
        parts = kv_heads * triton.cdiv(heads // kv_heads, at_once)
        window, width = rule.window or _NO_WINDOW, self.tables.shape[1]
        tiles = triton.cdiv(min(width * block_tokens, window), tiling.tokens)
        most = max(1, min(_MOST_PIECES, _MOST_PARTIAL_BYTES // (output.numel() * 4)))
        pieces = pieces_of(rows * parts, tiles, self.processors * tiling.resident, tiling.least_tiles, most)
        partial = query.new_empty((rows, heads, pieces, value_dim) if pieces > 1 else 1, dtype=torch.float32)
        logs = query.new_empty((rows, heads, pieces), dtype=torch.float32)
        first = value_dim if shared else key_dim
        cut = {"TILE": tiling.tokens, "LEAST_TILES": tiling.least_tiles}
        _read_piece[parts, pieces, rows](
            *(query.contiguous(), keys, values, self.tables, self.context_lens, output, partial, logs),
            *(rule.scale, window, width, pieces, rule.cap, heads, kv_heads, block_tokens),
            *(first, key_dim - first, value_dim, shared, at_once),
            **cut,
            num_warps=tiling.warps,
            num_stages=tiling.stages,
        )
        if pieces > 1:
            pieced = (partial, logs, self.context_lens, output, window, pieces)
            _join_pieces[heads, rows](*pieced, heads, value_dim, _MOST_PIECES, **cut)
        return output


def best_tiling(shared: bool, sharing: int, roomy: bool) -> Tiling:
    """sharing: query heads of a key/value head."""
    if not roomy:
        return replace(LATENT if shared else HEADS, stages=_CRAMPED_STAGES)
    if not shared:
        return HEADS
    return LATENT if sharing <= LATENT.heads else LATENT_MANY_HEADS


@functools.lru_cache(maxsize=4096)  # every layer of a step asks the same
def pieces_of(programs: int, tiles: int, room: int, least_tiles: int, most: int = _MOST_PIECES) -> int:
    """How many pieces each context is cut into: the fewest that are read soonest, and no more than `most`.

    programs: of one piece each, of which the device runs `room` at once; tiles: of the longest context.
    """

    def rounds(pieces: int) -> int:
        return -(-programs * pieces // room) * (-(-tiles // pieces) + _FIXED_TILES)

    return min(range(1, max(1, min(most, tiles // least_tiles)) + 1), key=rounds)


@triton.jit
def _span(stored, window, pieces, TILE: tl.constexpr, LEAST_TILES: tl.constexpr):
    """The first token that a row sees, and how many tokens each of its pieces reads; a short row needs fewer pieces."""
    oldest = tl.maximum(stored - window, 0)
    tiles = tl.cdiv(stored - oldest, TILE)
    used = tl.minimum(pieces, tl.maximum(tiles // LEAST_TILES, 1))
    return oldest, tl.cdiv(tiles, used) * TILE


@triton.jit
def _slots(table, token, end, BLOCK_TOKENS: tl.constexpr):
    """Where a row's tokens before the end lie in the cache."""
    block = tl.load(table + token // BLOCK_TOKENS, mask=token < end, other=0).to(tl.int32)
    return (block * BLOCK_TOKENS + token % BLOCK_TOKENS).to(tl.int64)


@triton.jit
def _scores(products, scale, CAP: tl.constexpr):
    """Of products of queries and keys, for powers of two."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    if CAP is None:
        scores = products * (scale * LOG2_E)
    else:  # tanh(x) = 1 - 2 / (exp(2 x) + 1)
        scores = (1 - 2 / (tl.exp2(products * (scale / CAP * 2 * LOG2_E)) + 1)) * (CAP * LOG2_E)
    return scores


@triton.jit
def _faded(highest, total, scores):
    """The highest score so far, weights relative to it, and what fades all that was summed by a lower one."""
    higher = tl.maximum(highest, tl.max(scores, 0))
    weights = tl.exp2(scores - higher[None, :])
    fade = tl.exp2(highest - higher)
    return higher, total * fade[None, :] + weights, weights, fade


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _read_piece(
    query, keys, values, tables, context_lens, output, partial, logs, scale, window, width, pieces, CAP: tl.constexpr,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    FIRST: tl.constexpr, REST: tl.constexpr, VALUE: tl.constexpr, SHARED: tl.constexpr, AT_ONCE: tl.constexpr,
    TILE: tl.constexpr, LEAST_TILES: tl.constexpr,
):  # fmt: skip
    """One piece of a row's context, for AT_ONCE of the query heads that share a key/value head.

    Keys are FIRST numbers and REST more; SHARED: the first are the values. Scores stand as [TILE, heads], sums as
    [VALUE, heads]: tokens and numbers fill the rows of tensor cores, which a few heads would leave empty.
    """
    part, piece, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    SHARING: tl.constexpr = HEADS // KV_HEADS
    PARTS: tl.constexpr = (SHARING + AT_ONCE - 1) // AT_ONCE
    stored = tl.maximum(tl.load(context_lens + row).to(tl.int32), 1)
    oldest, length = _span(stored, window, pieces, TILE, LEAST_TILES)
    begin = oldest + piece * length
    end = tl.minimum(begin + length, stored)
    if begin >= end:
        return
    member = part % PARTS * AT_ONCE + tl.arange(0, AT_ONCE)
    head = row * HEADS + part // PARTS * SHARING + member
    number = tl.arange(0, triton.next_power_of_2(max(FIRST, 16)))  # tensor cores take no fewer
    rest = tl.arange(0, triton.next_power_of_2(max(REST, 16)))
    value_number = tl.arange(0, triton.next_power_of_2(max(VALUE, 16)))
    asks = query + head[:, None] * (FIRST + REST)
    asks_rest = tl.load(asks + FIRST + rest, mask=(member < SHARING)[:, None] & (rest < REST), other=0.0)
    asks = tl.load(asks + number, mask=(member < SHARING)[:, None] & (number < FIRST), other=0.0)
    highest = tl.full([AT_ONCE], float("-inf"), tl.float32)
    total = tl.zeros([TILE, AT_ONCE], tl.float32)  # by token of a tile, to be summed up once
    sums = tl.zeros([triton.next_power_of_2(max(VALUE, 16)), AT_ONCE], tl.float32)
    for first in range(begin, end, TILE):
        token = first + tl.arange(0, TILE)
        seen = (token < end)[:, None]
        place = (_slots(tables + row * width, token, end, BLOCK_TOKENS) * KV_HEADS + part // PARTS)[:, None]
        key = tl.load(keys + place * (FIRST + REST) + number, mask=seen & (number < FIRST), other=0.0)
        products = tl.dot(key, tl.trans(asks))
        value = key
        if REST > 0:
            key_rest = tl.load(keys + place * (FIRST + REST) + FIRST + rest, mask=seen & (rest < REST), other=0.0)
            products = tl.dot(key_rest, tl.trans(asks_rest), products)
        if not SHARED:
            value = tl.load(values + place * VALUE + value_number, mask=seen & (value_number < VALUE), other=0.0)
        scores = tl.where(seen, _scores(products, scale, CAP), float("-inf"))
        highest, total, weights, fade = _faded(highest, total, scores)
        sums = tl.dot(tl.trans(value), weights.to(value.dtype), sums * fade[None, :])
    weight = tl.sum(total, 0)
    _store(
        sums / weight[None, :], highest + tl.log2(weight), output, partial, logs, head, member < SHARING, pieces, VALUE
    )


@triton.jit
def _store(means, log, output, partial, logs, head, held, pieces, VALUE: tl.constexpr):
    """means [VALUE, heads]: the output, where a row's context is one piece."""
    number, where = tl.arange(0, triton.next_power_of_2(max(VALUE, 16)))[:, None], head * pieces + tl.program_id(1)
    numbered, stored = where[None, :] * VALUE + number, held[None, :] & (number < VALUE)
    if pieces == 1:
        tl.store(output + numbered, means.to(output.dtype.element_ty), mask=stored)
    else:
        tl.store(logs + where, log, mask=held)
        tl.store(partial + numbered, means, mask=stored)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _join_pieces(
    partial, logs, context_lens, output, window, pieces,
    HEADS: tl.constexpr, VALUE: tl.constexpr, MOST: tl.constexpr, TILE: tl.constexpr, LEAST_TILES: tl.constexpr,
):  # fmt: skip
    """A head's means of pieces, each weighted by its sum of exponentials, of which logs has the logarithm."""
    AT_ONCE: tl.constexpr = 8
    where, row = tl.program_id(1).to(tl.int64) * HEADS + tl.program_id(0), tl.program_id(1)
    stored = tl.maximum(tl.load(context_lens + row).to(tl.int32), 1)
    oldest, length = _span(stored, window, pieces, TILE, LEAST_TILES)
    used = tl.cdiv(stored - oldest, length)
    every, number = tl.arange(0, MOST), tl.arange(0, triton.next_power_of_2(VALUE))
    highest = tl.max(tl.load(logs + where * pieces + every, mask=every < used, other=float("-inf")), 0)
    total = tl.zeros([AT_ONCE], tl.float32)
    sums = tl.zeros([triton.next_power_of_2(VALUE)], tl.float32)
    for first in range(0, used, AT_ONCE):
        piece = first + tl.arange(0, AT_ONCE)
        log = tl.load(logs + where * pieces + piece, mask=piece < used, other=float("-inf"))
        held = (piece < used)[:, None] & (number < VALUE)
        means = tl.load(partial + (where * pieces + piece)[:, None] * VALUE + number, mask=held, other=0.0)
        weights = tl.exp2(log - highest)
        total += weights
        sums += tl.sum(weights[:, None] * means, 0)
    joined = sums / tl.sum(total, 0)
    tl.store(output + where * VALUE + number, joined.to(output.dtype.element_ty), mask=number < VALUE)
