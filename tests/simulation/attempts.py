"""What a leader was told to run, and whether what it plans and tells can have come of it.

The judge beside each simulated leader. Whether its tokens are right, the checker sees where they are written; here
stands what no token shows: whose blocks were shared, who went first, and what was computed for nobody.
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field

from echelon.internal.link import Assign, Command, Prompted, Report, TokenRun
from tests.simulation.checker import require
from worker.limits import EngineLimits
from worker.plan import StepPlan
from worker.scheduler import Scheduler
from worker.sequence import Sequence

Attempt = tuple[str, int]  # request, attempt


@dataclass(slots=True)
class Told:
    """An attempt. place: its turn. lane: that holds it. ids: by choice, prompt and answer.

    abandoned: choices that nobody wants any more.
    """

    assign: Assign
    place: tuple[int, int]
    ids: dict[int, list[int]]
    abandoned: set[int] = field(default_factory=set)
    lane: int | None = None
    begun: bool = False
    prompted: bool = False
    released: bool = False


class Attempts:
    """All attempts that one leader was given in its epoch."""

    def __init__(self, limits: EngineLimits) -> None:
        self._block_tokens = limits.block_tokens
        self._told: dict[Attempt, Told] = {}
        self._by_seed: dict[int, Told] = {}  # the last attempt at a request, which its seed names
        self._running: list[set[Sequence]] = [set() for _ in range(limits.data)]
        self._last_report = 0

    def commanded(self, command: Command) -> None:
        """The leader has taken this command."""
        for abandon in command.abandons:
            if told := self._told.get((abandon.request, abandon.attempt)):
                told.abandoned.update(told.ids if abandon.choice is None else (abandon.choice,))
        for assign in command.assigns:
            attempt = assign.request, assign.attempt
            require(attempt not in self._told, "{} is told twice", attempt)
            ids = {each.choice: [*assign.prompt, *each.generated] for each in assign.choices}
            told = Told(assign, (assign.priority, len(self._told)), ids)
            self._told[attempt] = self._by_seed[assign.sampling.seed] = told

    def planned(self, plans: tuple[StepPlan, ...]) -> None:
        """In no lane does anybody begin while somebody waits there whose turn is first."""
        for lane, plan in enumerate(plans):
            self._planned(lane, plan)

    def _planned(self, lane: int, plan: StepPlan) -> None:
        begin = [told for admit in plan.admits if not (told := self._by_seed[admit.sampling.seed]).begun]
        for told in begin:
            told.begun = True
        if not begin:
            return
        last = max(told.place for told in begin)
        for told in self._by_seed.values():
            waits = told.lane == lane and not (told.begun or told.released or told.abandoned.issuperset(told.ids))
            require(not waits or told.place > last, "{} waits while {} begin", told.assign, begin)

    def running(self, lanes: Collection[Scheduler]) -> None:
        """Who holds slots and blocks after a step, and who waits for some: who had to give them back was the last."""
        for lane, scheduler in enumerate(lanes):
            for assign in scheduler:
                told = self._told[assign.request, assign.attempt]
                require(told.lane in (None, lane), "{} has moved from lane {} to {}", assign, told.lane, lane)
                told.lane = lane
            before, running = self._running[lane], scheduler._running
            preempted = [self._place(each) for each in scheduler._waiting if each in before]
            if preempted:
                kept = [self._place(each) for each in running if each in before]
                require(max(kept, default=()) < min(preempted), "{} were preempted before {}", preempted, kept)
            self._running[lane] = set(running)

    def _place(self, sequence: Sequence) -> tuple[int, ...]:
        assign = sequence.request.assign
        return *self._told[assign.request, assign.attempt].place, sequence.choice

    def reported(self, report: Report) -> None:
        """The leader tells this, for the first time or again."""
        if report.report_seq <= self._last_report:
            return
        self._last_report = report.report_seq
        for run in report.runs:
            self._ran(run)
        for prompted in report.prompted:
            self._prompted(prompted)
        for run in report.runs:
            told = self._told[run.request, run.attempt]
            require(told.prompted or not run.ids, "{} is told before its prompt", run)
        for released in report.released:
            if attempt := self._told.get((released.request, released.attempt)):
                attempt.released = True

    def _ran(self, run: TokenRun) -> None:
        told = self._told[run.request, run.attempt]
        ids = told.ids[run.choice]
        require(run.choice not in told.abandoned, "{} is told of a choice that was abandoned", run)
        require(run.first_token == len(ids) - len(told.assign.prompt), "{} comes after {}", run, ids)
        ids.extend(run.ids)

    def _prompted(self, prompted: Prompted) -> None:
        told = self._told[prompted.request, prompted.attempt]
        require(not told.prompted, "{} is told twice", prompted)
        told.prompted = True
        cached, prompt = prompted.cached_tokens, told.assign.prompt
        alike = [
            _alike(prompt, ids)
            for other in self._told.values()
            if other is not told and other.assign.cache_salt == told.assign.cache_salt
            for ids in other.ids.values()
        ]
        require(cached % self._block_tokens == 0 or cached == len(prompt), "{} is not whole blocks", prompted)
        require(cached <= max(alike, default=0), "{}, but nobody began like {}", prompted, told.assign)


def _alike(some: Ids[int], others: Ids[int]) -> int:
    """How many ids they begin with alike."""
    places = (place for place, (one, other) in enumerate(zip(some, others, strict=False)) if one != other)
    return next(places, min(len(some), len(others)))
