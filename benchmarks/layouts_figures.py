"""What layouts.py computes from answers and traces: how far two layouts agree, and how full a pipeline was.

Pure: answers and records in, figures out. It starts nothing and reads no file.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from parallel.schedule import Kind
from parallel.timeline import OpRecord, Timeline, in_order


@dataclass(frozen=True, slots=True)
class Answer:
    """Ids and the log-probability of each."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Agreement:
    """equal: the share of ids before each answer's first difference; the differences are those of their logprobs."""

    answers: int
    identical: int
    equal: float
    greatest_difference: float
    mean_difference: float


def agreement(answers: Sequence[Answer], reference: Sequence[Answer]) -> Agreement:
    """How far answers to the same requests agree. After the first other id the contexts differ, so no more counts."""
    pairs = list(zip(answers, reference, strict=True))
    common = [_common(answer.ids, expected.ids) for answer, expected in pairs]
    differences = [
        abs(a - b)
        for (answer, expected), count in zip(pairs, common, strict=True)
        for a, b in zip(answer.logprobs[:count], expected.logprobs[:count], strict=True)
    ]
    total = sum(len(expected.ids) for expected in reference)
    identical = sum(answer.ids == expected.ids for answer, expected in pairs)
    mean = statistics.fmean(differences) if differences else 0.0
    return Agreement(len(pairs), identical, sum(common) / total, max(differences, default=0.0), mean)


def _common(ids: Sequence[int], expected: Sequence[int]) -> int:
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ids, expected, strict=False)))


@dataclass(frozen=True, slots=True)
class Executed:
    """Of the forwards between filling and draining; bubble: the share of a stage's time without one, by stage."""

    forwards: int
    seconds: float
    bubble: tuple[float, ...]
    median_slot_ms: tuple[float, ...]
    median_round_ms: float | None


def forwards(records: Sequence[OpRecord], stages: int) -> Timeline:
    """What counts as work: a stage that waits for ids to come back is idle."""
    return in_order((record for record in records if record.op.kind is Kind.FORWARD), stages)


def executed(records: Sequence[OpRecord], stages: int, cohorts: int) -> Executed | None:
    """What a pipeline did, cohorts taking turns; None if too little was logged."""
    work = forwards(records, stages)
    since_s, until_s = work.filled()
    if until_s <= since_s or any(not work.of_stage(stage) for stage in range(stages)):
        return None
    starts_s = [record.start_s for record in work.of_stage(0)]
    rounds_s = [later - earlier for earlier, later in zip(starts_s, starts_s[cohorts:], strict=False)]
    span_s = until_s - since_s
    return Executed(
        len(starts_s),
        round(span_s, 4),
        tuple(round(1 - work.busy_s(stage, since_s, until_s) / span_s, 4) for stage in range(stages)),
        tuple(_median_ms([r.end_s - r.start_s for r in work.of_stage(stage)]) for stage in range(stages)),
        _median_ms(rounds_s) if rounds_s else None,
    )


def between(records: Sequence[OpRecord], since_s: float, until_s: float) -> list[OpRecord]:
    """Those that began in the window."""
    return [record for record in records if since_s <= record.start_s < until_s]


def rounds_from(records: Sequence[OpRecord], stages: int, since_s: float, count: int) -> Timeline:
    """The operations of about so many forwards of the first stage, from a time on: a piece that can be drawn."""
    starts_s = sorted(r.start_s for r in records if not r.stage and r.op.kind is Kind.FORWARD and r.start_s >= since_s)
    until_s = starts_s[count] if len(starts_s) > count else float("inf")
    return in_order(between(records, since_s, until_s), stages)


def _median_ms(seconds: Sequence[float]) -> float:
    return round(statistics.median(seconds) * 1e3, 3)
