"""What is guessed, when it pays, and what becomes of guesses that are wrong, without a model."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echelon.internal.link import Assign, Fence, Finish
from tests.unit.paged_device import PagedDevice, answer, request
from worker.limits import EngineLimits
from worker.plan import NON_FINITE, StepPlan, StepResult
from worker.scheduler import Scheduler
from worker.speculation import NgramDrafter, Reading, Speculation, rejected

FENCE = Fence(1, 0, 1)


def plainly(ids: Sequence[int], most: int) -> tuple[int, ...]:
    """Prompt lookup as its definition has it."""
    for size in (3, 2):
        for begin in range(len(ids) - size - 1, -1, -1):
            if tuple(ids[begin : begin + size]) == tuple(ids[-size:]):
                known = list(ids)
                for _ in range(most):
                    known.append(known[begin + size + len(known) - len(ids)])
                return tuple(known[len(ids) :])
    return ()


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(ids=st.lists(st.integers(0, 2), max_size=30), most=st.integers(1, 5), every=st.integers(1, 4))
def test_what_stood_behind_the_same_ids_is_guessed_at_any_length(ids: list[int], most: int, every: int) -> None:
    drafter = NgramDrafter(Reading())
    for end in range(0, len(ids) + 1, every):
        assert drafter(ids[:end], most) == plainly(ids[:end], most)


def test_three_ids_are_better_evidence_than_two() -> None:
    assert NgramDrafter(Reading())([1, 2, 3, 4, 0, 2, 3, 5, 1, 2, 3], 2) == (4, 0)


def test_a_long_prompt_is_read_in_pieces_that_hold_up_no_step() -> None:
    reading, prompt = Reading(), [*range(9000), 0, 1, 2]
    drafter, found = NgramDrafter(reading), []
    for _ in range(4):
        found.append(drafter(prompt, 2))
        reading.renew()
    assert found == [(), (), (3, 4), (3, 4)]


def test_a_row_behind_a_wrong_draft_is_wrong_whatever_its_own() -> None:
    assert rejected({1: 5, 2: 7, 5: 9}, [5, 8, 0, 0, 9, 0]) == {2}
    assert rejected({1: 5, 2: 7}, [7, 7, 7]) == {1, 2}, "the second is what was drawn, but in another place"
    assert rejected({1: 5, 2: 5}, [NON_FINITE, 5, 5]) == {1, 2}
    assert rejected({}, [1, 2]) == set()


class Alone:
    """A request and its guesses, in a scheduler whose device is a step behind its plans, as in a replica."""

    def __init__(self, assign: Assign, guesses: Sequence[int], tokens: int = 4, kv_blocks: int = 64) -> None:
        self.foreseen = {assign.prompt: (*assign.prompt, *guesses)}
        limits = EngineLimits(8, kv_blocks, 4, 128, 400, speculation_tokens=tokens)
        self.scheduler = Scheduler(limits, lambda: self.guess)
        self.device = PagedDevice(4)
        self.plans: list[StepPlan] = []
        self.ids: list[int] = []
        self.finishes: list[Finish] = []
        self.scheduler.add(assign)

    def add(self, assign: Assign, guesses: Sequence[int]) -> None:
        """Another request with other guesses."""
        self.foreseen[assign.prompt] = (*assign.prompt, *guesses)
        self.scheduler.add(assign)

    def guess(self, ids: Sequence[int], most: int) -> tuple[int, ...]:
        coming = (whole for prompt, whole in self.foreseen.items() if tuple(ids[: len(prompt)]) == prompt)
        return next(coming, ())[len(ids) : len(ids) + most]

    def run(self) -> None:
        flying: deque[StepPlan] = deque()
        while not self.scheduler.idle or flying:
            while len(flying) < 2 and (plan := self.scheduler.schedule(FENCE)):
                flying.append(plan)
                self.plans.append(plan)
            for run in self.scheduler.commit(self.device.run(flying.popleft())).runs:
                assert run.first_token == len(self.ids)
                self.ids += run.ids
                self.finishes += [run.finish] if run.finish else []
        self.scheduler.check_integrity()

    @property
    def rows(self) -> list[int]:
        return [len(plan.rows) for plan in self.plans]


def company(alone: Alone, count: int) -> None:
    """Others, whose ids nobody guesses."""
    for number in range(2, 2 + count):
        alone.scheduler.add(request(f"other {number}", range(20 * number, 20 * number + 8), 380))


def test_right_drafts_bring_all_ids_in_a_few_steps_and_never_more_than_were_asked() -> None:
    assign = request("a", range(20, 27), 23)
    expected = answer(assign)
    alone = Alone(assign, (*expected, 1, 2, 3, 4, 5))
    alone.run()
    assert alone.ids == expected and alone.finishes == [Finish.LENGTH]
    assert alone.rows == [1, 5, 5, 5, 5, 2]
    assert alone.scheduler.counters["accepted_tokens"] == 17 and alone.scheduler.counters["decode_rows"] == 5


def test_an_end_token_among_drafts_that_came_true_ends_the_answer_there() -> None:
    assign = request("b", range(20, 27), 30)
    expected = answer(assign)
    stop = expected[3]
    assign = request("b", range(20, 27), 30, stop_token_ids=(stop,))
    end = expected.index(stop) + 1
    alone = Alone(assign, expected)
    alone.run()
    assert alone.ids == expected[:end] and alone.finishes == [Finish.STOP]


def test_wrong_drafts_change_nothing_and_soon_are_hardly_tried() -> None:
    assign = request("c", range(20, 27), 200)
    alone = Alone(assign, [token + 1 for token in answer(assign)])
    alone.run()
    assert alone.ids == answer(assign)
    drafted = [step for step, rows in enumerate(alone.rows) if rows > 1]
    assert 6 <= len(drafted) <= 12, "pauses double"
    assert len(alone.rows) <= 205, "beside that the device is never without a step"


def test_while_one_waits_for_its_drafts_others_go_on() -> None:
    first = request("d", range(20, 27), 40)
    alone = Alone(first, answer(first), kv_blocks=900)
    company(alone, 2)
    plans = [plan for plan in (alone.scheduler.schedule(FENCE) for _ in range(3)) if plan]
    assert [[row.first for row in plan.rows] for plan in plans] == [[0, 0, 0], [8, 8], [9, 9]]
    assert {row.slot for plan in plans[1:] for row in plan.rows} == {row.slot for row in plans[0].rows[1:]}


def test_a_full_batch_and_a_full_pool_leave_no_place_for_drafts() -> None:
    """Of a batch of eight. The first draft that begins a block needs one that nobody who runs may need soon."""
    for running, kv_blocks, drafts in ((8, 64, 0), (6, 64, 2), (2, 7, 3), (2, 8, 4)):
        asked = [request(f"f{number}", range(20 * number, 20 * number + 8), 8) for number in range(running)]
        alone = Alone(asked[0], answer(asked[0]), kv_blocks=kv_blocks)
        for assign in asked[1:]:
            alone.scheduler.add(assign)
        plan = alone.scheduler.schedule(FENCE)
        assert plan is not None and len(plan.rows) <= running
        alone.scheduler.commit(alone.device.run(plan))
        follows = alone.scheduler.schedule(FENCE)
        assert follows is not None
        assert alone.scheduler.counters["drafted_tokens"] == drafts, (running, kv_blocks)


def test_scores_that_are_not_finite_behind_a_wrong_draft_concern_nobody() -> None:
    """Only the row whose id counts says something of the request."""
    assign = request("g", range(20, 27), 40)
    for draft_is_right in (False, True):
        expected = answer(assign)
        scheduler = Scheduler(EngineLimits(4, 64, 4, 32, 400, speculation_tokens=1))
        scheduler._speculator._new_drafter = lambda: lambda ids, most: (expected[1] + (not draft_is_right),)  # noqa: B023
        scheduler.add(assign)
        first = scheduler.schedule(FENCE)
        assert first is not None
        scheduler.commit(StepResult(first.step, (expected[0],), (None,)))
        verifying = scheduler.schedule(FENCE)
        assert verifying is not None and len(verifying.rows) == 2
        result = StepResult(verifying.step, (expected[1], NON_FINITE), (None, None), non_finite=(1,))
        outcome = scheduler.commit(result)
        assert [released.reason for released in outcome.released] == (["NON_FINITE"] if draft_is_right else [])


@pytest.mark.parametrize("found", [True, False])
def test_what_is_not_found_is_not_looked_for_at_every_row(found: bool) -> None:
    asked: list[int] = []

    def drafter(ids: Sequence[int], most: int) -> tuple[int, ...]:
        asked.append(len(ids))
        return (1,) if found else ()

    speculation = Speculation(drafter)
    for row in range(20):
        if not speculation.waits([0] * row, room=True):
            speculation.ahead()
    assert len(asked) == (20 if found else 4)


def test_drafts_in_flight_are_waited_for_whatever_is_found_meanwhile() -> None:
    found = [(1,)]
    speculation = Speculation(lambda ids, most: found.pop() if found else ())
    assert speculation.guess([0, 0], 4, 0) == (1,)
    assert speculation.waits([0, 0], room=False)
    speculation.settle()
    assert not speculation.waits([0, 0], room=True)


def test_nothing_is_guessed_behind_an_id_that_ends_the_answer() -> None:
    """Scores there are of no interest, finite or not: the answer has ended before them."""
    expected = answer(request("h", range(20, 27), 40))
    assign = request("h", range(20, 27), 40, stop_token_ids=(expected[2],))
    alone = Alone(assign, expected)
    first = alone.scheduler.schedule(FENCE)
    assert first is not None
    alone.scheduler.commit(StepResult(first.step, (expected[0],), (None,)))
    verifying = alone.scheduler.schedule(FENCE)
    assert verifying is not None and [told.ids for told in verifying.told] == [(expected[1],)]
    outcome = alone.scheduler.commit(StepResult(verifying.step, tuple(expected[1:3]), (None, None)))
    assert [run.finish for run in outcome.runs] == [None, Finish.STOP]


def test_blocks_of_drafts_that_did_not_come_true_are_given_back() -> None:
    """Nobody is to lack them: of four tokens each, the row is in the second and its drafts reached into the fourth."""
    assign = request("i", range(20, 26), 40)
    alone = Alone(assign, [1, 1, *(token + 1 for token in answer(assign)[2:])], tokens=7)
    for blocks in (2, 4):
        plan = alone.scheduler.schedule(FENCE)
        assert plan is not None and alone.scheduler.blocks_referenced == blocks
        alone.scheduler.commit(alone.device.run(plan))
    assert alone.scheduler.blocks_referenced == 2
    alone.ids = answer(assign)[:2]
    alone.run()
    assert alone.ids == answer(assign)


def steps_of(alone: Alone, most: int) -> list[int]:
    """Rows of each step of a device that is a step behind its plans, until the choice has so many ids."""
    flying: deque[StepPlan] = deque()
    rows: list[int] = []
    gained = 0
    while gained < most:
        while len(flying) < 2 and (plan := alone.scheduler.schedule(FENCE)):
            flying.append(plan)
            rows.append(len(plan.rows))
        result = alone.device.run(flying.popleft())
        gained += sum(run.request == "j" for run in alone.scheduler.commit(result).runs)
    return rows


def test_where_there_is_no_place_for_drafts_nobody_waits_for_them() -> None:
    assign = request("j", range(20, 28), 100)
    alone = Alone(assign, answer(assign), kv_blocks=900)
    company(alone, 7)
    rows = steps_of(alone, 99)
    assert rows[1:-1] == [8] * len(rows[1:-1]), "a full batch of eight"


@pytest.mark.parametrize("chance", [0.5, 0.8])
def test_drafts_that_make_up_for_no_more_than_waiting_costs_are_hardly_tried(chance: float) -> None:
    """One at a time, and others fill every step: each that comes true makes up for a row, and no more."""
    assign, luck = request("j", range(20, 28), 380), random.Random(1)
    alone = Alone(assign, [token + (luck.random() > chance) for token in answer(assign)], tokens=1, kv_blocks=900)
    company(alone, 2)
    assert len(steps_of(alone, 300)) <= 325


@pytest.mark.parametrize(("tokens", "plain", "least"), [(1, 0, 165), (4, 0, 165), (1, 1, 150)])
def test_choices_that_speculate_go_on_together(tokens: int, plain: int, least: int) -> None:
    """Else each would be in the steps that others leave out, and at best make up for the steps that it leaves out. A
    minority that does not speculate misses no step, and none is made for it alone."""
    asked = [request("jklm"[number], range(20 * number, 20 * number + 8), 380) for number in range(4)]
    luck = random.Random(1)
    noisy = [[token + (luck.random() > 0.9) for token in answer(assign)] for assign in asked]
    alone = Alone(asked[0], noisy[0], tokens=tokens, kv_blocks=900)
    for number in range(1, 4):
        alone.add(asked[number], () if number >= 4 - plain else noisy[number])
    gained: Counter[str] = Counter()
    flying: deque[StepPlan] = deque()
    for _ in range(100):
        while len(flying) < 2 and (plan := alone.scheduler.schedule(FENCE)):
            flying.append(plan)
        gained.update(run.request for run in alone.scheduler.commit(alone.device.run(flying.popleft())).runs)
    assert [gained[assign.request] >= least for assign in asked] == [True] * (4 - plain) + [False] * plain
    assert all(gained[assign.request] >= 98 for assign in asked)


def test_places_for_drafts_are_shared() -> None:
    """Eight rows by three choices: one draft of each is worth more than many of the first."""
    asked = [request(name, range(20 * number, 20 * number + 8), 40) for number, name in enumerate("nop")]
    alone = Alone(asked[0], answer(asked[0]), tokens=5)
    for assign in asked[1:]:
        alone.add(assign, answer(assign))
    drafts: list[list[int]] = []
    while len(drafts) < 4:
        plan = alone.scheduler.schedule(FENCE)
        assert plan is not None
        drafts.append([len(told.ids) for told in plan.told])
        assert len(drafts) == 1 or alone.scheduler.schedule(FENCE) is None, "all wait for what is drawn"
        alone.scheduler.commit(alone.device.run(plan))
    assert drafts == [[], [1, 1, 1], [1, 1, 1], [1, 1, 1]]


def test_long_prompts_that_come_at_once_hold_up_a_step_no_longer_than_one() -> None:
    reading, short = Reading(), [0, 1, 2, 3, 0, 1]
    drafters, prompt = [NgramDrafter(reading) for _ in range(4)], [*range(3000), 0, 1, 2]
    found = []
    for _ in range(3):
        found.append([len(drafter(prompt, 2)) for drafter in drafters])
        assert NgramDrafter(reading)(short, 2) == (2, 3), "who has little to read is not kept from it"
        reading.renew()
    assert found == [[2, 0, 0, 0], [2, 2, 0, 0], [2, 2, 2, 2]]
