"""Which experts a row passes through, on CUDA: two launches, where plain torch takes ten.

In rank processes. The first multiplies rows with the router's weights, in pieces of the inputs where rows are few, so
that all processors read; the second adds the pieces, turns scores into shares and chooses, a row a program. Sums are
float32, as bfloat16's products are exact there. Of equal scores the lowest expert is chosen. models/router.py is the
plain reference.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.routing import Groups

FEW_ROWS = 256  # up to so many, inputs are cut into pieces
_FEW = (16, 16)  # rows of a tile, and pieces
_MANY = (64, 1)
_INPUTS = 64  # read at once


@dataclass(frozen=True, slots=True)
class Choosing:
    """How scores become shares of the chosen experts.

    sigmoid: of each score by itself, else a softmax of all. groups: as in models/routing.py, judged by their best two
    experts with sigmoids, else by the best. rounds_scores: to the dtype, before; rounds_shares: behind. normalizes:
    shares are divided by their sum and least_sum, then scale multiplies them.
    """

    experts_per_token: int
    sigmoid: bool = False
    groups: Groups | None = None
    normalizes: bool = False
    least_sum: float = 0.0
    scale: float = 1.0
    rounds_scores: bool = False
    rounds_shares: bool = False


def route(rows: Tensor, weight: Tensor, correction: Tensor | None, choosing: Choosing) -> tuple[Tensor, Tensor]:
    """rows [m, hidden], weight [experts, hidden], correction [experts] float32, which is added to shares for the choice
    alone -> expert ids [m, k] int64 and shares [m, k] float32, the greatest first."""
    count, hidden = rows.shape
    experts, chosen = len(weight), choosing.experts_per_token
    ids = torch.empty(count, chosen, dtype=torch.int64, device=rows.device)
    shares = torch.empty(count, chosen, dtype=torch.float32, device=rows.device)
    if not count:
        return ids, shares
    tile, pieces = _FEW if count <= FEW_ROWS else _MANY
    partial = torch.empty(pieces, count, experts, dtype=torch.float32, device=rows.device)
    _score[triton.cdiv(count, tile), pieces](
        *(rows.contiguous(), weight, partial, count, hidden, experts),
        *(triton.next_power_of_2(max(experts, 16)), tile, pieces, _INPUTS),
        num_warps=4,
        num_stages=4,
    )
    groups = choosing.groups or Groups(1, 1)
    _choose[(count,)](
        *(partial, partial if correction is None else correction, rows, ids, shares, count),
        *(choosing.least_sum, choosing.scale, experts, groups.count, groups.chosen, chosen, pieces),
        *(correction is not None, choosing.sigmoid, choosing.normalizes),
        *(choosing.rounds_scores, choosing.rounds_shares),
        num_warps=1 if experts <= 128 else 4,
    )
    return ids, shares


@triton.jit(do_not_specialize=["count"])
def _score(
    rows, weight, partial, count,
    HIDDEN: tl.constexpr, EXPERTS: tl.constexpr, WIDTH: tl.constexpr,
    TILE: tl.constexpr, PIECES: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Products of a tile of rows over a piece of the inputs. Weights fill the rows of tensor cores."""
    PIECE: tl.constexpr = (HIDDEN + PIECES * AT_ONCE - 1) // (PIECES * AT_ONCE) * AT_ONCE
    piece = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    expert = tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH, TILE], tl.float32)
    for first in range(piece * PIECE, min(piece * PIECE + PIECE, HIDDEN), AT_ONCE):
        number = first + tl.arange(0, AT_ONCE)
        inside = number < HIDDEN
        held = tl.load(
            weight + expert[:, None] * HIDDEN + number[None, :],
            mask=(expert < EXPERTS)[:, None] & inside[None, :],
            other=0.0,
        )
        read = tl.load(
            rows + row[None, :] * HIDDEN + number[:, None], mask=(row < count)[None, :] & inside[:, None], other=0.0
        )
        total = tl.dot(held, read, total)
    put = partial + (piece * count + row[None, :]) * EXPERTS + expert[:, None]
    tl.store(put, total, mask=(row < count)[None, :] & (expert < EXPERTS)[:, None])


@triton.jit(do_not_specialize=["count"])
def _choose(
    partial, correction, rows, ids, shares, count, least_sum, scale,
    EXPERTS: tl.constexpr, GROUPS: tl.constexpr, CHOSEN_GROUPS: tl.constexpr, CHOSEN: tl.constexpr,
    PIECES: tl.constexpr, CORRECTED: tl.constexpr, SIGMOID: tl.constexpr, NORMALIZES: tl.constexpr,
    ROUNDS_SCORES: tl.constexpr, ROUNDS_SHARES: tl.constexpr,
):  # fmt: skip
    """Of a row. Experts lie in a rectangle of groups, whose sides are powers of two."""
    SIZE: tl.constexpr = EXPERTS // GROUPS
    HIGH: tl.constexpr = triton.next_power_of_2(GROUPS)
    WIDE: tl.constexpr = triton.next_power_of_2(SIZE)
    row = tl.program_id(0).to(tl.int64)
    group, member = tl.arange(0, HIGH)[:, None], tl.arange(0, WIDE)[None, :]
    held = (group < GROUPS) & (member < SIZE)
    expert = group * SIZE + member
    piece = tl.arange(0, PIECES)[:, None, None].to(tl.int64)
    at = partial + (piece * count + row) * EXPERTS + expert[None, :, :]
    score = tl.sum(tl.load(at, mask=held[None, :, :], other=0.0), 0)
    if ROUNDS_SCORES:
        score = score.to(rows.dtype.element_ty).to(tl.float32)
    if SIGMOID:
        share = 1.0 / (1.0 + tl.exp(-score))
    else:
        score = tl.where(held, score, float("-inf"))
        share = tl.exp(score - tl.max(tl.max(score, 1), 0))
        share = share / tl.sum(tl.sum(share, 1), 0)
    wanted = share
    if CORRECTED:
        wanted += tl.load(correction + expert, mask=held, other=0.0)
    wanted = tl.where(held, wanted, float("-inf"))
    if CHOSEN_GROUPS < GROUPS:
        inside = _best_groups(wanted, group, member, GROUPS, CHOSEN_GROUPS, SIGMOID)
        # As in the reference: a share of 0 can still be chosen, behind all others.
        outside = float("-inf") if SIGMOID else 0.0
        wanted = tl.where(held & (inside == 0), outside, wanted)
    slot = tl.arange(0, triton.next_power_of_2(CHOSEN))
    chosen, chosen_share = _greatest(tl.reshape(wanted, [HIGH * WIDE]), tl.reshape(share, [HIGH * WIDE]), slot, CHOSEN)
    if NORMALIZES:
        chosen_share = chosen_share / (tl.sum(chosen_share, 0) + least_sum)
    chosen_share = chosen_share * scale
    if ROUNDS_SHARES:
        chosen_share = chosen_share.to(rows.dtype.element_ty).to(tl.float32)
    # What is not a number may win a place that no expert has: its row ends, but must read nothing out of bounds.
    found = tl.minimum(chosen // WIDE, GROUPS - 1) * SIZE + tl.minimum(chosen % WIDE, SIZE - 1)
    put = row * CHOSEN + slot
    tl.store(ids + put, found.to(tl.int64), mask=slot < CHOSEN)
    tl.store(shares + put, chosen_share, mask=slot < CHOSEN)


@triton.jit
def _best_groups(wanted, group, member, GROUPS: tl.constexpr, CHOSEN_GROUPS: tl.constexpr, SIGMOID: tl.constexpr):
    """wanted [groups, members] -> [groups, 1] bool: the groups whose best expert, or best two, are wanted most."""
    judged = tl.max(wanted, 1, keep_dims=True)
    if SIGMOID:
        first = tl.argmax(wanted, 1, keep_dims=True)
        judged += tl.max(tl.where(member == first, float("-inf"), wanted), 1, keep_dims=True)
    judged = tl.where(group < GROUPS, judged, float("-inf"))
    inside = group < 0
    for _ in tl.static_range(CHOSEN_GROUPS):
        best = tl.argmax(judged, 0, keep_dims=True)
        inside = inside | (group == best)
        judged = tl.where(group == best, float("-inf"), judged)
    return inside


@triton.jit
def _greatest(wanted, share, slot, CHOSEN: tl.constexpr):
    """Places of what is wanted most, and the shares there, by slot."""
    place = tl.arange(0, wanted.shape[0])
    chosen, chosen_share = tl.zeros_like(slot), tl.zeros_like(slot).to(tl.float32)
    for turn in tl.static_range(CHOSEN):
        best = tl.argmax(wanted, 0)
        chosen = tl.where(slot == turn, best, chosen)
        chosen_share = tl.where(slot == turn, tl.sum(tl.where(place == best, share, 0.0), 0), chosen_share)
        wanted = tl.where(place == best, float("-inf"), wanted)
    return chosen, chosen_share
