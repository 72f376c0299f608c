"""PendingStep: a step whose work is queued on the device, and the packing in which its outcome travels to the host.

In every rank's runner. One float64 tensor has a row for each sampled row, so that one gather and one copy to the host
carry it: its id (exact below 2^53), what is predicted behind it and, if any row of the step asked for them, its own
log-probability, the likeliest ids and theirs. Scored tokens make a second one, without ids. Knows no plan and no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from echelon.internal.link import Logprob
from worker.matchers import BROKEN, Constraint
from worker.non_finite import Sampled
from worker.op_clock import Span
from worker.plan import NO_ID, NON_FINITE, StepResult
from worker.sampler import logprobs_width
from worker.upload import Downloads

ID, DRAFT, SCORES = 0, 1, 2  # where they begin in a row
NO_DRAFT = -1


def outcome_width(logprobs: Sequence[int | None], vocabulary: int) -> int:
    """Numbers a sampled row has: its ids alone, unless a row of the step asks for log-probabilities."""
    return SCORES if all(wanted is None for wanted in logprobs) else SCORES + scores_width(vocabulary)


def scores_width(vocabulary: int) -> int:
    """Numbers of a packed row of log-probabilities."""
    return 1 + 2 * logprobs_width(vocabulary)


def pack(own: Tensor, top_ids: Tensor, top_logprobs: Tensor) -> Tensor:
    """Log-probabilities [n], and of the k likeliest ids [n, k] each: [n, 1 + 2 k]."""
    return torch.cat([own[:, None].double(), top_ids.double(), top_logprobs.double()], dim=1)


def unpack(packed: Tensor, wanted: Sequence[int | None]) -> list[Logprob | None]:
    """Rows of `pack` as asked: the `wanted` likeliest of each, the lower id first among equals."""
    rows = packed.numpy()
    top = rows.shape[1] // 2
    ids, logprobs = rows[:, 1 : 1 + top], rows[:, 1 + top :]
    order = np.lexsort((ids, -logprobs))
    ordered_ids = np.take_along_axis(ids, order, 1).astype(np.int64).tolist()
    ordered = np.take_along_axis(logprobs, order, 1).tolist()
    return [
        None if count is None else Logprob(own, tuple(near[:count]), tuple(values[:count]))
        for own, near, values, count in zip(rows[:, 0].tolist(), ordered_ids, ordered, wanted, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a step has drawn: outcome [sampled rows, 2 or more] and scores [scored tokens, ...], as packed above.

    logprobs: of every sampled row, None or how many alternatives it wants. scored: of every scored row, how many of
    the scores are its, and how many alternatives it wants.
    """

    outcome: Tensor
    logprobs: tuple[int | None, ...] = ()
    scores: Tensor | None = None
    scored: tuple[tuple[int, int], ...] = ()


def nothing_drawn(device: torch.device) -> Drawn:
    """By a stage that samples nothing."""
    return Drawn(torch.empty(0, SCORES, dtype=torch.float64, device=device))


class PendingStep:
    """A step that was launched. constraints: of the sampled rows that have one. span: when this rank computed it.

    own: the rows that its data rank sampled, where it knows them.
    """

    def __init__(
        self,
        step: int,
        drawn: Drawn,
        downloads: Downloads,
        constraints: Mapping[int, Constraint] | None = None,
        span: Span | None = None,
        own: Sampled | None = None,
    ) -> None:
        self._step = step
        self.own = own
        self._logprobs = drawn.logprobs
        self._scored = drawn.scored
        self._constraints = constraints or {}
        self._span = span
        self._download = downloads.begin([drawn.outcome] if drawn.scores is None else [drawn.outcome, drawn.scores])

    def id_of(self, row: int) -> int:
        """The id of a sampled row. Waits for the device to reach the end of the step."""
        return int(self._download.wait()[0][row, ID])

    def result(self) -> StepResult:
        """Waits for the device to reach the end of the step."""
        outcome, *scores = self._download.wait()
        ids, drafts = (tuple(map(int, outcome[:, column].tolist())) for column in (ID, DRAFT))
        packed = outcome.shape[1] > SCORES
        return StepResult(
            step=self._step,
            ids=ids,
            logprobs=tuple(unpack(outcome[:, SCORES:], self._logprobs)) if packed else (None,) * len(ids),
            scores=self._unpacked_scores(scores[0]) if scores else tuple(() for _ in self._scored),
            faults=tuple((row, self._reason(row)) for row, token in enumerate(ids) if token == NO_ID),
            non_finite=tuple(row for row, token in enumerate(ids) if token == NON_FINITE),
            drafts=() if NO_DRAFT in drafts else drafts,
            slot_s=0.0 if self._span is None else self._span.seconds,
        )

    def _reason(self, row: int) -> str:
        """Why no id could be drawn; the first of several stages knows only that it could not."""
        return self._constraints[row].reason if row in self._constraints else BROKEN

    def _unpacked_scores(self, scores: Tensor) -> tuple[tuple[Logprob, ...], ...]:
        wanted = [alternatives for count, alternatives in self._scored for _ in range(count)]
        found = [logprob for logprob in unpack(scores, wanted) if logprob is not None]
        ends = accumulate(count for count, _ in self._scored)
        return tuple(tuple(found[end - count : end]) for end, (count, _) in zip(ends, self._scored, strict=True))


class Queued(NamedTuple):
    """An operation whose work is queued on the device: of which step, when, and the step itself if it ends with it."""

    step: int
    span: Span
    pending: PendingStep | None = None
