"""What a step is made of: budget, order, chunks, blocks, choices; and what its ids mean at commit."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from echelon.internal.link import Assign, Fence, Finish, Logprob, Progress, Prompted, Released, TokenRun
from tests.unit.paged_device import request as assignment
from worker.draft import SCORED_STEP_TOKENS
from worker.limits import EngineLimits, refusal
from worker.plan import NO_ID, StepPlan, StepResult, Told
from worker.scheduler import Scheduler
from worker.sequence import Outcome

FENCE = Fence(1, 0, 1)
STOP_ID = 0


def limits(
    max_running: int = 4, kv_blocks: int = 64, block_tokens: int = 4, max_step_tokens: int = 16, max_context: int = 1024
) -> EngineLimits:
    return EngineLimits(max_running, kv_blocks, block_tokens, max_step_tokens, max_context)


def request(name: str, prompt: int, max_tokens: int, **options: object) -> Assign:
    """No two requests begin alike, unless they have one name."""
    ids = range(100 * ord(name), 100 * ord(name) + prompt)
    return assignment(name, ids, max_tokens, stop_token_ids=(STOP_ID,), **options)  # type: ignore[arg-type]


def replayed(*generated: int) -> list[Progress]:
    return [Progress(0, generated)]


def planned(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.schedule(FENCE)
    assert plan is not None
    scheduler.check_integrity()
    return plan


def result(plan: StepPlan, token_id: int = 7) -> StepResult:
    sampled = [row for row in plan.rows if row.sampled]
    logprobs = tuple(None if row.logprobs is None else Logprob(-0.5) for row in sampled)
    scored = [row for row in plan.rows if row.scored is not None]
    scores = tuple(
        tuple(Logprob(-1.0 * position) for position in range(row.first + 1, row.first + row.tokens + bool(row.next_id)))
        for row in scored
    )
    return StepResult(plan.step, (token_id,) * len(sampled), logprobs, scores)


def commit(scheduler: Scheduler, plan: StepPlan, token_id: int = 7) -> Outcome:
    outcome = scheduler.commit(result(plan, token_id))
    scheduler.check_integrity()
    return outcome


def step(scheduler: Scheduler, token_id: int = 7) -> tuple[StepPlan, Outcome]:
    """One plan and its result."""
    plan = planned(scheduler)
    return plan, commit(scheduler, plan, token_id)


def shape(plan: StepPlan) -> list[tuple[int, int, bool, bool]]:
    """first position, tokens, is decode, is sampled"""
    return [(row.first, row.tokens, row.given is None, row.sampled) for row in plan.rows]


def counted(scheduler: Scheduler, *names: str) -> list[int]:
    return [scheduler.counters[name] for name in names]


def test_decode_rows_come_first_and_chunks_fill_the_rest_of_the_budget() -> None:
    scheduler = Scheduler(limits(max_step_tokens=7))
    scheduler.add(request("s", 3, 4))
    scheduler.add(request("l", 11, 4))
    assert shape(planned(scheduler)) == [(0, 3, False, True), (0, 4, False, False)]
    assert shape(planned(scheduler)) == [(3, 1, True, True), (4, 6, False, False)]
    assert shape(planned(scheduler)) == [(4, 1, True, True), (10, 1, False, True)]
    assert shape(planned(scheduler)) == [(5, 1, True, True), (11, 1, True, True)]
    assert {name: count for name, count in scheduler.counters.items() if count} == {
        "prefill_chunks": 4, "chunked_prompts": 1, "decode_rows": 4
    }  # fmt: skip


def test_max_tokens_bounds_what_is_planned_before_any_result() -> None:
    scheduler = Scheduler(limits())
    scheduler.add(request("a", 3, 2))
    plans = [planned(scheduler), planned(scheduler)]
    assert scheduler.schedule(FENCE) is None
    assert scheduler.blocks_referenced == 0, "nothing is planned any more: others can have the blocks"
    assert commit(scheduler, plans[0]) == Outcome([TokenRun("a", 0, 1, 0, (7,))], [Prompted("a", 1, 0)])
    last = TokenRun("a", 0, 1, 1, (7,), finish=Finish.LENGTH)
    assert commit(scheduler, plans[1]) == Outcome([last], [], [Released("a", 1)])
    assert scheduler.idle


def test_an_end_token_ends_the_request_and_its_row_ahead_is_ignored() -> None:
    scheduler = Scheduler(limits(max_running=1))
    scheduler.add(request("a", 3, 8))
    first, ahead = planned(scheduler), planned(scheduler)
    outcome = commit(scheduler, first, STOP_ID)
    assert outcome.runs == [TokenRun("a", 0, 1, 0, (STOP_ID,), finish=Finish.STOP)]
    assert outcome.released == [Released("a", 1)] and scheduler.blocks_referenced == 0
    scheduler.add(request("b", 2, 8))
    after = planned(scheduler)
    assert [admit.slot for admit in after.admits] == [first.rows[0].slot], "the slot serves again at once"
    assert commit(scheduler, ahead) == Outcome()
    assert commit(scheduler, after).runs == [TokenRun("b", 0, 1, 0, (7,))]


def test_the_last_id_may_be_an_end_token() -> None:
    scheduler = Scheduler(limits())
    scheduler.add(request("a", 3, 1))
    assert step(scheduler, STOP_ID)[1].runs[0].finish is Finish.STOP


def test_an_end_token_before_min_tokens_does_not_end() -> None:
    scheduler = Scheduler(limits())
    scheduler.add(request("a", 3, 8, choices=replayed(STOP_ID), min_tokens=3))
    finishes = [step(scheduler, STOP_ID)[1].runs[0].finish for _ in range(3)]
    assert finishes == [None, None, Finish.STOP]


def test_a_row_without_an_id_fails_its_request_with_the_reason_and_no_other() -> None:
    scheduler = Scheduler(limits())
    scheduler.add(request("a", 3, 8, choices=[Progress(0), Progress(1)]))
    scheduler.add(request("b", 3, 8))
    plan = planned(scheduler)
    slots = [row.slot for row in plan.rows if row.sampled]
    assert len(slots) == 3
    result = StepResult(plan.step, (NO_ID, 7, 7), (None,) * 3, faults=((0, "the matcher broke"),))
    outcome = scheduler.commit(result)
    assert outcome.released == [Released("a", 1, "the matcher broke", "CONSTRAINT_FAILED")]
    assert [(run.request, run.ids) for run in outcome.runs] == [("b", (7,))]
    scheduler.release("b")
    scheduler.check_integrity()


def test_blocks_are_allocated_as_positions_need_them() -> None:
    scheduler = Scheduler(limits(block_tokens=4))
    scheduler.add(request("a", 5, 9))
    counts = [len(planned(scheduler).blocks) for _ in range(9)]
    assert counts == [2, 0, 0, 0, 1, 0, 0, 0, 1]


def test_a_request_begins_when_its_prompt_fits_and_each_that_runs_can_have_a_block_more() -> None:
    scheduler = Scheduler(limits(kv_blocks=5))
    scheduler.add(request("a", 8, 12))  # all five blocks, in the end
    scheduler.add(request("b", 9, 3))  # three now: one too many
    scheduler.add(request("c", 1, 1))  # would fit, but does not overtake
    assert shape(planned(scheduler)) == [(0, 8, False, True)]
    scheduler.release("b")
    assert shape(planned(scheduler)) == [(8, 1, True, True), (0, 1, False, True)]


def test_no_more_requests_generate_than_the_budget_has_tokens() -> None:
    scheduler = Scheduler(limits(max_step_tokens=2))
    for name in "abc":
        scheduler.add(request(name, 1, 3))
    slots = [[row.slot for row in planned(scheduler).rows] for _ in range(5)]
    assert slots == [[0, 1], [0, 1], [0, 1], [1], [1]]


def test_replayed_ids_are_prefilled_and_count() -> None:
    scheduler = Scheduler(limits(max_step_tokens=4))
    assert scheduler.add(request("a", 3, 4, choices=replayed(8, 9))) == Outcome()
    plans = [planned(scheduler), planned(scheduler), planned(scheduler)]
    assert [row.given for plan in plans for row in plan.rows] == [(9700, 9701, 9702, 8), (9,), None]
    assert plans[0].admits[0].prompt_tokens == 3
    assert scheduler.schedule(FENCE) is None, "two of four ids were there already"
    assert commit(scheduler, plans[0]) == Outcome()
    assert commit(scheduler, plans[1]).runs == [TokenRun("a", 0, 1, 2, (7,))]
    assert commit(scheduler, plans[2]).runs == [TokenRun("a", 0, 1, 3, (7,), finish=Finish.LENGTH)]
    assert counted(scheduler, "replayed_requests") == [1]


@pytest.mark.parametrize(
    ("generated", "finish"), [((5, STOP_ID), Finish.STOP), ((5, 6, 7), Finish.LENGTH), ((5, 6, 7, 8), Finish.LENGTH)]
)
def test_replayed_ids_that_end_the_request_leave_nothing_to_do(generated: tuple[int, ...], finish: Finish) -> None:
    scheduler = Scheduler(limits())
    outcome = scheduler.add(request("a", 3, 3, choices=replayed(*generated)))
    run = TokenRun("a", 0, 1, len(generated), (), finish=finish)
    assert outcome == Outcome([run], [], [Released("a", 1)])
    assert scheduler.idle and scheduler.schedule(FENCE) is None


def test_a_replayed_choice_that_has_ended_does_not_end_the_others() -> None:
    scheduler = Scheduler(limits())
    outcome = scheduler.add(request("a", 3, 3, choices=[Progress(1, (STOP_ID,)), Progress(2, (5,)), Progress(4)]))
    assert outcome == Outcome([TokenRun("a", 1, 1, 1, (), finish=Finish.STOP)])
    assert [admit.choice for admit in planned(scheduler).admits] == [2, 4]


def test_logprobs_are_asked_and_passed_on_where_ids_are_drawn() -> None:
    scheduler = Scheduler(limits(max_step_tokens=2))
    scheduler.add(request("a", 3, 2, logprobs=4))
    plans = [planned(scheduler), planned(scheduler)]
    assert [row.logprobs for plan in plans for row in plan.rows] == [None, 4]
    assert commit(scheduler, plans[0]).runs == []
    assert commit(scheduler, plans[1]).runs == [TokenRun("a", 0, 1, 0, (7,), (Logprob(-0.5),))]


def test_results_out_of_order_are_a_defect() -> None:
    scheduler = Scheduler(limits())
    scheduler.add(request("a", 3, 4))
    planned(scheduler)
    with pytest.raises(AssertionError, match="expected step 1, got 2"):
        scheduler.commit(result(planned(scheduler)))


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "choices", "reason"),
    [
        (0, 4, [0], "prompt of 0 tokens"),
        (30, 11, [0], r"prompt 30 \+ max_tokens 11 = 41 tokens exceed max_context 40"),
        (30, 10, [0], "40 tokens need 10 blocks of 4; the cache has 9"),
        (3, 4, [], r"choices \[\]: there must be one at least"),
        (3, 4, [1, 1], r"choices \[1, 1\]: .* each once"),
        (30, 6, [0, 1, 2], "^$"),
    ],
)
def test_what_can_never_fit_is_refused_with_the_arithmetic(
    prompt: int, max_tokens: int, choices: Sequence[int], reason: str
) -> None:
    assign = request("a", prompt, max_tokens, choices=[Progress(choice) for choice in choices])
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(refusal(assign, limits(kv_blocks=9, max_context=40)))


def test_without_a_free_block_the_last_in_order_gives_way_and_its_ids_in_flight_are_accepted_once() -> None:
    scheduler = Scheduler(limits(kv_blocks=4, block_tokens=4))
    scheduler.add(request("a", 6, 6))
    scheduler.add(request("b", 3, 8))
    plans = [planned(scheduler) for _ in range(3)]
    assert [len(plan.rows) for plan in plans] == [2, 2, 2]
    assert commit(scheduler, plans[0]).runs[1] == TokenRun("b", 0, 1, 0, (7,))
    alone = planned(scheduler)
    assert shape(alone) == [(8, 1, True, True)], "a has taken a block that b held"
    assert counted(scheduler, "preemptions", "recomputed_tokens") == [1, 0]
    accepted = [run for plan in plans[1:] for run in commit(scheduler, plan, 9).runs if run.request == "b"]
    assert accepted == [TokenRun("b", 0, 1, 1, (9,)), TokenRun("b", 0, 1, 2, (9,))]
    assert commit(scheduler, alone).runs == [TokenRun("a", 0, 1, 3, (7,))]
    assert step(scheduler)[0].admits == (), "b needs two blocks, and one has to be left for a"
    scheduler.release("a")
    plan, outcome = step(scheduler, 5)
    assert plan.told == (Told(plan.rows[0].slot, 0, (9800, 9801, 9802, 7)),), "one block is still in the cache"
    assert shape(plan) == [(4, 2, False, True)] and plan.rows[0].given == (9, 9)
    assert outcome.runs == [TokenRun("b", 0, 1, 3, (5,))]
    assert counted(scheduler, "recomputed_tokens") == [1], "its last id had not been computed before"


def test_what_is_preempted_waits_for_its_ids_in_flight_and_an_end_among_them_ends_it() -> None:
    scheduler = Scheduler(limits(kv_blocks=3, block_tokens=4))
    scheduler.add(request("a", 4, 8))
    scheduler.add(request("b", 3, 8, priority=1))
    plans = [planned(scheduler) for _ in range(3)]
    assert [len(plan.rows) for plan in plans] == [2, 2, 1]
    scheduler.release("a")
    assert commit(scheduler, plans[0]).runs == [TokenRun("b", 0, 1, 0, (7,))]
    assert scheduler.schedule(FENCE) is None, "its next id is not known yet"
    ended = TokenRun("b", 0, 1, 1, (STOP_ID,), finish=Finish.STOP)
    assert commit(scheduler, plans[1], STOP_ID) == Outcome([ended], [], [Released("b", 1)])
    assert commit(scheduler, plans[2]) == Outcome() and scheduler.schedule(FENCE) is None


def test_preempted_sequences_wait_at_the_front_of_their_class() -> None:
    scheduler = Scheduler(limits(kv_blocks=4, max_running=2))
    scheduler.add(request("a", 6, 10))
    scheduler.add(request("b", 3, 8))
    scheduler.add(request("c", 3, 2))
    while not scheduler.counters["preemptions"]:
        step(scheduler)
    assert step(scheduler)[0].admits == ()
    scheduler.release("a")
    plan = planned(scheduler)
    assert [admit.sampling.seed for admit in plan.admits] == [ord("b"), ord("c")]


def test_lower_priority_begins_first_and_higher_gives_way_though_it_came_first() -> None:
    scheduler = Scheduler(limits(kv_blocks=4, max_running=2))
    scheduler.add(request("a", 3, 12, priority=1))
    step(scheduler)
    for name, priority in (("b", 2), ("c", -1)):
        scheduler.add(request(name, 3, 9, priority=priority))
    assert [admit.sampling.seed for admit in step(scheduler)[0].admits] == [ord("c")]
    while not scheduler.counters["preemptions"]:
        outcome = step(scheduler)[1]
    assert [run.request for run in outcome.runs] == ["c"]
    scheduler.release("c")
    assert [admit.sampling.seed for admit in step(scheduler)[0].admits] == [ord("a")]


def test_the_first_in_order_is_never_preempted_and_all_come_to_their_end() -> None:
    scheduler = Scheduler(limits(kv_blocks=6, block_tokens=2, max_running=4))
    for name in "abcd":
        scheduler.add(request(name, 2, 10))
    finished: list[str] = []
    while not scheduler.idle:
        finished += [run.request for run in step(scheduler)[1].runs if run.finish]
    assert finished == list("abcd") and scheduler.counters["preemptions"] >= 3
    assert scheduler.blocks_referenced == 0


def test_a_prompt_that_was_computed_is_not_computed_again() -> None:
    scheduler = Scheduler(limits())
    scheduler.add(request("a", 11, 1))
    step(scheduler)
    assert (scheduler.blocks_referenced, scheduler.blocks_cached) == (0, 2)
    scheduler.add(request("a", 11, 1))
    plan, outcome = step(scheduler)
    ids = tuple(range(9700, 9711))
    assert plan.told == (Told(0, 0, ids[:8]),) and [row.given for row in plan.rows] == [ids[8:]]
    assert outcome.prompted == [Prompted("a", 1, 8)]
    assert counted(scheduler, "cache_hits", "cached_tokens", "shared_prefix_tokens") == [1, 8, 0]


def test_prompts_are_found_by_the_plans_after_the_one_that_computes_them() -> None:
    scheduler = Scheduler(limits(max_step_tokens=64))
    same = [request("a", 9, 4), request("a", 9, 4), request("a", 9, 4)]
    for number, assign in enumerate(same[:2]):
        scheduler.add(Assign(f"a{number}", 1, assign.prompt, assign.choices, assign.sampling))
    assert [row.first for row in planned(scheduler).rows] == [0, 0], "in one plan neither sees the other's blocks"
    scheduler.add(same[2])
    assert [row.first for row in planned(scheduler).rows if row.given] == [8]


def test_generated_ids_are_found_too_once_they_are_committed() -> None:
    scheduler = Scheduler(limits())
    scheduler.add(request("a", 3, 8))
    for _ in range(8):
        step(scheduler)
    scheduler.add(request("a", 3, 20, choices=replayed(*[7] * 8)))
    assert [row.first for row in planned(scheduler).rows] == [8]


def test_another_salt_finds_nothing() -> None:
    scheduler = Scheduler(limits())
    for salt, cached in (("x", 0), ("y", 0), ("", 0), ("x", 8)):
        scheduler.add(request("a", 9, 1, salt=salt))
        assert step(scheduler)[1].prompted == [Prompted("a", 1, cached)]


def test_choices_share_the_prompt_that_the_first_one_computes() -> None:
    scheduler = Scheduler(limits(max_step_tokens=6))
    scheduler.add(request("a", 11, 2, choices=[Progress(choice) for choice in range(3)]))
    scheduler.add(request("b", 2, 1))
    plans = [planned(scheduler) for _ in range(4)]
    assert [[(row.first, row.tokens) for row in plan.rows] for plan in plans] == [
        [(0, 6)],
        [(6, 5), (0, 1)],  # b does not wait for them
        [(11, 1), (8, 3), (8, 2)],
        [(11, 1), (10, 1), (1, 1)],
    ]
    first, third = plans[0].blocks, plans[2].blocks
    assert [block for _, index, block in third if index < 2] == [first[0][2], first[1][2]] * 2
    assert counted(scheduler, "cache_hits", "cached_tokens", "shared_prefix_tokens") == [2, 16, 16]
    assert [admit.choice for plan in plans for admit in plan.admits] == [0, 0, 1, 2]
    outcomes = [commit(scheduler, plan) for plan in [*plans, planned(scheduler)]]
    assert [outcome.prompted for outcome in outcomes] == [[], [Prompted("a", 1, 0)], [], [Prompted("b", 1, 0)], []]
    ended = [(run.choice, bool(outcome.released)) for outcome in outcomes for run in outcome.runs if run.finish]
    assert ended == [(0, False), (1, True), (0, True), (2, True)]


def test_what_a_preempted_choice_finds_again_is_not_counted_as_shared() -> None:
    scheduler = Scheduler(limits(kv_blocks=4))
    scheduler.add(request("a", 5, 9, choices=[Progress(0), Progress(1)]))
    while scheduler.counters["cache_hits"] < 2:
        step(scheduler)
    assert counted(scheduler, "preemptions", "shared_prefix_tokens") == [1, 4]
    assert scheduler.counters["cached_tokens"] > 4


def test_letting_go_of_choices_one_by_one_releases_the_request_with_the_last() -> None:
    scheduler = Scheduler(limits())
    scheduler.add(request("a", 9, 9, choices=[Progress(0), Progress(1), Progress(3)]))
    step(scheduler)
    step(scheduler)
    assert scheduler.release("a", 2) == Outcome(), "it has no such choice"
    assert scheduler.release("a", 1) == scheduler.release("a", 0) == Outcome()
    scheduler.check_integrity()
    assert [run.choice for run in step(scheduler)[1].runs] == [3]
    assert scheduler.release("a", 3) == Outcome(released=[Released("a", 1)])
    assert scheduler.idle and scheduler.blocks_referenced == 0


def test_a_constrained_choice_waits_for_its_last_id_while_others_go_ahead() -> None:
    scheduler = Scheduler(limits())
    scheduler.add(request("a", 3, 4, grammar="digits"))
    first = planned(scheduler)
    assert scheduler.schedule(FENCE) is None
    scheduler.add(request("b", 2, 9))
    ahead = [planned(scheduler), planned(scheduler)]
    assert [shape(plan) for plan in ahead] == [[(0, 2, False, True)], [(2, 1, True, True)]]
    commit(scheduler, first)
    assert shape(planned(scheduler)) == [(3, 1, True, True), (3, 1, True, True)]


def test_a_prompt_is_scored_in_bounded_chunks_each_token_once_and_without_hits() -> None:
    scheduler = Scheduler(limits(kv_blocks=400, max_step_tokens=1000))
    scheduler.add(request("a", 300, 1))
    step(scheduler)
    scheduler.add(request("a", 600, 2, prompt_logprobs=2))
    scheduler.add(request("b", 5, 1, prompt_logprobs=0))
    plans = [planned(scheduler) for _ in range(3)]
    assert [[(row.first, row.tokens, row.scored, row.next_id) for row in plan.rows] for plan in plans] == [
        [(0, SCORED_STEP_TOKENS, 2, 9700 + 256)],
        [(256, SCORED_STEP_TOKENS, 2, 9700 + 512)],
        [(512, 88, 2, None), (0, 5, 0, None)],
    ]
    outcomes = [commit(scheduler, plan) for plan in plans]
    assert [bool(outcome.prompted) for outcome in outcomes] == [False, False, True]
    scores = {prompted.request: prompted.prompt_logprobs for prompted in outcomes[-1].prompted}
    assert [score.logprob for score in scores["a"]] == [-1.0 * position for position in range(1, 600)]
    assert len(scores["b"]) == 4
    assert counted(scheduler, "cache_hits") == [0]


def test_other_choices_of_a_scored_prompt_share_it_and_replayed_ids_are_not_scored() -> None:
    scheduler = Scheduler(limits(max_step_tokens=64))
    scheduler.add(request("a", 9, 4, choices=[Progress(0, (5, 6)), Progress(1)], prompt_logprobs=0))
    plans = [planned(scheduler), planned(scheduler)]
    assert [[(row.first, row.tokens, row.scored, row.sampled) for row in plan.rows] for plan in plans] == [
        [(0, 9, 0, False)],
        [(9, 2, None, True), (8, 1, None, True)],
    ]
    commit(scheduler, plans[0])
    outcome = commit(scheduler, plans[1])
    assert [len(prompted.prompt_logprobs) for prompted in outcome.prompted] == [8]


def test_a_scored_prompt_that_is_taken_up_by_another_choice_is_scored_on() -> None:
    scheduler = Scheduler(limits(max_step_tokens=6))
    scheduler.add(request("a", 11, 4, choices=[Progress(0), Progress(1)], prompt_logprobs=0))
    plans = [planned(scheduler)]
    scheduler.release("a", 0)
    plans += [planned(scheduler), planned(scheduler)]
    assert [[(row.first, row.tokens, row.scored) for row in plan.rows] for plan in plans] == [
        [(0, 6, 0)],
        [(4, 2, None)],
        [(6, 5, 0)],
    ]
    prompted = [told for plan in plans for told in commit(scheduler, plan).prompted]
    assert [[score.logprob for score in told.prompt_logprobs] for told in prompted] == [
        [-1.0 * n for n in range(1, 11)]
    ]
