"""Lanes: the data ranks of a replica in lockstep, each with a scheduler, a batch and a block pool of its own.

Lives in the leader, without torch, clock or I/O. One step of the replica is a plan for every lane, empty where a lane
has nothing to do, because all of them meet at the experts. A request stays in the lane that it was put into.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from echelon.internal.link import Assign, Fence
from worker.captures import Captures
from worker.limits import EngineLimits
from worker.plan import StepPlan, StepResult, lane_of
from worker.scheduler import Scheduler
from worker.sequence import Outcome, State
from worker.speculation import Drafter

HELD_TOKENS = 64  # what a request that a lane holds counts for, beside its prompt: it takes a row of many steps


class Lanes:
    """Schedulers of as many data ranks as the limits say; the limits are each one's own."""

    def __init__(self, limits: EngineLimits, new_drafter: Callable[[], Drafter] | None = None) -> None:
        self.schedulers = tuple(Scheduler(limits, new_drafter) for _ in range(limits.data))
        self._rebalance_steps = limits.rebalance_steps
        self._captures = Captures(limits.captures, limits.depth)

    def __iter__(self) -> Iterator[Assign]:
        return (assign for scheduler in self.schedulers for assign in scheduler)

    @property
    def plans_in_flight(self) -> int:
        """Steps."""
        return len(self.schedulers[0].flights)

    @property
    def idle(self) -> bool:
        return all(scheduler.idle for scheduler in self.schedulers)

    @property
    def counters(self) -> dict[str, int]:
        """Of all lanes together; they make their steps together."""
        total = Counter[str]()
        for scheduler in self.schedulers:
            total.update(scheduler.counters)
        return {**total, "steps": self.schedulers[0].counters["steps"]}

    @property
    def blocks_referenced(self) -> int:
        return sum(scheduler.blocks_referenced for scheduler in self.schedulers)

    @property
    def blocks_cached(self) -> int:
        return sum(scheduler.blocks_cached for scheduler in self.schedulers)

    def held_attempt(self, request: str) -> int | None:
        """The attempt that is held of a request, if one is."""
        scheduler = self._holder(request)
        return None if scheduler is None else scheduler.held_attempt(request)

    def add(self, assign: Assign) -> Outcome:
        """Put a request into the lane in which it costs least."""
        return choose(self.schedulers, assign).add(assign)

    def release(self, request: str, choice: int | None = None) -> Outcome:
        """Let go of a choice of a request, or of all that it holds."""
        scheduler = self._holder(request)
        assert scheduler is not None, f"{request} is not held"
        return scheduler.release(request, choice)

    def schedule(self, fence: Fence) -> tuple[StepPlan, ...] | None:
        """The next step, one plan a lane; None if no lane has anything to compute before another result."""
        found = [scheduler.schedule(fence) for scheduler in self.schedulers]
        if not any(found):
            return self._at_leisure(fence)
        plans = [plan or scheduler.stand_by(fence) for plan, scheduler in zip(found, self.schedulers, strict=True)]
        if self._rebalance_steps and plans[0].step % self._rebalance_steps == 0:
            plans = [replace(plan, rebalances=True) for plan in plans]
        if captures := self._captures.before(plans):
            plans = [replace(plan, captures=captures) for plan in plans]
        if len(plans) == 1:  # nobody else has to know its shape
            return tuple(plans)
        after, shapes = max(plan.after for plan in plans), tuple(map(lane_of, plans))
        return tuple(replace(plan, after=after, lanes=shapes) for plan in plans)

    def _at_leisure(self, fence: Fence) -> tuple[StepPlan, ...] | None:
        """A step without rows that only captures a graph, once something has been computed and nothing is left to. No
        other is planned before its result, so that whoever comes waits for one, and releases are told meanwhile."""
        served = self.schedulers[0].counters["steps"] > 0
        if not (self._captures.left and served and self.idle) or self.plans_in_flight:
            return None
        rows = self._captures.at_leisure()
        return tuple(replace(scheduler.stand_by(fence), captures=rows) for scheduler in self.schedulers)

    def commit(self, result: StepResult) -> Outcome:
        """The results of all lanes, one behind the other."""
        outcome = Outcome()
        for scheduler, part in zip(self.schedulers, self._parts(result), strict=True):
            brought = scheduler.commit(part)
            outcome.runs += brought.runs
            outcome.prompted += brought.prompted
            outcome.released += brought.released
        return outcome

    def spoilt(self, result: StepResult) -> list[str]:
        """The requests whose scores are not finite in this result of the oldest step, unless they have ended."""
        parts = zip(self.schedulers, self._parts(result), strict=True)
        found = [sequence for scheduler, part in parts for sequence in scheduler.flights[0].spoilt(part)]
        return sorted({each.assign.request for each in found if each.state is not State.ENDED})

    def in_steps(self, first: int, last: int) -> list[str]:
        """The requests that have a row in one of these steps, as far as their results have not come."""
        flights = [flight for scheduler in self.schedulers for flight in scheduler.flights]
        return sorted({request for flight in flights if first <= flight.step <= last for request in flight.requests})

    def check_integrity(self) -> None:
        for scheduler in self.schedulers:
            scheduler.check_integrity()

    def _parts(self, result: StepResult) -> list[StepResult]:
        """Each lane's, of the oldest step."""
        parts, sampled, scored = [], 0, 0
        for scheduler in self.schedulers:
            flight = scheduler.flights[0]
            ends = sampled + len(flight.sampled), scored + len(flight.scored)
            parts.append(_part(result, slice(sampled, ends[0]), slice(scored, ends[1])))
            sampled, scored = ends
        return parts

    def _holder(self, request: str) -> Scheduler | None:
        return next((lane for lane in self.schedulers if lane.held_attempt(request) is not None), None)


def choose(lanes: Sequence[Scheduler], assign: Assign) -> Scheduler:
    """The lane with the fewest tokens to compute before the request generates, what it has cached left out.

    Requests that a lane holds count too, so that batches stay alike: a step is as long as the longest lane's.
    """
    if len(lanes) == 1:
        return lanes[0]
    prompt = len(assign.prompt)

    def cost(lane: Scheduler) -> int:
        return lane.waiting_tokens + HELD_TOKENS * len(lane) + prompt - lane.cached_tokens(assign)

    return min(lanes, key=cost)


def _part(result: StepResult, sampled: slice, scored: slice) -> StepResult:
    faults = ((row - sampled.start, why) for row, why in result.faults if sampled.start <= row < sampled.stop)
    spoilt = (row - sampled.start for row in result.non_finite if sampled.start <= row < sampled.stop)
    ids, logprobs, drafts = result.ids[sampled], result.logprobs[sampled], result.drafts[sampled]
    return replace(
        result,
        ids=ids,
        logprobs=logprobs,
        drafts=drafts,
        scores=result.scores[scored],
        faults=tuple(faults),
        non_finite=tuple(spoilt),
    )
