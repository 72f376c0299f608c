"""Stages of a model in float64: every choice gets the ids it gets on one rank, in the operations of the schedule."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from pathlib import Path

import pytest

from echelon.internal.link import Abandon, Assign, Command
from parallel.degrees import Degrees
from parallel.schedule import Kind, Op, stage_state, unroll
from tests.tiny import make_checkpoint
from tests.unit.paged_device import request
from tests.unit.pipelines import Pipeline
from tests.unit.plans import CPU, FENCE
from tests.unit.test_engine_on_model import (
    BLOCK_TOKENS,
    MAX_CONTEXT,
    Answers,
    Replica,
    check_same,
)
from tests.unit.test_engine_on_model import assigns as assigns
from worker.limits import EngineLimits
from worker.op_clock import OpClock


def limits(
    stages: int, depth: int, *, data: int = 1, kv_blocks: int = 24, max_running: int = 4, step: int = 9
) -> EngineLimits:
    return EngineLimits(max_running, kv_blocks, BLOCK_TOKENS, step, MAX_CONTEXT, stages=stages, depth=depth, data=data)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), num_hidden_layers=3, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def alone(checkpoint: Path, assigns: list[Assign]) -> Answers:
    """All on one rank, with blocks for everything."""
    return Replica(checkpoint, kv_blocks=200, max_step_tokens=MAX_CONTEXT).answer(assigns)


def check_schedule(pipeline: Pipeline, degrees: Degrees, depth: int) -> None:
    """Each rank has done what next_op makes of the stream of plans; nothing has to come back to a stage alone."""
    for number, rank in enumerate(pipeline.ranks):
        stage = degrees.place(number).pipeline_rank
        state = stage_state(stage, degrees.pipeline, depth)
        expected: list[Op] = []
        for plan in pipeline.plans:
            state = state.drain() if plan is None else state.announce(plan.after)
            ops = unroll(state)
            for op in ops:
                state = state.apply(op)
            expected += [op for op in ops if op.kind is Kind.FORWARD or degrees.pipeline > 1]
        assert [op for op, _ in rank.executed] == expected
        assert [queued.step for op, queued in rank.executed] == [op.microbatch + 1 for op in expected]


@pytest.mark.parametrize(
    ("degrees", "depth"),
    [
        (Degrees(pipeline=2), 2),
        (Degrees(pipeline=2), 1),
        (Degrees(pipeline=3), 4),
        (Degrees(pipeline=2, tensor=2), 3),
    ],
    ids=str,
)
def test_stages_answer_as_one_rank_does(
    degrees: Degrees, depth: int, checkpoint: Path, assigns: list[Assign], alone: Answers
) -> None:
    """In preemption, cache hits, shared prompts, constraints, penalties and scored prompts."""
    with Pipeline(checkpoint, degrees, limits(degrees.pipeline, depth)) as pipeline:
        found = Answers()
        found.take(pipeline.answer(assigns))
    check_same(found, alone)
    check_schedule(pipeline, degrees, depth)
    happened = {name for name, count in pipeline.core.stats().counters.items() if count}
    assert happened >= {"preemptions", "cache_hits", "chunked_prompts", "shared_prefix_tokens"}


@pytest.mark.parametrize(
    ("family", "degrees", "depth"),
    [
        ("mixtral", Degrees(pipeline=2, data=2), 2),
        pytest.param("llama", Degrees(data=2), 1, marks=pytest.mark.long),
        pytest.param("qwen3-moe", Degrees(data=2, expert=2), 1, marks=pytest.mark.long),
        pytest.param("qwen3-moe", Degrees(data=2, tensor=2, expert=2), 1, marks=pytest.mark.long),
        pytest.param("mixtral", Degrees(pipeline=2, data=2, tensor=2, expert=4), 3, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_data_ranks_answer_as_one_rank_does(
    family: str, degrees: Degrees, depth: int, tmp_path: Path, assigns: list[Assign]
) -> None:
    """Each with a batch and a pool of its own, in lockstep; one of them has nothing to do at the end."""
    directory = make_checkpoint(tmp_path / family, family, num_hidden_layers=3)
    expected = Replica(directory, kv_blocks=200, max_step_tokens=MAX_CONTEXT).answer(assigns)
    both = limits(degrees.pipeline, depth, data=degrees.data, kv_blocks=18, max_running=3)
    with Pipeline(directory, degrees, both) as pipeline:
        found = Answers()
        found.take(pipeline.answer(assigns))
    check_same(found, expected)
    check_schedule(pipeline, degrees, depth)
    lanes = [lane for plan in pipeline.plans if plan is not None for lane in [plan.lanes]]
    for data_rank in range(degrees.data):
        assert sum(lane[data_rank].tokens for lane in lanes) > 0, "each had a part in it"
    assert any(0 in {shape.tokens for shape in lane} for lane in lanes), "one stood by while the other had work"


def test_experts_move_while_requests_run(tmp_path: Path, assigns: list[Assign]) -> None:
    """Every five steps, by loads that random routers make uneven: no answer changes."""
    directory = make_checkpoint(tmp_path / "moe", "qwen3-moe")
    expected = Replica(directory, kv_blocks=200, max_step_tokens=MAX_CONTEXT).answer(assigns)
    moving = replace(limits(1, 1, data=2, kv_blocks=18, max_running=3), rebalance_steps=5)
    with Pipeline(directory, Degrees(data=2, expert=2), moving) as pipeline:
        found = Answers()
        found.take(pipeline.answer(assigns))
    check_same(found, expected)
    assert [plan.step for plan in pipeline.plans if plan and plan.rebalances] == list(
        range(5, pipeline.completed + 1, 5)
    )
    model = pipeline.ranks[0].model
    assert model is not None
    placements = [layer.mlp.dispatcher.map.placement for layer in model.layers]  # type: ignore[attr-defined]
    in_order = tuple(tuple(range(first, first + 4)) for first in (0, 4))
    assert any(placement.slots != in_order for placement in placements), "some expert has moved"


def test_a_slot_is_taken_again_while_ids_of_its_last_owner_travel(checkpoint: Path) -> None:
    """Cancelled in the middle, its slot goes to another at once: what comes back late must not touch that one."""
    stranger = request("stranger", [9] * 5, 40, temperature=1.0)
    waiting = request("waiting", [40 + i for i in range(30)], 20, temperature=0.0, repetition_penalty=1.3)
    expected = Replica(checkpoint, kv_blocks=200, max_step_tokens=MAX_CONTEXT).answer([waiting])
    with Pipeline(checkpoint, Degrees(pipeline=2), limits(2, 2, max_running=1)) as pipeline:
        pipeline.command(Command(FENCE, 0, (stranger, waiting)))
        for _ in range(4):
            pipeline.complete()
        pipeline.command(Command(FENCE, 0, abandons=(Abandon("stranger", stranger.attempt),)))
        found = Answers()
        pipeline.outcome.runs = [run for run in pipeline.outcome.runs if run.request != "stranger"]
        found.take(pipeline.answer([]))
    assert found.ids["waiting", 0] == expected.ids["waiting", 0]


def test_scores_on_their_way_back_block_nobody(checkpoint: Path) -> None:
    """Each step brings two tensors back, and far more steps are in flight than two stages need."""
    prompts = [request(f"r{number}", list(range(2, 42)), 4, prompt_logprobs=1) for number in range(6)]
    deep = limits(2, 8, kv_blocks=200, max_running=6, step=8)
    with Pipeline(checkpoint, Degrees(pipeline=2), deep) as pipeline:
        found = Answers()
        found.take(pipeline.answer(prompts))
    assert [len(found.prompts[prompt.request]) for prompt in prompts] == [39] * 6


def test_steps_are_under_way_on_all_stages_at_once(checkpoint: Path) -> None:
    """With slots of 50 ms a round of p cohorts takes little more than p slots, where one by one it would be p * p."""
    stages, slot_s = 3, 0.05

    def slow(op: Op) -> None:
        time.sleep(slot_s if op.kind is Kind.FORWARD else 0)

    ample = limits(stages, stages, kv_blocks=200, max_running=6, step=64)
    with Pipeline(checkpoint, Degrees(pipeline=stages), ample, slow) as pipeline:
        pipeline.answer([request(f"r{number}", [5 + number] * 4, 30) for number in range(6)])
    first = pipeline.ranks[0].executed
    out = [1 if op.kind is Kind.FORWARD else -1 for op, _ in first]
    assert max(sum(out[:end]) for end in range(len(out) + 1)) >= stages
    decoding = [plan for plan in pipeline.plans if plan is not None and all(row.given is None for row in plan.rows)]
    assert [len(plan.rows) for plan in decoding[stages : stages + 6]] == [2] * 6, "cohorts are of equal size"
    clock = OpClock(CPU)
    starts_s = [clock.at(queued.span.start) for op, queued in first if op.kind is Kind.FORWARD]
    rounds_s = [late - early for early, late in zip(starts_s, starts_s[stages:], strict=False)]
    computed_s = max(statistics.median(queued.span.seconds for _, queued in rank.executed) for rank in pipeline.ranks)
    assert stages * slot_s <= min(rounds_s) <= 1.5 * stages * (slot_s + computed_s)


def test_more_cohorts_than_requests_leave_nobody_waiting(checkpoint: Path) -> None:
    """One request alone steps as often as the pipeline lets it; each step waits for the ids of the one before."""
    with Pipeline(checkpoint, Degrees(pipeline=2), limits(2, 2)) as pipeline:
        pipeline.answer([request("r", [5] * 4, 6)])
    plans = [plan for plan in pipeline.plans if plan is not None]
    assert [plan.after for plan in plans if plan.rows[0].given is None] == [plan.step - 1 for plan in plans[-5:]]
