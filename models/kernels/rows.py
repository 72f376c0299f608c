"""Norms, rotations and gates of rows on CUDA, one launch each, where plain torch takes many.

In rank processes. Decode is bound by launches, prompts by what is read and written between them. What is rounded, and
when, is as in models/layers.py, which is the reference: float32 inside a norm and a gate, the dtype of cosines and
sines in a rotation. Rows that are normed or rotated may lie apart, as parts of a wider product do; outputs lie whole.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_GATED_AT_ONCE = 1024


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, from_one: bool) -> Tensor:
    """x [..., dim] of 2 or 3 dims, the last one whole -> the same shape; weight [dim]. Source: RMSNorm (2019), eq. 4"""
    output = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, heads, far, near = _laid_out(x)
    if rows * heads:
        dim = x.shape[-1]
        _norm[(rows * heads,)](x, weight, output, far, near, heads, epsilon, from_one, dim, num_warps=_warps(dim))
    return output


def silu_and_multiply(gate_up: Tensor) -> Tensor:
    """gate_up [r, 2 * n], whole, gate first -> silu(gate) * up, [r, n]; each is rounded to the dtype."""
    assert gate_up.is_contiguous(), "rows lie whole"
    rows, width = len(gate_up), gate_up.shape[1] // 2
    output = gate_up.new_empty(rows, width)
    if rows:
        _gate[rows, triton.cdiv(width, _GATED_AT_ONCE)](gate_up, output, width, _GATED_AT_ONCE, num_warps=4)
    return output


def rotate(heads: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """heads [T, heads, head_dim], the last one whole; cos and sin [T, 1, rotary_dim] -> the same shape as heads.

    Source: RoFormer (2021), eq. 34. The numbers of a pair are half of rotary_dim apart; interleaved: neighbours, that
    come apart as they turn.
    """
    output = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
    rows, count, far, near = _laid_out(heads)
    if rows * count:
        dim, turning = heads.shape[-1], cos.shape[-1]
        _rotate[(rows * count,)](
            *(heads, cos.contiguous(), sin.contiguous(), output, far, near, count),
            turning,
            dim,
            interleaved,
            num_warps=1,
        )
    return output


def _laid_out(x: Tensor) -> tuple[int, int, int, int]:
    """Rows, heads of each, and how far apart rows and heads are."""
    assert x.stride(-1) == 1, "numbers of a row lie side by side"
    if x.dim() == 2:
        return x.shape[0], 1, x.stride(0), 0
    rows, heads, _ = x.shape
    return rows, heads, x.stride(0), x.stride(1)


def _warps(dim: int) -> int:
    return 8 if dim > 2048 else 4 if dim > 512 else 1


@triton.jit
def _norm(x, weight, output, far, near, heads, epsilon, FROM_ONE: tl.constexpr, DIM: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    number = tl.arange(0, triton.next_power_of_2(DIM))
    wide = tl.load(x + row // heads * far + row % heads * near + number, mask=number < DIM, other=0.0).to(tl.float32)
    scale = tl.load(weight + number, mask=number < DIM, other=0.0).to(tl.float32)
    normalized = wide * tl.rsqrt(tl.sum(wide * wide, 0) / DIM + epsilon)
    rounded = normalized.to(x.dtype.element_ty).to(tl.float32)
    made = normalized * (1.0 + scale) if FROM_ONE else rounded * scale
    tl.store(output + row * DIM + number, made.to(output.dtype.element_ty), mask=number < DIM)


@triton.jit
def _gate(gate_up, output, WIDTH: tl.constexpr, TILE: tl.constexpr):
    number = tl.program_id(1) * TILE + tl.arange(0, TILE)
    row, inside = tl.program_id(0).to(tl.int64), number < WIDTH
    gate = tl.load(gate_up + row * 2 * WIDTH + number, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * WIDTH + WIDTH + number, mask=inside, other=0.0).to(tl.float32)
    gated = (gate / (1 + tl.exp(-gate))).to(output.dtype.element_ty).to(tl.float32)
    tl.store(output + row * WIDTH + number, (gated * up).to(output.dtype.element_ty), mask=inside)


@triton.jit
def _rotate(
    x, cos, sin, output, far, near, heads, TURNING: tl.constexpr, DIM: tl.constexpr, INTERLEAVED: tl.constexpr
):  # fmt: skip
    """A pair a lane; what does not turn is copied."""
    HALF: tl.constexpr = TURNING // 2
    row = tl.program_id(0).to(tl.int64)
    read, angles = x + row // heads * far + row % heads * near, row // heads * TURNING
    write = output + row * DIM
    pair = tl.arange(0, triton.next_power_of_2(HALF))
    inside = pair < HALF
    first_at, second_at = (2 * pair, 2 * pair + 1) if INTERLEAVED else (pair, pair + HALF)
    precision = cos.dtype.element_ty
    first = tl.load(read + first_at, mask=inside, other=0.0).to(precision).to(tl.float32)
    second = tl.load(read + second_at, mask=inside, other=0.0).to(precision).to(tl.float32)
    for half in tl.static_range(2):
        at = angles + half * HALF + pair
        along = tl.load(cos + at, mask=inside, other=0.0).to(tl.float32)
        across = tl.load(sin + at, mask=inside, other=0.0).to(tl.float32)
        own, other = (first, -second) if half == 0 else (second, first)
        # Rounded after each step, as one operation after the other rounds.
        turned = (own * along).to(precision).to(tl.float32) + (other * across).to(precision).to(tl.float32)
        made = turned.to(precision).to(output.dtype.element_ty)
        tl.store(write + half * HALF + pair, made, mask=inside)
    if TURNING < DIM:
        staying = TURNING + tl.arange(0, triton.next_power_of_2(DIM - TURNING))
        tl.store(write + staying, tl.load(read + staying, mask=staying < DIM, other=0.0), mask=staying < DIM)
