"""The rule of the pipeline: its lists against the papers', and what holds for any stream of plans and any timing."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.schedule import (
    NO_RETURNS,
    Kind,
    Op,
    Schedule,
    StageState,
    decode_rounds,
    gpipe,
    inference,
    interleaved,
    next_op,
    one_f_one_b,
    stage_state,
)
from parallel.timeline import edges, held


def rows(schedule: Schedule) -> list[str]:
    """F0 B0 ... of each stage; chunks as F0.1."""
    return [" ".join(str(op).replace("(", "").replace(")", "") for op in row) for row in schedule.ops]


def forward(microbatch: int) -> Op:
    return Op(Kind.FORWARD, microbatch)


def back(microbatch: int) -> Op:
    return Op(Kind.BACK, microbatch)


@st.composite
def streams(draw: st.DrawFn) -> tuple[int, int, list[int]]:
    """Stages, depth, and for each micro-batch how many returns it needs."""
    stages = draw(st.integers(1, 8))
    depth = draw(st.integers(1, stages + 2))
    count = draw(st.integers(1, 24))
    return stages, depth, [draw(st.integers(0, m)) for m in range(count)]


def test_1f1b_is_the_papers() -> None:
    """Narayanan et al. 2021 (Megatron-LM), figure 4: warm-up, one forward one backward, cool-down."""
    assert rows(one_f_one_b(4, 8)) == [
        "F0 F1 F2 F3 B0 F4 B1 F5 B2 F6 B3 F7 B4 B5 B6 B7",
        "F0 F1 F2 B0 F3 B1 F4 B2 F5 B3 F6 B4 F7 B5 B6 B7",
        "F0 F1 B0 F2 B1 F3 B2 F4 B3 F5 B4 F6 B5 F7 B6 B7",
        "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 F6 B6 F7 B7",
    ]


def test_gpipe_goes_all_forward_then_all_back() -> None:
    assert rows(gpipe(3, 4)) == ["F0 F1 F2 F3 B0 B1 B2 B3"] * 3


def test_interleaved_is_the_papers() -> None:
    """The first device of the same paper's figure 4 (below): chunk 0 and chunk 1 in groups of four micro-batches."""
    first = rows(interleaved(4, 8, 2))[0]
    assert first.startswith("F0 F1 F2 F3 F0.1 F1.1 F2.1 F3.1 F4 F5 F6 B0.1 F7 B1.1 F4.1 B2.1 F5.1 B3.1 F6.1 B0 F7.1 B1")
    last = rows(interleaved(4, 8, 2))[3]
    assert last.startswith("F0 F1 F2 F3 F0.1 B0.1 F1.1 B1.1 F2.1 B2.1 F3.1 B3.1 F4 B0 F5 B1")


def test_inference_alternates_forwards_and_returns() -> None:
    """Four cohorts on four stages: a return stands before the forward that reads its tokens; inner stages have none."""
    assert rows(decode_rounds(4, 4, 2, 4)) == [
        "F0 F1 F2 F3 B0 F4 B1 F5 B2 F6 B3 F7 B4 B5 B6 B7",
        "F0 F1 F2 F3 F4 F5 F6 F7",
        "F0 F1 F2 F3 F4 F5 F6 F7",
        "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 F6 B6 F7 B7",
    ]
    assert rows(decode_rounds(2, 1, 3, 3))[0] == "F0 B0 F1 B1 F2 B2", "one cohort cannot run ahead of itself"
    assert rows(inference(2, [0] * 4, 3))[0] == "F0 F1 F2 B0 F3 B1 B2 B3", "chunks of a prompt fill the depth"


def test_the_rule_step_by_step() -> None:
    state = StageState(limit=2)
    assert next_op(state) is None, "nothing is announced"
    state = state.announce().announce()
    assert next_op(state) == forward(0)
    state = state.apply(forward(0)).apply(forward(1))
    assert next_op(state) == back(0), "as many are out as may be"
    state = state.apply(back(0))
    assert next_op(state) is None, "whether the other returns first depends on what comes"
    assert next_op(state.announce(1)) == forward(2), "its one return is in"
    assert next_op(state.announce(2)) == back(1), "it reads the tokens of 1"
    assert next_op(state.drain()) == back(1), "nothing comes"
    assert next_op(state.drain().apply(back(1))) is None
    assert next_op(state.drain().announce(0)) == forward(2), "the stream goes on"


def test_a_microbatch_cannot_need_what_comes_after_it() -> None:
    StageState(limit=2).announce(0).announce(1)
    with pytest.raises(AssertionError, match="micro-batch 1 needs 2 returns"):
        StageState(limit=2).announce(0).announce(2)


@settings(deadline=None)
@given(streams(), st.randoms(use_true_random=False))
def test_a_stages_operations_follow_from_the_plan_stream_alone(
    stream: tuple[int, int, list[int]], timing: Random
) -> None:
    """Whenever plans arrive and operations end: every rank does what the unrolled list says."""
    stages, depth, afters = stream
    schedule = inference(stages, afters, depth)
    for stage in range(stages):
        state, left, done = stage_state(stage, stages, depth), list(afters), []
        while True:
            op = next_op(state)
            if op is not None and (not left or timing.random() < 0.5):
                done.append(op)
                state = state.apply(op)
            elif left:
                state = state.announce(left.pop(0))
            elif not state.draining:
                state = state.drain()
            else:
                break
        assert tuple(done) == schedule.ops[stage]


@settings(deadline=None)
@given(streams())
def test_each_operation_once_in_order_and_within_bounds(stream: tuple[int, int, list[int]]) -> None:
    stages, depth, afters = stream
    schedule = inference(stages, afters, depth)
    numbers = list(range(len(afters)))
    for stage, ops in enumerate(schedule.ops):
        inner = 0 < stage < stages - 1
        assert [op.microbatch for op in ops if op.kind is Kind.FORWARD] == numbers
        assert [op.microbatch for op in ops if op.kind is Kind.BACK] == ([] if inner else numbers)
        if not inner:
            assert held(ops) <= (1 if stage == stages - 1 else depth)
            assert all(ops.index(forward(m)) < ops.index(back(m)) for m in numbers)
    for microbatch, after in enumerate(afters):
        before = schedule.ops[0][: schedule.ops[0].index(forward(microbatch))]
        assert sum(op.kind is Kind.BACK for op in before) >= after, "it reads tokens that have returned"


TRAINING = [
    *(gpipe(p, m) for p in (1, 2, 3, 8) for m in (1, 2, 7)),
    *(one_f_one_b(p, m) for p in (1, 2, 3, 8) for m in (1, 2, 7, 20)),
    *(interleaved(p, p * groups, v) for p in (1, 2, 3, 4, 8) for groups in (1, 2, 3) for v in (2, 3)),
]


@pytest.mark.parametrize("schedule", TRAINING, ids=lambda s: f"{s.name}-{s.stages}-{s.microbatches}-{s.chunks}")
def test_static_lists_are_complete(schedule: Schedule) -> None:
    """Every chunk of every micro-batch once forward, then once back, on every stage."""
    every = [Op(kind, m, c) for kind in Kind for m in range(schedule.microbatches) for c in range(schedule.chunks)]
    for ops in schedule.ops:
        assert Counter(ops) == Counter(every)
        assert all(ops.index(op) < ops.index(op._replace(kind=Kind.BACK)) for op in every if op.kind is Kind.FORWARD)


@pytest.mark.parametrize("schedule", TRAINING, ids=lambda s: f"{s.name}-{s.stages}-{s.microbatches}-{s.chunks}")
def test_every_edge_is_a_queue(schedule: Schedule) -> None:
    """The receiver takes outputs in the order in which they are sent: no message needs a tag."""
    for edge, passed in edges(schedule).items():
        sent = [schedule.ops[edge.sender].index(source.op) for source, _ in passed]
        assert sent == sorted(sent)


def test_1f1b_holds_few_activations_where_gpipe_holds_all() -> None:
    assert [held(ops) for ops in one_f_one_b(4, 32).ops] == [4, 3, 2, 1]
    assert [held(ops) for ops in gpipe(4, 32).ops] == [32] * 4


def test_interleaving_refuses_what_it_cannot_order() -> None:
    with pytest.raises(AssertionError, match="6 micro-batches do not come in groups of 4"):
        interleaved(4, 6, 2)
    with pytest.raises(AssertionError, match="use one_f_one_b"):
        interleaved(4, 8, 1)


@settings(deadline=None)
@given(st.integers(1, 8), st.randoms(use_true_random=False))
def test_the_leader_keeps_the_pipeline_full_and_never_more(stages: int, chance: Random) -> None:
    """Work comes and results come at any time; F while there is work and room, B while something is out, else wait."""
    state, work, to_come = StageState(stages + 1), 0, 30
    while to_come or work or state.in_flight:
        op = next_op(state.offering(work > 0))
        if op == forward(state.forwarded):
            assert work and state.in_flight <= stages
            state, work = state.offering(True).apply(op), work - 1
        elif to_come and chance.random() < 0.5:
            work, to_come = work + 1, to_come - 1
        elif op is not None:
            assert op == back(state.returned) and state.in_flight and (not work or state.in_flight == stages + 1)
            state = state.apply(op)
        else:
            assert not work and not state.in_flight
    assert (state.forwarded, state.returned) == (30, 30)


def test_roles_of_the_stages() -> None:
    assert [stage_state(stage, 4, 5).limit for stage in range(4)] == [5, NO_RETURNS, NO_RETURNS, 1]
    assert stage_state(0, 1, 2).limit == 1
