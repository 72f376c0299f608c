"""Data ranks in lockstep: which of them takes a request, plans of equal steps, and results brought to their own."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

import pytest

from echelon.internal.link import Assign, Fence, Logprob, Progress, Released
from tests.unit.paged_device import PagedDevice, answer, prompt_scores, request
from worker.lanes import HELD_TOKENS, Lanes, choose
from worker.limits import EngineLimits
from worker.plan import NO_ID, Lane, StepPlan, StepResult
from worker.sequence import Outcome

FENCE = Fence(1, 0, 1)
BLOCK_TOKENS = 4


def limits(data: int = 2, *, depth: int = 1, max_running: int = 4) -> EngineLimits:
    return EngineLimits(max_running, 200, BLOCK_TOKENS, 64, 400, stages=depth, depth=depth, data=data)


def asked(name: str, prompt: int = 5, max_tokens: int = 4, *, family: int = 0, **options: object) -> Assign:
    """Prompts of a family begin alike."""
    return request(name, range(1000 * family, 1000 * family + prompt), max_tokens, **options)  # type: ignore[arg-type]


class Replica:
    """Lanes, and a device for each."""

    def __init__(self, limits: EngineLimits) -> None:
        self.lanes = Lanes(limits)
        self.devices = [PagedDevice(BLOCK_TOKENS) for _ in range(limits.data)]
        self.plans: deque[tuple[StepPlan, ...]] = deque()
        self.told = Outcome()

    def plan(self) -> tuple[StepPlan, ...]:
        plans = self.lanes.schedule(FENCE)
        assert plans is not None
        self.plans.append(plans)
        return plans

    def run(self) -> StepResult:
        """What the devices make of the oldest step, one lane's results behind the other's."""
        parts = [device.run(plan) for device, plan in zip(self.devices, self.plans.popleft(), strict=True)]
        ids = tuple(token for part in parts for token in part.ids)
        logprobs = tuple(each for part in parts for each in part.logprobs)
        scores = tuple(each for part in parts for each in part.scores)
        return StepResult(parts[0].step, ids, logprobs, scores)

    def commit(self, result: StepResult | None = None) -> Outcome:
        outcome = self.lanes.commit(result or self.run())
        self.lanes.check_integrity()
        self.told.runs += outcome.runs
        self.told.prompted += outcome.prompted
        self.told.released += outcome.released
        return outcome

    def finish(self) -> None:
        while not self.lanes.idle or self.plans:
            plans = self.lanes.schedule(FENCE) if len(self.plans) < 3 else None
            if plans is not None:
                self.plans.append(plans)
            else:
                self.commit()

    def ids(self, request: str, choice: int = 0) -> list[int]:
        return [token for run in self.told.runs if (run.request, run.choice) == (request, choice) for token in run.ids]

    def held(self) -> list[set[str]]:
        return [{assign.request for assign in scheduler} for scheduler in self.lanes.schedulers]


@dataclass(frozen=True)
class Case:
    """What each lane holds, what each has answered and so has cached, a new request, and the lane that takes it."""

    name: str
    lane: int
    prompt: int = 10
    held: tuple[tuple[int, ...], ...] = ((), ())  # lengths of prompts
    cached: tuple[int, ...] = (0, 0)  # leading tokens of the new request's prompt


CASES = [
    Case("of equal lanes the first", 0),
    Case("the one that holds nothing", 1, held=((5,), ())),
    Case("the one with fewer tokens to compute", 0, held=((20, 20), (20, 21))),
    Case("few long prompts wait longer than many short ones", 1, held=((200,), (1, 1, 1))),
    Case("held ones count beside their tokens", 0, held=((HELD_TOKENS,), (1, 1))),
    Case("a beginning that it has cached", 1, prompt=40, cached=(0, 40)),
    Case("the longest of them", 0, prompt=40, cached=(32, 16)),
    Case("a cached beginning outweighs what waits there", 0, prompt=120, held=((20,), ()), cached=(120, 0)),
    Case("until waiting costs more", 1, prompt=120, held=((20, 20), ()), cached=(120, 0)),
    Case("a third lane", 2, held=((1,), (1,), ()), cached=(0, 0, 0)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "_"))
def test_the_lane_in_which_a_request_costs_least(case: Case) -> None:
    lanes = Lanes(limits(len(case.held)))
    for number, (scheduler, tokens) in enumerate(zip(lanes.schedulers, case.cached, strict=True)):
        if not tokens:
            continue
        scheduler.add(asked(f"seen{number}", tokens + 1, 1))  # whole blocks of its prompt stay
        device = PagedDevice(BLOCK_TOKENS)
        while not scheduler.idle:
            plan = scheduler.schedule(FENCE)
            assert plan is not None
            scheduler.commit(device.run(plan))
    for number, (scheduler, prompts) in enumerate(zip(lanes.schedulers, case.held, strict=True)):
        for index, prompt in enumerate(prompts):
            scheduler.add(asked(f"held{number}.{index}", prompt, family=7 + 10 * number + index))
    new = asked("new", case.prompt)
    assert choose(lanes.schedulers, new) is lanes.schedulers[case.lane]
    lanes.add(new)
    assert lanes.schedulers[case.lane].held_attempt("new") == 1


def test_equal_requests_are_dealt_in_turn_and_stay_where_they_are() -> None:
    replica = Replica(limits(3))
    for number in range(7):
        replica.lanes.add(asked(f"r{number}", family=number))
    dealt = [{"r0", "r3", "r6"}, {"r1", "r4"}, {"r2", "r5"}]
    assert replica.held() == dealt
    replica.plan()
    replica.commit()
    assert replica.held() == dealt
    assert {assign.request for assign in replica.lanes} == set.union(*dealt)
    assert replica.lanes.held_attempt("r5") == 1 and replica.lanes.held_attempt("r9") is None


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("data", [2, 3])
def test_every_lane_gets_its_own_ids_logprobs_and_scores(data: int, depth: int) -> None:
    replica = Replica(limits(data, depth=depth, max_running=2))
    assigns = [
        asked(
            f"r{number}",
            3 + 5 * number,
            2 + number,
            family=number,
            choices=[Progress(choice) for choice in range(1 + number % 2)],
            logprobs=1 if number % 3 else None,
            prompt_logprobs=2 if number % 2 else None,
        )
        for number in range(3 * data)
    ]
    for assign in assigns:
        replica.lanes.add(assign)
    assert all(replica.held()), "all lanes have some"
    replica.finish()
    for assign in assigns:
        for progress in assign.choices:
            assert replica.ids(assign.request, progress.choice) == answer(assign, progress.choice)
    scored = {told.request: told.prompt_logprobs for told in replica.told.prompted}
    assert scored == {assign.request: prompt_scores(assign) for assign in assigns}
    wanted = {assign.request: assign.sampling.logprobs is not None for assign in assigns}
    for run in replica.told.runs:
        assert run.logprobs == (tuple(Logprob(-float(token)) for token in run.ids) if wanted[run.request] else ())
    assert {released.request for released in replica.told.released} == set(scored)


def test_a_row_without_an_id_fails_the_request_of_its_own_lane() -> None:
    replica = Replica(limits(3))
    for number in range(3):
        replica.lanes.add(asked(f"r{number}", choices=[Progress(choice) for choice in range(number + 1)]))
    plans = replica.plan()
    replica.commit()
    plans = replica.plan()
    assert [sum(row.sampled for row in plan.rows) for plan in plans] == [1, 2, 3]
    result = replica.run()
    ids = tuple(NO_ID if row == 2 else token for row, token in enumerate(result.ids))
    outcome = replica.commit(replace(result, ids=ids, faults=((2, "it broke"),)))
    assert outcome.released == [Released("r1", 1, "it broke", "CONSTRAINT_FAILED")]
    assert [run.request for run in outcome.runs] == ["r0", "r2", "r2", "r2"], "the others of r1 are dropped"


def test_steps_are_equal_and_each_plan_tells_the_shapes_of_all() -> None:
    replica = Replica(limits(2))
    replica.lanes.add(asked("a", 5, logprobs=1))
    replica.lanes.add(asked("b", 7, family=1, prompt_logprobs=2))
    first, second = replica.plan()
    shapes = (Lane(5, False, (1,), ()), Lane(7, False, (-1,), ((6, 2),)))
    assert (first.step, second.step, first.lanes, second.lanes) == (1, 1, shapes, shapes)
    first, second = replica.plan()
    shapes = (Lane(1, True, (1,), ()), Lane(1, True, (-1,), ()))
    assert (first.step, second.step, first.lanes, second.lanes) == (2, 2, shapes, shapes)


def test_all_wait_for_the_latest_ids_that_any_of_them_reads() -> None:
    replica = Replica(limits(2, depth=2))
    replica.lanes.add(asked("a", 5, 9))
    replica.plan()
    replica.lanes.add(asked("b", 5, 9, family=1))
    afters = [[plan.after for plan in replica.plan()] for _ in range(4)]
    assert afters == [[1, 1], [2, 2], [3, 3], [4, 4]], "a alone reads the step before; b began later"


def test_a_lane_without_work_stands_by_and_takes_up_the_steps() -> None:
    replica = Replica(limits(2))
    replica.lanes.add(a := asked("a", 5, 9))
    for step in (1, 2, 3):
        working, standing = replica.plan()
        assert (working.step, standing.step) == (step, step) and working.rows
        assert not (standing.rows or standing.admits or standing.blocks)
        assert standing.lanes[1] == Lane(0, True, (), ())
    replica.lanes.add(b := asked("b", 5, 2, family=1))
    both = replica.plan()
    assert [plan.step for plan in both] == [4, 4] and both[1].rows
    replica.finish()
    assert (replica.ids("a"), replica.ids("b")) == (answer(a), answer(b))
    counters = replica.lanes.counters
    assert counters["steps"] == 9, "steps are made together, and counted once"
    assert counters["decode_rows"] == 8 + 1, "rows are each lane's own"


def test_without_work_anywhere_there_is_no_step() -> None:
    lanes = Lanes(limits(2))
    assert lanes.schedule(FENCE) is None and lanes.plans_in_flight == 0 and lanes.idle


def test_letting_go_reaches_the_lane_that_holds_it() -> None:
    replica = Replica(limits(2))
    replica.lanes.add(asked("a"))
    replica.lanes.add(asked("b", family=1))
    replica.plan()
    assert replica.lanes.release("b").released == [Released("b", 1)]
    assert replica.held() == [{"a"}, set()] and replica.lanes.blocks_referenced == 2
    assert [run.request for run in replica.commit().runs] == ["a"], "ids of what was let go are dropped"


def test_one_lane_is_told_of_no_others() -> None:
    replica = Replica(limits(1))
    replica.lanes.add(asked("a"))
    (plan,) = replica.plan()
    assert plan.lanes == ()
