"""What stands between a product and attention, on CUDA, in one launch: norms, rotations, the store of keys and values.

In rank processes. A program has some heads of one token: of queries, which it writes side by side, or of keys or
values, which it writes where the cache has the token's. What is rounded, and when, is as in models/layers.py and
models/latent_attention.py, which are the reference.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from models.attention import Places
from models.layers import RMSNorm, Rotation

_AT_ONCE = 8  # heads of a program


def place_heads(
    heads: Tensor, query_norm: RMSNorm | None, key_norm: RMSNorm | None, rotation: Rotation, places: Places
) -> Tensor:
    """heads [T, query heads + 2 * kv_heads, head_dim], whole: queries, keys, values -> queries, normalized and rotated.

    Keys, normalized and rotated too, and values go to their places. There are both norms, alike but for weights, or
    neither.
    """
    tokens, every, dim = heads.shape
    kv_heads = places.keys.shape[2]
    query_heads = every - 2 * kv_heads
    query = heads.new_empty(tokens, query_heads, dim)
    if tokens:
        norms: tuple[Tensor | None, Tensor | None, float, bool] = (None, None, 0.0, False)
        if query_norm is not None and key_norm is not None:
            norms = (query_norm.weight, key_norm.weight, query_norm.epsilon, query_norm.from_one)
        tiles = triton.cdiv(query_heads, _AT_ONCE) + 2 * triton.cdiv(kv_heads, _AT_ONCE)
        _place_heads[tokens, tiles](
            *(heads, *_angles(rotation), places.slots, query, places.keys, places.values, *norms),
            *(query_heads, kv_heads, dim, rotation.cos.shape[-1], rotation.interleaved, _AT_ONCE),
            num_warps=2,
        )
    return query


def place_latent(query: Tensor, made: Tensor, norm: RMSNorm, rotation: Rotation, places: Places) -> Tensor:
    """query [T, heads, head_dim], whole, of which the last rotary_dim numbers turn -> these, [T, heads, rotary_dim].

    made [T, rank + rotary_dim], whole: the first are normalized, the others turned, and both go to their places.
    """
    tokens, heads, head_dim = query.shape
    turning = rotation.cos.shape[-1]
    turned = query.new_empty(tokens, heads, turning)
    if tokens:
        _place_latent[tokens, 1 + triton.cdiv(heads, _AT_ONCE)](
            *(query, made, *_angles(rotation), places.slots, turned, places.keys),
            *(norm.weight, norm.epsilon, norm.from_one),
            *(heads, head_dim, len(norm.weight), turning, rotation.interleaved, _AT_ONCE),
            num_warps=2,
        )
    return turned


def _angles(rotation: Rotation) -> tuple[Tensor, Tensor]:
    return rotation.cos.contiguous(), rotation.sin.contiguous()


@triton.jit
def _place_heads(
    heads, cos, sin, slots, query, keys, values, query_weight, key_weight, epsilon, FROM_ONE: tl.constexpr,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, TURNING: tl.constexpr,
    INTERLEAVED: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    QUERY_TILES: tl.constexpr = (HEADS + AT_ONCE - 1) // AT_ONCE
    KV_TILES: tl.constexpr = (KV_HEADS + AT_ONCE - 1) // AT_ONCE
    token, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    read = heads + token * (HEADS + 2 * KV_HEADS) * DIM
    if tile < QUERY_TILES:
        head = tile * AT_ONCE + tl.arange(0, AT_ONCE)
        write = query + token * HEADS * DIM
        _turn(
            *(read, write, query_weight, cos, sin, token, head, HEADS, epsilon, FROM_ONE),
            *(DIM, DIM, DIM, TURNING, INTERLEAVED),
        )
    elif tile < QUERY_TILES + KV_TILES:
        head = (tile - QUERY_TILES) * AT_ONCE + tl.arange(0, AT_ONCE)
        write = keys + tl.load(slots + token) * KV_HEADS * DIM
        _turn(
            *(read + HEADS * DIM, write, key_weight, cos, sin, token, head, KV_HEADS, epsilon, FROM_ONE),
            *(DIM, DIM, DIM, TURNING, INTERLEAVED),
        )
    else:
        head = (tile - QUERY_TILES - KV_TILES) * AT_ONCE + tl.arange(0, AT_ONCE)
        number = tl.arange(0, triton.next_power_of_2(DIM))
        where, held = head[:, None] * DIM + number, (head < KV_HEADS)[:, None] & (number < DIM)
        value = tl.load(read + (HEADS + KV_HEADS) * DIM + where, mask=held, other=0.0)
        tl.store(values + tl.load(slots + token) * KV_HEADS * DIM + where, value, mask=held)


@triton.jit
def _place_latent(
    query, made, cos, sin, slots, turned, keys, weight, epsilon, FROM_ONE: tl.constexpr,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, RANK: tl.constexpr, TURNING: tl.constexpr,
    INTERLEAVED: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    token, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tile == 0:
        read, write = made + token * (RANK + TURNING), keys + tl.load(slots + token) * (RANK + TURNING)
        number = tl.arange(0, triton.next_power_of_2(RANK))
        wide = tl.load(read + number, mask=number < RANK, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(wide * wide, 0) / RANK + epsilon)
        made_of = _scaled(wide, scale, weight + number, number < RANK, write.dtype.element_ty, FROM_ONE)
        tl.store(write + number, made_of.to(write.dtype.element_ty), mask=number < RANK)
        _turn(
            *(read + RANK, write + RANK, None, cos, sin, token, tl.arange(0, 1), 1, epsilon, FROM_ONE),
            *(TURNING, TURNING, TURNING, TURNING, INTERLEAVED),
        )
    else:
        head = (tile - 1) * AT_ONCE + tl.arange(0, AT_ONCE)
        _turn(
            *(query + token * HEADS * HEAD_DIM + HEAD_DIM - TURNING, turned + token * HEADS * TURNING, None),
            *(cos, sin, token, head, HEADS, epsilon, FROM_ONE, HEAD_DIM, TURNING, TURNING, TURNING, INTERLEAVED),
        )


@triton.jit
def _turn(
    read, write, weight, cos, sin, token, head, HELD: tl.constexpr, epsilon, FROM_ONE: tl.constexpr,
    READ_APART: tl.constexpr, WRITE_APART: tl.constexpr, DIM: tl.constexpr, TURNING: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Heads of a token, normalized where there is a weight, then rotated: pairs, and the numbers that stay."""
    HALF: tl.constexpr = TURNING // 2
    DTYPE: tl.constexpr = write.dtype.element_ty
    pair = tl.arange(0, triton.next_power_of_2(HALF))
    read, write = read + head[:, None] * READ_APART, write + head[:, None] * WRITE_APART
    first_at, second_at = (2 * pair, 2 * pair + 1) if INTERLEAVED else (pair, pair + HALF)
    staying_at = TURNING + tl.arange(0, triton.next_power_of_2(max(DIM - TURNING, 1)))
    held = (head < HELD)[:, None]
    inside = held & (pair < HALF)
    # What all heads share is read by each as its own numbers are, or it would be passed between threads.
    shared = 0 * head[:, None]
    first = tl.load(read + first_at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(read + second_at, mask=inside, other=0.0).to(tl.float32)
    staying = tl.zeros([head.shape[0], staying_at.shape[0]], tl.float32)
    if TURNING < DIM:
        staying = tl.load(read + staying_at, mask=held & (staying_at < DIM), other=0.0).to(tl.float32)
    if weight is not None:
        squares = tl.sum(first * first, 1) + tl.sum(second * second, 1) + tl.sum(staying * staying, 1)
        scale = tl.rsqrt(squares / DIM + epsilon)[:, None]
        first = _scaled(first, scale, weight + shared + first_at, inside, DTYPE, FROM_ONE)
        second = _scaled(second, scale, weight + shared + second_at, inside, DTYPE, FROM_ONE)
        staying = _scaled(staying, scale, weight + shared + staying_at, held & (staying_at < DIM), DTYPE, FROM_ONE)
    precision = cos.dtype.element_ty
    first, second = first.to(precision).to(tl.float32), second.to(precision).to(tl.float32)
    for half in tl.static_range(2):
        at = token * TURNING + half * HALF + pair + shared
        along = tl.load(cos + at, mask=inside, other=0.0).to(tl.float32)
        across = tl.load(sin + at, mask=inside, other=0.0).to(tl.float32)
        own, other = (first, -second) if half == 0 else (second, first)
        # Rounded after each step, as one operation after the other rounds.
        turned = (own * along).to(precision).to(tl.float32) + (other * across).to(precision).to(tl.float32)
        tl.store(write + half * HALF + pair, turned.to(precision).to(DTYPE), mask=inside)
    if TURNING < DIM:
        tl.store(write + staying_at, staying.to(DTYPE), mask=held & (staying_at < DIM))


@triton.jit
def _scaled(part, scale, weights, inside, DTYPE: tl.constexpr, FROM_ONE: tl.constexpr):
    """Numbers of a norm, rounded to the dtype, in float32."""
    weights = tl.load(weights, mask=inside, other=0.0).to(tl.float32)
    normalized = part * scale
    made = normalized * (1.0 + weights) if FROM_ONE else normalized.to(DTYPE).to(tl.float32) * weights
    return made.to(DTYPE).to(tl.float32)
