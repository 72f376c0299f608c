"""Sampling as one-rank code: logits of some rows in, their ids and log-probabilities out.

Runs on every rank over its share of the rows. A row's path and rules depend on its own parameters and ids alone and
every operation works row by row, so its ids do not depend on the company. The caller says which rows take which
path from what its host knows: nothing here waits for the device. It must not know slots, plans or ranks.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from echelon.sampling import MAX_LOGPROBS
from parallel.largest import NOT_FINITE, largest
from worker import noise
from worker.logit_rules import Rule

# Rows are worked on in pieces of about this many logits, to bound the float64 temporaries (32 MiB each).
_PIECE_ELEMENTS = 1 << 22


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """Parameters of each row, all [rows] on the logits' device.

    temperature and top_p are float64; top_k, seed, choice and position int64. position is that of the id to draw.
    """

    temperature: Tensor
    top_p: Tensor
    top_k: Tensor
    seed: Tensor
    choice: Tensor
    position: Tensor


class Path(enum.IntEnum):
    """How an id is chosen: the largest score, a draw from the whole distribution, or one after top_k and top_p."""

    GREEDY = 0
    PLAIN = 1
    TRUNCATED = 2


@dataclass(frozen=True, slots=True)
class SamplingPaths:
    """Which rows without rules take which path, int64 indices each; those in neither are greedy."""

    plain: Tensor
    truncated: Tensor


class ConstrainedRow(NamedTuple):
    """Of RuledRows, one whose constraint's mask is still to come: its place there, its row of the logits, its slot."""

    place: int
    row: int
    slot: int


@dataclass(frozen=True, slots=True)
class RuledRows:
    """Rows [n] int64 of the logits that change by rules, in order, before they take their path; n is at most a piece.

    min_p [n] float64, or None where no row has one.
    """

    rows: Tensor
    path: Path
    rules: tuple[Rule, ...]
    min_p: Tensor | None = None
    constrained: tuple[ConstrainedRow, ...] = ()


class Sampled(NamedTuple):
    """Ids [rows] int64 of the vocabulary, and of each row [rows] bool whether all its logits are finite: an id means
    nothing where they are not."""

    ids: Tensor
    finite: Tensor


def sample(logits: Tensor, rows: SamplingRows, paths: SamplingPaths, ruled: Sequence[RuledRows] = ()) -> Sampled:
    """Greedy takes the largest logit, the lowest id among equals; the others draw by Gumbel-max."""
    best = largest(logits)[:, 1].long()
    finite, ids = best != NOT_FINITE, best.clamp(min=0)
    for piece in _pieces(paths.plain, logits.shape[-1]):
        ids[piece] = _draw_plain(_scaled(logits[piece], rows, piece), rows, piece)
    for piece in _pieces(paths.truncated, logits.shape[-1]):
        ids[piece] = _draw_truncated(_scaled(logits[piece], rows, piece), rows, piece)
    for part in ruled:
        ids[part.rows] = _choose(logits[part.rows].to(torch.float64), rows, part)
    return Sampled(ids, finite)


def piece_rows(vocab_size: int) -> int:
    """How many rows are worked on together."""
    return max(1, _PIECE_ELEMENTS // vocab_size)


def logprobs_width(vocab_size: int) -> int:
    """How many alternatives `logprobs` returns."""
    return min(MAX_LOGPROBS, vocab_size)


def logprobs(logits: Tensor, ids: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For the rows `chosen`: log-probability of their id [n], the likeliest ids [n, k] and theirs [n, k].

    Of the raw logits, before temperature and truncation; float64 for a float64 model, else float32. k is always
    the most that may be asked: ties at the end of the list are then broken alike whatever the company asks.
    """
    width = logprobs_width(logits.shape[-1])
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    own = torch.empty(len(chosen), dtype=dtype, device=logits.device)
    top_ids = torch.empty(len(chosen), width, dtype=torch.int64, device=logits.device)
    top = torch.empty(len(chosen), width, dtype=dtype, device=logits.device)
    start = 0
    for piece in _pieces(chosen, logits.shape[-1]):
        end = start + len(piece)
        log_probabilities = torch.log_softmax(logits[piece], dim=-1, dtype=dtype)
        own[start:end] = log_probabilities.gather(1, ids[piece, None]).squeeze(1)
        top[start:end], top_ids[start:end] = log_probabilities.topk(width, dim=-1)
        start = end
    return own, top_ids, top


def _choose(scores: Tensor, rows: SamplingRows, part: RuledRows) -> Tensor:
    """Ids of a part's rows from their logits as float64, which may be changed."""
    for rule in part.rules:
        scores = rule(scores)
    if part.path == Path.GREEDY:
        return scores.argmax(dim=-1)
    scores = _scaled(scores, rows, part.rows)
    if part.min_p is not None:
        share = (scores - scores.amax(dim=-1, keepdim=True)).exp_()  # of the likeliest token's probability
        scores.masked_fill_(share < part.min_p[:, None], -torch.inf)
    draw = _draw_plain if part.path == Path.PLAIN else _draw_truncated
    return draw(scores, rows, part.rows)


def _draw_plain(scores: Tensor, rows: SamplingRows, piece: Tensor) -> Tensor:
    """argmax(logits / temperature + Gumbel noise) is a draw from softmax(logits / temperature)."""
    token_ids = torch.arange(scores.shape[-1], device=scores.device)
    return scores.add_(_noise(rows, piece, token_ids)).argmax(dim=-1)


def _draw_truncated(scores: Tensor, rows: SamplingRows, piece: Tensor) -> Tensor:
    """The same among the top_k likeliest, then among the fewest of these that reach top_p together."""
    # Stable: among equal logits the lowest id comes first, so top_k = 1 is greedy.
    scores, token_ids = scores.sort(dim=-1, descending=True, stable=True)
    top_k, top_p = rows.top_k[piece, None], rows.top_p[piece, None]
    rank = torch.arange(scores.shape[-1], device=scores.device)
    scores.masked_fill_((top_k > 0) & (rank >= top_k), -torch.inf)
    probabilities = scores.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1).sub_(probabilities)
    scores.masked_fill_(before >= top_p, -torch.inf)
    winner = scores.add_(_noise(rows, piece, token_ids)).argmax(dim=-1, keepdim=True)
    return token_ids.gather(1, winner).squeeze(1)


def _scaled(logits: Tensor, rows: SamplingRows, piece: Tensor) -> Tensor:
    """A copy in float64, where no temperature that counts as above 0 makes a logit overflow."""
    return logits.to(torch.float64, copy=True).div_(rows.temperature[piece, None])


def _noise(rows: SamplingRows, piece: Tensor, token_ids: Tensor) -> Tensor:
    keys = noise.row_keys(rows.seed[piece], rows.choice[piece], rows.position[piece])
    return noise.gumbel(keys[:, None], token_ids)


def _pieces(indices: Tensor, vocab_size: int) -> tuple[Tensor, ...]:
    return torch.split(indices, piece_rows(vocab_size)) if len(indices) else ()
