"""What is guessed, when it pays, and what becomes of guesses that are wrong, without a model."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echelon.internal.link import Assign, Fence, Finish
from tests.unit.paged_device import PagedDevice, answer, request
from worker.limits import EngineLimits
from worker.plan import NON_FINITE, StepPlan, StepResult
from worker.scheduler import Scheduler
from worker.speculation import NgramDrafter, Speculation, rejected

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
    drafter = NgramDrafter()
    for end in range(0, len(ids) + 1, every):
        assert drafter(ids[:end], most) == plainly(ids[:end], most)


def test_three_ids_are_better_evidence_than_two() -> None:
    assert NgramDrafter()([1, 2, 3, 4, 0, 2, 3, 5, 1, 2, 3], 2) == (4, 0)


def test_a_long_prompt_is_read_in_pieces_that_hold_up_no_step() -> None:
    drafter, prompt = NgramDrafter(), [*range(9000), 0, 1, 2]
    found = [drafter(prompt, 2) for _ in range(4)]
    assert found == [(), (), (3, 4), (3, 4)]


def test_a_row_behind_a_wrong_draft_is_wrong_whatever_its_own() -> None:
    assert rejected({1: 5, 2: 7, 5: 9}, [5, 8, 0, 0, 9, 0]) == {2}
    assert rejected({1: 5, 2: 7}, [7, 7, 7]) == {1, 2}, "the second is what was drawn, but in another place"
    assert rejected({1: 5, 2: 5}, [NON_FINITE, 5, 5]) == {1, 2}
    assert rejected({}, [1, 2]) == set()


class Alone:
    """A request and its guesses, in a scheduler whose device is a step behind its plans, as in a replica."""

    def __init__(self, assign: Assign, guesses: Sequence[int], tokens: int = 4, kv_blocks: int = 64) -> None:
        self.prompt, self.known = assign.prompt, (*assign.prompt, *guesses)
        limits = EngineLimits(8, kv_blocks, 4, 128, 400, speculation_tokens=tokens)
        self.scheduler = Scheduler(limits, lambda: self.guess)
        self.device = PagedDevice(4)
        self.plans: list[StepPlan] = []
        self.ids: list[int] = []
        self.finishes: list[Finish] = []
        self.scheduler.add(assign)

    def guess(self, ids: Sequence[int], most: int) -> tuple[int, ...]:
        return self.known[len(ids) : len(ids) + most] if tuple(ids[: len(self.prompt)]) == self.prompt else ()

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
    assert 6 <= len(drafted) <= 12, "pauses double up to 32 rows"
    assert len(alone.rows) <= 205, "beside that the device is never without a step"


def test_while_one_waits_for_its_drafts_others_go_on() -> None:
    first, other = request("d", range(20, 27), 40), request("e", range(40, 47), 40)
    alone = Alone(first, answer(first))
    alone.scheduler.add(other)
    plans = [alone.scheduler.schedule(FENCE) for _ in range(3)]
    assert [[row.first for row in plan.rows] for plan in plans if plan] == [[0, 0], [7], [8]]
    assert all(plan and plan.rows[-1].slot == plans[0].rows[1].slot for plan in plans if plans[0])


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
        if not speculation.waits([0] * row):
            speculation.ahead()
    assert len(asked) == (20 if found else 4)


def test_drafts_in_flight_are_waited_for_whatever_is_found_meanwhile() -> None:
    found = [(1,)]
    speculation = Speculation(lambda ids, most: found.pop() if found else ())
    assert speculation.guess([0, 0], 4) == (1,)
    speculation.drafted()
    assert speculation.waits([0, 0])
    speculation.settle()
    assert not speculation.waits([0, 0])
