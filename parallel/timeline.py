"""Timelines of a pipeline: what each stage did when, executed or predicted from the costs of operations.

Pure and torch-free: ranks write the records, the planner predicts rounds and bubbles, `echelon trace` draws. The
simulator runs the lists of schedule.py through queues of bounded length and finds deadlocks. It knows no model and
decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from parallel.schedule import Kind, Op, Schedule, Source


class OpRecord(NamedTuple):
    """One operation of one stage, on the clock of whoever wrote it. step is the plan's, 0 where there is none."""

    stage: int
    op: Op
    start_s: float
    end_s: float
    epoch: int = 0
    step: int = 0


class Edge(NamedTuple):
    """A queue from one stage to another, of forwards or of backs."""

    sender: int
    receiver: int
    kind: Kind


class DeadlockError(Exception):
    """No stage can go on; the message says what each waits for."""


@dataclass(frozen=True, slots=True)
class Timeline:
    """Records of all stages, ordered by start. Times without an argument are those of the whole span."""

    records: tuple[OpRecord, ...]
    stages: int
    start_s: float
    end_s: float

    @property
    def span_s(self) -> float:
        """From the first start to the last end."""
        return self.end_s - self.start_s

    def of_stage(self, stage: int) -> tuple[OpRecord, ...]:
        """A stage's records by start."""
        return tuple(record for record in self.records if record.stage == stage)

    def ops(self, stage: int) -> tuple[Op, ...]:
        """A stage's operations in the order they were done, to be compared with a schedule's."""
        return tuple(record.op for record in self.of_stage(stage))

    def busy_s(self, stage: int, since_s: float | None = None, until_s: float | None = None) -> float:
        """Seconds in which the stage did at least one operation, between the two times."""
        busy_s, covered_s = 0.0, self.start_s if since_s is None else since_s
        last_s = self.end_s if until_s is None else until_s
        for record in self.of_stage(stage):
            begin_s, finish_s = max(record.start_s, covered_s), min(record.end_s, last_s)
            if finish_s > begin_s:
                busy_s += finish_s - begin_s
                covered_s = finish_s
        return busy_s

    def bubble(self, since_s: float | None = None, until_s: float | None = None) -> float:
        """The share of stage-seconds in which a stage did nothing, between the two times."""
        start_s = self.start_s if since_s is None else since_s
        span_s = (self.end_s if until_s is None else until_s) - start_s
        if span_s <= 0:
            return 0.0
        return 1 - sum(self.busy_s(stage, since_s, until_s) for stage in range(self.stages)) / (self.stages * span_s)

    def round_s(self, cohorts: int) -> float:
        """Between the last two forwards of a cohort on the first stage, when `cohorts` take turns: a token's time."""
        starts_s = [record.start_s for record in self.of_stage(0) if record.op.kind is Kind.FORWARD]
        assert len(starts_s) > cohorts, f"{len(starts_s)} micro-batches are no two rounds of {cohorts}"
        return starts_s[-1] - starts_s[-1 - cohorts]

    def filled(self) -> tuple[float, float]:
        """From when the last stage first has work to when the first has forwarded its last micro-batch: at inference,
        the time between filling and draining.
        """
        last = [record.start_s for record in self.of_stage(self.stages - 1)]
        first = [record.end_s for record in self.of_stage(0) if record.op.kind is Kind.FORWARD]
        return min(last, default=self.start_s), max(first, default=self.end_s)


def in_order(records: Iterable[OpRecord], stages: int | None = None) -> Timeline:
    """The timeline of records in any order; as many stages as they name unless given."""
    ordered = tuple(sorted(records, key=lambda record: (record.start_s, record.end_s, record.stage)))
    named = 1 + max((record.stage for record in ordered), default=0)
    start_s = ordered[0].start_s if ordered else 0.0
    return Timeline(ordered, stages or named, start_s, max((record.end_s for record in ordered), default=0.0))


def simulate(
    schedule: Schedule,
    cost_s: Callable[[int, Op], float],
    *,
    latency_s: float = 0.0,
    queue_length: int | None = None,
    release_s: Sequence[float] = (),
) -> Timeline:
    """Run a schedule on stages that do one operation at a time, each as soon as it can.

    cost_s(stage, op): seconds of an operation. latency_s: of every way from one stage to another. queue_length: how
    many outputs may lie between a sender and a receiver that has not begun on them, no bound if None; a sender begins
    only when there will be room. Tokens that return at inference need none. release_s: when each micro-batch is
    announced, at once if not given. Raises DeadlockError.
    """
    walk = _Walk(schedule, cost_s, latency_s, queue_length, release_s)
    while walk.left:
        if sum(walk.advance(stage) for stage in range(schedule.stages)) == 0:
            raise DeadlockError("; ".join(walk.waits(stage) for stage in range(schedule.stages)))
    return in_order(walk.done.values(), schedule.stages)


class _Walk:
    """A simulation under way. An operation's times follow from those of operations before it, so no clock is needed."""

    def __init__(
        self,
        schedule: Schedule,
        cost_s: Callable[[int, Op], float],
        latency_s: float,
        queue_length: int | None,
        release_s: Sequence[float],
    ) -> None:
        assert queue_length is None or queue_length >= 1, f"queues of length {queue_length}"
        self._schedule = schedule
        self._cost_s = cost_s
        self._latency_s = latency_s
        self._release_s = release_s
        self._next = [0] * schedule.stages
        self._free_s = [0.0] * schedule.stages
        self._room = _rooms(schedule, queue_length) if queue_length else {}
        self.done: dict[Source, OpRecord] = {}
        self.left = sum(map(len, schedule.ops))

    def advance(self, stage: int) -> int:
        """Do all that the stage can do now; how many operations that were."""
        before = self._next[stage]
        while (op := self._op(stage)) and all(needed in self.done for needed, _ in self._needed(stage, op)):
            start_s = self._start_s(stage, op)
            self._free_s[stage] = start_s + self._cost_s(stage, op)
            self.done[Source(stage, op)] = OpRecord(stage, op, start_s, self._free_s[stage])
            self._next[stage] += 1
            self.left -= 1
        return self._next[stage] - before

    def waits(self, stage: int) -> str:
        """What the stage waits for, in words."""
        if not (op := self._op(stage)):
            return f"stage {stage} is done"
        missing = [(needed, why) for needed, why in self._needed(stage, op) if needed not in self.done]
        return (
            f"stage {stage} at {op} waits for {' and '.join(f'{why} {n.op} of stage {n.stage}' for n, why in missing)}"
        )

    def _op(self, stage: int) -> Op | None:
        """What the stage does next."""
        ops = self._schedule.ops[stage]
        return ops[self._next[stage]] if self._next[stage] < len(ops) else None

    def _needed(self, stage: int, op: Op) -> list[tuple[Source, str]]:
        """The operations that this one cannot begin before, and why."""
        source, room = self._schedule.source(stage, op), self._room.get(Source(stage, op))
        return [
            *([(source, "the output of")] if source else []),
            *([(room, "the room that is made by")] if room else []),
        ]

    def _start_s(self, stage: int, op: Op) -> float:
        """When the stage is free, the micro-batch announced, the input here, and room for the output."""
        start_s = self._free_s[stage]
        if self._release_s and op.kind is Kind.FORWARD:
            start_s = max(start_s, self._release_s[op.microbatch])
        if source := self._schedule.source(stage, op):
            way_s = self._latency_s if source.stage != stage else 0.0
            start_s = max(start_s, self.done[source].end_s + way_s)
        if room := self._room.get(Source(stage, op)):
            start_s = max(start_s, self.done[room].start_s)
        return start_s


def edges(schedule: Schedule) -> dict[Edge, list[tuple[Source, Source]]]:
    """Every queue between two stages, with its (sending, receiving) operations in the receiver's order."""
    found: dict[Edge, list[tuple[Source, Source]]] = {}
    for stage, ops in enumerate(schedule.ops):
        for op in ops:
            source = schedule.source(stage, op)
            if source is not None and source.stage != stage:
                found.setdefault(Edge(source.stage, stage, op.kind), []).append((source, Source(stage, op)))
    return found


def queued(schedule: Schedule, timeline: Timeline) -> dict[Edge, int]:
    """The most outputs that lay in each queue at once: sent, and not yet begun on."""
    times = {Source(record.stage, record.op): record for record in timeline.records}
    most: dict[Edge, int] = {}
    for edge, passed in edges(schedule).items():
        changes = [(times[sent].end_s, 1) for sent, _ in passed] + [(times[taken].start_s, -1) for _, taken in passed]
        lying = most[edge] = 0
        for _, change in sorted(changes):  # what is taken at the moment it is sent never lies there: -1 comes first
            lying += change
            most[edge] = max(most[edge], lying)
    return most


def held(ops: Iterable[Op]) -> int:
    """The most micro-batches that a stage has forwarded and not yet taken back: activations it holds in training."""
    out = most = 0
    for op in ops:
        out += 1 if op.kind is Kind.FORWARD else -1
        most = max(most, out)
    return most


def ideal_bubble(stages: int, microbatches: int, chunks: int = 1) -> float:
    """The bubble of any schedule here whose operations cost the same everywhere: (p - 1) / (m v + p - 1).

    Filling and draining leave each stage idle for p - 1 operations beside its m v (GPipe, section 2.3; Narayanan et al.
    2021, 2.2). Steady decoding has neither, and a bubble of 0 if its slots are equal.
    """
    return (stages - 1) / (microbatches * chunks + stages - 1)


def ideal_round_s(slots_s: Sequence[float], stages: int, way_s: float = 0.0) -> float:
    """One token for every cohort: cohort k keeps each stage busy for slots_s[k], and its tokens take way_s in all.

    A stage serves all cohorts in a round, and the slowest cohort passes all stages: max(sum of slots, p * slowest +
    way). With p cohorts that is p * the slowest slot, so unequal slots are idle time: the reason for cohorts.py.
    """
    return max(sum(slots_s), stages * max(slots_s) + way_s)


def _rooms(schedule: Schedule, queue_length: int) -> dict[Source, Source]:
    """Sending operation -> the operation whose beginning makes room for its output."""
    rooms: dict[Source, Source] = {}
    for edge, passed in edges(schedule).items():
        if edge.kind is Kind.FORWARD or schedule.trains:
            rooms.update((sent, taken) for (_, taken), (sent, _) in zip(passed, passed[queue_length:], strict=False))
    return rooms
