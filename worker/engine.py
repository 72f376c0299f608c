"""The engine core: commands in, plans and reports out.

Lives in the leader as a sans-IO machine: `step(now, event) -> effects`, to be executed in order. Keeps the device one
step ahead of its results; numbers reports and keeps them until the coordinator has journaled them, over any number
of links and coordinators; refuses what does not carry its fence. What to compute is the scheduler's decision.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

from echelon.internal.link import (
    CANARY,
    Abandon,
    Assign,
    Command,
    Fence,
    Released,
    ReplicaHello,
    ReplicaStats,
    Report,
    Running,
    TokenRun,
)
from worker.lanes import Lanes
from worker.limits import EngineLimits, refusal
from worker.plan import StepPlan, StepResult
from worker.sequence import Outcome

__all__ = [
    "Broken",
    "Commanded",
    "Completed",
    "Drain",
    "Effect",
    "EngineCore",
    "EngineLimits",
    "Event",
    "LinkClosed",
    "LinkOpened",
    "RunPlan",
    "SendReport",
]

PLANS_AHEAD = 1  # beside those that run: the device is never idle while a result travels


@dataclass(frozen=True, slots=True)
class LinkOpened:
    """A coordinator of this term listens."""

    term: int


@dataclass(frozen=True, slots=True)
class LinkClosed:
    """Nobody listens."""


@dataclass(frozen=True, slots=True)
class Commanded:
    """A command arrived on the open link."""

    command: Command


@dataclass(frozen=True, slots=True)
class Completed:
    """The oldest plan in flight has run on every rank."""

    result: StepResult


Event = LinkOpened | LinkClosed | Commanded | Completed


@dataclass(frozen=True, slots=True)
class RunPlan:
    """Send each data rank its plan, in their order; the tensor ranks and stages of a data rank get the same one."""

    plans: tuple[StepPlan, ...]


@dataclass(frozen=True, slots=True)
class SendReport:
    """Send this report on the open link."""

    report: Report


@dataclass(frozen=True, slots=True)
class Drain:
    """Tell every rank that no plan comes until results have."""


@dataclass(frozen=True, slots=True)
class Broken:
    """The device is not to be trusted any more: the epoch must end. requests: those that were to show it."""

    step: int
    reason: str
    requests: tuple[str, ...]


Effect = RunPlan | Drain | SendReport | Broken


class EngineCore:
    """One replica's engine, for one epoch."""

    def __init__(self, fence: Fence, limits: EngineLimits) -> None:
        self._fence = fence
        self._limits = limits
        self._lanes = Lanes(limits)
        self._link_open = False
        self._report_seq = 0
        self._last_attempt = 0
        self._unacked: deque[Report] = deque()
        self._counters = {"released": 0, "refused_commands": 0}
        self._outcome = Outcome()  # what this step reports
        self._draining = True
        self._broken = False

    @property
    def fence(self) -> Fence:
        """Its replica and epoch, and the highest term that has opened a link."""
        return self._fence

    def step(self, now: float, event: Event) -> list[Effect]:
        """Take in one event: first the plans that keep the device busy, then what there is to report."""
        told: list[Effect] = []
        match event:
            case LinkOpened(term):
                told = self._open_link(term)
            case LinkClosed():
                self._link_open = False
            case Commanded(command):
                self._obey(command)
            case Completed(result):
                told = self._complete(result)
        reports = self._report()
        return [*self._plan_ahead(), *told, *reports]

    def in_steps(self, first: int, last: int) -> tuple[str, ...]:
        """The requests that have a row in one of these steps, as far as their results have not come."""
        return tuple(self._lanes.in_steps(first, last))

    def stats(self) -> ReplicaStats:
        """Where the epoch stands."""
        lanes = self._lanes
        counters = {**lanes.counters, **self._counters}
        return ReplicaStats(counters["steps"], lanes.blocks_referenced, counters, lanes.blocks_cached)

    def check_integrity(self) -> None:
        """Every slot and block is free, or held by those that run."""
        self._lanes.check_integrity()

    def _open_link(self, term: int) -> list[Effect]:
        """A hello, then again every report that no coordinator has acknowledged."""
        if term < self._fence.term:
            self._counters["refused_commands"] += 1
            return []
        self._fence = replace(self._fence, term=term)
        self._link_open = True
        hello = Report(self._fence, 0, hello=self._hello(), stats=self.stats())
        self._unacked = deque(replace(report, fence=self._fence) for report in self._unacked)
        return [SendReport(report) for report in (hello, *self._unacked)]

    def _hello(self) -> ReplicaHello:
        """What it can hold and holds; a request whose last run is not acknowledged counts, for that run is coming, and
        one whose release is still to be told."""
        last_runs = [run for report in self._unacked for run in report.runs if run.finish]
        held: list[TokenRun | Released | Assign] = [*last_runs, *self._outcome.released, *self._lanes]
        running = {each.request: Running(each.request, each.attempt) for each in held}
        return ReplicaHello(
            slots=self._limits.max_running * self._limits.data,
            kv_blocks=self._limits.kv_blocks * self._limits.data,
            block_tokens=self._limits.block_tokens,
            max_context=self._limits.max_context,
            running=tuple(running.values()),
            last_attempt=self._last_attempt,
        )

    def _obey(self, command: Command) -> None:
        if command.fence != self._fence:
            self._counters["refused_commands"] += 1
            return
        while self._unacked and self._unacked[0].report_seq <= command.acked_report:
            self._unacked.popleft()
        for abandon in command.abandons:
            self._abandon(abandon)
        for assign in command.assigns:
            self._assign(assign)

    def _abandon(self, abandon: Abandon) -> None:
        """Answered even if that attempt is not held, for its end may not have reached the coordinator.

        To let go of one choice is answered if it was the last that was held; its own end is told by its run, if any.
        """
        request, attempt = abandon.request, abandon.attempt
        if self._lanes.held_attempt(request) == attempt:
            self._tell(self._lanes.release(request, abandon.choice))
        elif abandon.choice is None:
            self._tell(Outcome(released=[Released(request, attempt)]))

    def _assign(self, assign: Assign) -> None:
        """Hold the request, instead of an older attempt at it; one that can never fit is released with the reason."""
        if assign.request != CANARY:  # whose attempts have numbers of their own
            self._last_attempt = max(self._last_attempt, assign.attempt)
        held = self._lanes.held_attempt(assign.request)
        if held is not None:
            if assign.attempt <= held:
                return
            self._tell(self._lanes.release(assign.request))
        if reason := refusal(assign, self._limits):
            self._tell(Outcome(released=[Released(assign.request, assign.attempt, reason, "CONTEXT_TOO_LONG")]))
        else:
            self._tell(self._lanes.add(assign))

    def _complete(self, result: StepResult) -> list[Effect]:
        """Scores that are not finite are the request's fault where they are one request's; else of none it is believed
        what the step brought."""
        if self._broken:
            return []
        spoilt = self._lanes.spoilt(result) if result.non_finite else []
        if len(spoilt) > 1:
            self._broken = True
            reason = f"step {result.step}: the scores of {len(spoilt)} requests are not finite (NaN or infinite)"
            return [Broken(result.step, reason, tuple(spoilt))]
        self._tell(self._lanes.commit(result))
        return []

    def _tell(self, outcome: Outcome) -> None:
        self._outcome.runs += outcome.runs
        self._outcome.prompted += outcome.prompted
        self._outcome.released += outcome.released
        self._counters["released"] += len(outcome.released)

    def _plan_ahead(self) -> list[Effect]:
        """Plans until the pipeline is full and one waits, unless more reports could come than may be unacknowledged.

        If there is none to give and some are on their way, several stages are told, once: else the first of them would
        wait for another plan before it takes in what the last has sampled.
        """
        plans: list[Effect] = []
        if self._broken:
            return plans
        while (in_flight := self._lanes.plans_in_flight) < self._limits.depth + PLANS_AHEAD:
            room = self._limits.max_unacked_reports - len(self._unacked) - in_flight
            step = self._lanes.schedule(self._fence) if room > 0 else None
            if step is None:
                if in_flight and self._limits.stages > 1 and not self._draining:
                    self._draining = True
                    plans.append(Drain())
                break
            self._draining = False
            plans.append(RunPlan(step))
        return plans

    def _report(self) -> list[Effect]:
        """What this step has to tell, numbered and kept; sent if somebody listens.

        While steps run and nothing is held any more, releases wait until these steps have ended: what is then assigned
        to a replica that holds nothing is alone in its steps, should one of them break.
        """
        told, self._outcome = self._outcome, Outcome()
        if told.released and self._lanes.idle:
            self._lanes.check_integrity()
            if self._lanes.plans_in_flight:
                self._outcome.released, told.released = told.released, []
        if not (told.runs or told.released):
            return []
        self._report_seq += 1
        report = Report(
            self._fence,
            self._report_seq,
            tuple(told.runs),
            tuple(told.released),
            stats=self.stats(),
            prompted=tuple(told.prompted),
        )
        self._unacked.append(report)
        return [SendReport(report)] if self._link_open else []
