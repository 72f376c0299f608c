"""What a step is made of: budget, order, chunks, reservations; and what its ids mean at commit."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echelon.internal.link import Assign, Fence, Finish, Logprob, Sampling, TokenRun
from worker.plan import StepPlan, StepResult
from worker.scheduler import EngineLimits, Scheduler, refusal

FENCE = Fence(1, 0, 1)
STOP_ID = 0


def limits(
    max_running: int = 4, kv_blocks: int = 64, block_tokens: int = 4, max_step_tokens: int = 16, max_context: int = 128
) -> EngineLimits:
    return EngineLimits(max_running, kv_blocks, block_tokens, max_step_tokens, max_context)


def request(
    name: str, prompt: int, max_tokens: int, *, generated: tuple[int, ...] = (), logprobs: int | None = None
) -> Assign:
    sampling = Sampling(1.0, 0.9, 5, max_tokens, seed=3, stop_token_ids=(STOP_ID,), logprobs=logprobs)
    return Assign(name, 1, tuple(range(100, 100 + prompt)), generated, sampling)


def planned(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.schedule(FENCE)
    assert plan is not None
    return plan


def result(plan: StepPlan, token_id: int = 7) -> StepResult:
    sampled = [row for row in plan.rows if row.sampled]
    logprobs = tuple(None if row.logprobs is None else Logprob(-0.5) for row in sampled)
    return StepResult(plan.step, (token_id,) * len(sampled), logprobs)


def shape(plan: StepPlan) -> list[tuple[int, int, bool, bool]]:
    """first position, tokens, is decode, is sampled"""
    return [(row.first, row.tokens, row.given is None, row.sampled) for row in plan.rows]


def test_decode_rows_come_first_and_chunks_fill_the_rest_of_the_budget() -> None:
    scheduler = Scheduler(limits(max_step_tokens=7))
    scheduler.add(request("short", 3, 4))
    scheduler.add(request("long", 11, 4))
    assert shape(planned(scheduler)) == [(0, 3, False, True), (0, 4, False, False)]
    assert shape(planned(scheduler)) == [(3, 1, True, True), (4, 6, False, False)]
    assert shape(planned(scheduler)) == [(4, 1, True, True), (10, 1, False, True)]
    assert shape(planned(scheduler)) == [(5, 1, True, True), (11, 1, True, True)]
    assert scheduler.counters == {
        "steps": 0, "prefill_chunks": 4, "chunked_prompts": 1, "decode_rows": 4, "replayed_requests": 0
    }  # fmt: skip


def test_max_tokens_bounds_what_is_planned_before_any_result() -> None:
    scheduler = Scheduler(limits())
    scheduler.add(request("a", 3, 2))
    plans = [planned(scheduler), planned(scheduler)]
    assert scheduler.schedule(FENCE) is None
    assert scheduler.commit(result(plans[0])) == [TokenRun("a", 0, 1, 0, (7,))]
    assert scheduler.commit(result(plans[1])) == [TokenRun("a", 0, 1, 1, (7,), finish=Finish.LENGTH)]
    assert scheduler.idle and not scheduler.blocks_referenced
    scheduler.check_integrity()


def test_an_end_token_ends_the_request_and_its_row_ahead_is_ignored() -> None:
    scheduler = Scheduler(limits(max_running=1))
    scheduler.add(request("a", 3, 8))
    first, ahead = planned(scheduler), planned(scheduler)
    assert scheduler.commit(result(first, STOP_ID)) == [TokenRun("a", 0, 1, 0, (STOP_ID,), finish=Finish.STOP)]
    assert scheduler.blocks_referenced == 0
    scheduler.add(request("b", 2, 8))
    after = planned(scheduler)
    assert [admit.slot for admit in after.admits] == [first.rows[0].slot], "the slot serves again at once"
    assert scheduler.commit(result(ahead)) == []
    assert scheduler.commit(result(after)) == [TokenRun("b", 0, 1, 0, (7,))]


def test_the_last_id_may_be_an_end_token() -> None:
    scheduler = Scheduler(limits())
    scheduler.add(request("a", 3, 1))
    assert scheduler.commit(result(planned(scheduler), STOP_ID))[0].finish is Finish.STOP


def test_requests_wait_for_blocks_until_the_end_of_those_that_run() -> None:
    scheduler = Scheduler(limits(kv_blocks=5))
    scheduler.add(request("a", 9, 3))  # 3 blocks
    scheduler.add(request("b", 8, 4))  # 3 blocks: too many beside a's, though few are in use yet
    scheduler.add(request("c", 1, 1))  # would fit, but does not overtake
    plan = planned(scheduler)
    assert len(plan.admits) == 1 and len(plan.rows) == 1
    scheduler.release("a")
    assert len(planned(scheduler).admits) == 2


def test_blocks_are_allocated_as_positions_need_them() -> None:
    scheduler = Scheduler(limits(block_tokens=4))
    scheduler.add(request("a", 4, 9))
    counts = [len(planned(scheduler).blocks) for _ in range(9)]
    assert counts == [1, 1, 0, 0, 0, 1, 0, 0, 0]


def test_no_more_requests_generate_than_the_budget_has_tokens() -> None:
    scheduler = Scheduler(limits(max_step_tokens=2))
    for name in "abc":
        scheduler.add(request(name, 1, 3))
    slots = [[row.slot for row in planned(scheduler).rows] for _ in range(5)]
    assert slots == [[0, 1], [0, 1], [0, 1], [2], [2]]


def test_replayed_ids_are_prefilled_and_count() -> None:
    scheduler = Scheduler(limits(max_step_tokens=4))
    assert scheduler.add(request("a", 3, 4, generated=(8, 9))) is None
    plans = [planned(scheduler), planned(scheduler), planned(scheduler)]
    assert [row.given for plan in plans for row in plan.rows] == [(100, 101, 102, 8), (9,), None]
    assert scheduler.schedule(FENCE) is None, "two of four ids were there already"
    assert scheduler.commit(result(plans[0])) == []
    assert scheduler.commit(result(plans[1])) == [TokenRun("a", 0, 1, 2, (7,))]
    assert scheduler.commit(result(plans[2])) == [TokenRun("a", 0, 1, 3, (7,), finish=Finish.LENGTH)]
    assert scheduler.counters["replayed_requests"] == 1


@pytest.mark.parametrize(
    ("generated", "finish"), [((5, STOP_ID), Finish.STOP), ((5, 6, 7), Finish.LENGTH), ((5, 6, 7, 8), Finish.LENGTH)]
)
def test_replayed_ids_that_end_the_request_leave_nothing_to_do(generated: tuple[int, ...], finish: Finish) -> None:
    scheduler = Scheduler(limits())
    run = scheduler.add(request("a", 3, 3, generated=generated))
    assert run == TokenRun("a", 0, 1, len(generated), (), finish=finish)
    assert scheduler.idle and scheduler.schedule(FENCE) is None


def test_logprobs_are_asked_and_passed_on_where_ids_are_drawn() -> None:
    scheduler = Scheduler(limits(max_step_tokens=2))
    scheduler.add(request("a", 3, 2, logprobs=4))
    plans = [planned(scheduler), planned(scheduler)]
    assert [row.logprobs for plan in plans for row in plan.rows] == [None, 4]
    assert scheduler.commit(result(plans[0])) == []
    assert scheduler.commit(result(plans[1])) == [TokenRun("a", 0, 1, 0, (7,), (Logprob(-0.5),))]


def test_results_out_of_order_are_a_defect() -> None:
    scheduler = Scheduler(limits())
    scheduler.add(request("a", 3, 4))
    planned(scheduler)
    with pytest.raises(AssertionError, match="expected step 1, got 2"):
        scheduler.commit(result(planned(scheduler)))


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "reason"),
    [
        (0, 4, "prompt of 0 tokens"),
        (30, 11, r"prompt 30 \+ max_tokens 11 = 41 tokens exceed max_context 40"),
        (30, 10, "40 tokens need 10 blocks of 4; the cache has 9"),
        (30, 6, "^$"),
    ],
)
def test_what_can_never_fit_is_refused_with_the_arithmetic(prompt: int, max_tokens: int, reason: str) -> None:
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(refusal(request("a", prompt, max_tokens), limits(kv_blocks=9, max_context=40)))


def check_plan(plan: StepPlan, bounds: EngineLimits) -> None:
    """What every plan obeys."""
    assert 0 < sum(row.tokens for row in plan.rows) <= bounds.max_step_tokens
    slots = [row.slot for row in plan.rows]
    assert len(set(slots)) == len(slots) <= bounds.max_running
    decodes = [row.given is None for row in plan.rows]
    assert decodes == sorted(decodes, reverse=True), "decode rows come first"
    assert all(row.sampled for row in plan.rows if row.given is None)
    assert {admit.slot for admit in plan.admits} <= {row.slot for row in plan.rows if row.first == 0}
    blocks = [block for _, _, block in plan.blocks]
    assert len(set(blocks)) == len(blocks) and all(0 <= block < bounds.kv_blocks for block in blocks)


@settings(deadline=None, derandomize=True, database=None, max_examples=150)
@given(
    bounds=st.builds(
        limits,
        max_running=st.integers(1, 4),
        kv_blocks=st.integers(8, 20),
        block_tokens=st.integers(1, 5),
        max_step_tokens=st.integers(1, 9),
    ),
    sizes=st.lists(st.tuples(st.integers(1, 14), st.integers(1, 6), st.integers(0, 5)), max_size=8),
    choices=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), max_size=60),
)
def test_every_request_ends_with_all_its_ids_and_nothing_is_kept(
    bounds: EngineLimits, sizes: list[tuple[int, int, int]], choices: list[tuple[int, int]]
) -> None:
    scheduler = Scheduler(bounds)
    requests = [request(f"{n}", prompt, new, generated=(9,) * old) for n, (prompt, new, old) in enumerate(sizes)]
    to_add = deque(assign for assign in requests if not refusal(assign, bounds))
    owed = {assign.request: assign.sampling.max_tokens - len(assign.generated) for assign in to_add}
    plans: deque[StepPlan] = deque()

    def act(operation: int, token_id: int) -> None:
        if operation == 0 and to_add:
            if run := scheduler.add(to_add.popleft()):
                assert owed.pop(run.request) <= 0
        elif operation == 1 and len(plans) < 3 and (plan := scheduler.schedule(FENCE)):
            check_plan(plan, bounds)
            plans.append(plan)
        elif operation in (2, 3) and plans:
            for run in scheduler.commit(result(plans.popleft(), token_id)):
                owed[run.request] -= 1
                assert (run.finish is Finish.STOP) == (token_id == STOP_ID)
                if run.finish:
                    assert owed.pop(run.request) == 0 or run.finish is Finish.STOP
        elif operation == 4 and (held := [sequence.assign.request for sequence in scheduler]):
            scheduler.release(name := held[token_id % len(held)])
            del owed[name]
        scheduler.check_integrity()

    for operation, token_id in choices:
        act(operation, token_id)
    while owed or plans:
        before = (len(to_add), len(plans), sum(owed.values()))
        for operation in (0, 1, 1, 2):
            act(operation, token_id=7)
        assert before != (len(to_add), len(plans), sum(owed.values())) or plans, "stuck"
    assert scheduler.idle and scheduler.blocks_referenced == 0 and scheduler.plans_in_flight == 0
