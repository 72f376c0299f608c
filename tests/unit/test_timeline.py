"""Simulated pipelines: closed forms of bubble and round, no deadlock for any arrivals, and deadlocks that are found."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.schedule import (
    Kind,
    Op,
    Schedule,
    decode_rounds,
    gpipe,
    inference,
    interleaved,
    one_f_one_b,
)
from parallel.timeline import (
    DeadlockError,
    Edge,
    OpRecord,
    Timeline,
    edges,
    held,
    ideal_bubble,
    ideal_round_s,
    in_order,
    queued,
    simulate,
)

DEGREES = [(p, m) for p in (1, 2, 4, 8) for m in (1, 4, 16)]


def constant(forward_s: float, back_s: float) -> Callable[[int, Op], float]:
    return lambda stage, op: forward_s if op.kind is Kind.FORWARD else back_s


def starts_s(timeline: Timeline, stage: int, kind: Kind = Kind.FORWARD) -> list[float]:
    return [record.start_s for record in timeline.of_stage(stage) if record.op.kind is kind]


@pytest.mark.parametrize(("stages", "microbatches"), DEGREES)
@pytest.mark.parametrize("build", [gpipe, one_f_one_b])
@pytest.mark.parametrize("back_s", [1.0, 2.0])
def test_the_bubble_of_training_is_the_closed_form(
    build: Callable[[int, int], Schedule], stages: int, microbatches: int, back_s: float
) -> None:
    timeline = simulate(build(stages, microbatches), constant(1.0, back_s), queue_length=1)
    assert timeline.span_s == (microbatches + stages - 1) * (1 + back_s)
    assert timeline.bubble() == pytest.approx(ideal_bubble(stages, microbatches))


@pytest.mark.parametrize("stages", [2, 4, 8])
@pytest.mark.parametrize("chunks", [2, 3, 4])
@pytest.mark.parametrize("groups", [2, 3])
def test_interleaving_divides_the_bubble(stages: int, chunks: int, groups: int) -> None:
    microbatches = stages * groups
    timeline = simulate(interleaved(stages, microbatches, chunks), constant(1 / chunks, 2 / chunks), queue_length=2)
    assert timeline.bubble() == pytest.approx(ideal_bubble(stages, microbatches, chunks))
    assert timeline.bubble() < ideal_bubble(stages, microbatches)


@pytest.mark.parametrize(("stages", "microbatches"), DEGREES)
def test_the_bubble_of_independent_microbatches_at_inference(stages: int, microbatches: int) -> None:
    timeline = simulate(inference(stages, [0] * microbatches, stages), constant(1.0, 0.0), queue_length=1)
    assert timeline.span_s == microbatches + stages - 1
    assert timeline.bubble() == pytest.approx(ideal_bubble(stages, microbatches))
    if microbatches >= stages:
        assert timeline.bubble(*timeline.filled()) == pytest.approx(0)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.lists(st.integers(1, 6), min_size=1, max_size=9), st.integers(0, 2))
def test_a_round_takes_the_slowest_slot_through_all_stages(stages: int, slots: list[int], latency: int) -> None:
    """Cohorts that take turns, however many: max(sum of slots, stages * slowest + the way), as ideal_round_s says."""
    cohorts, rounds = len(slots), 30
    timeline = simulate(
        decode_rounds(stages, cohorts, rounds, cohorts),
        lambda stage, op: slots[op.microbatch % cohorts] if op.kind is Kind.FORWARD else 0.0,
        latency_s=latency,
    )
    begun_s = starts_s(timeline, 0)[::cohorts]
    way_s = latency * stages if stages > 1 else 0
    assert begun_s[-1] - begun_s[-11] == 10 * ideal_round_s(slots, stages, way_s)


def test_what_equal_slots_and_one_more_cohort_gain() -> None:
    """The reasons for balancing cohorts, and for p + 1 of them where tokens take their time."""

    def bubble(slots: list[float], latency_s: float = 0.0) -> float:
        cohorts = len(slots)
        timeline = simulate(
            decode_rounds(4, cohorts, 30, cohorts),
            lambda stage, op: slots[op.microbatch % cohorts] if op.kind is Kind.FORWARD else 0.0,
            latency_s=latency_s,
            queue_length=2,
        )
        since_s, until_s = timeline.filled()
        return timeline.bubble(since_s + 20, until_s - 20)

    assert bubble([1.0] * 4) == pytest.approx(0)
    assert bubble([0.7, 1.3, 0.2, 1.0]) == pytest.approx(1 - 3.2 / 5.2, abs=0.01)
    assert bubble([4.0]) == pytest.approx(0.75, abs=0.01)
    assert bubble([1.0] * 4, latency_s=0.25) == pytest.approx(0.2, abs=0.01)
    assert bubble([1.0] * 5, latency_s=0.25) == pytest.approx(0)


@st.composite
def arrivals(draw: st.DrawFn) -> tuple[Schedule, int, dict[tuple[int, int, Kind], float], float, int, list[float]]:
    """A schedule of any stream, its depth, costs by (stage, micro-batch, kind), latency, queue length, releases."""
    stages, count = draw(st.integers(1, 8)), draw(st.integers(1, 20))
    depth = draw(st.integers(1, stages + 1))
    schedule = inference(stages, [draw(st.integers(0, m)) for m in range(count)], depth)
    chance = draw(st.randoms(use_true_random=False))
    costs = {
        (s, m, kind): chance.choice([0.0, 0.5, 1.0, 3.0]) for s in range(stages) for m in range(count) for kind in Kind
    }
    release_s = sorted(chance.choice([0.0, 1.0, 5.0, 30.0]) for _ in range(count))
    return schedule, depth, costs, draw(st.sampled_from([0.0, 0.25])), draw(st.integers(1, 3)), release_s


@settings(max_examples=150, deadline=None)
@given(arrivals())
def test_any_arrivals_complete_within_bounds(
    case: tuple[Schedule, int, dict[tuple[int, int, Kind], float], float, int, list[float]],
) -> None:
    schedule, depth, costs, latency_s, queue_length, release_s = case
    timeline = simulate(
        schedule,
        lambda stage, op: costs[stage, op.microbatch, op.kind],
        latency_s=latency_s,
        queue_length=queue_length,
        release_s=release_s,
    )
    assert tuple(map(timeline.ops, range(schedule.stages))) == schedule.ops, "each operation once, in the rule's order"
    times = {(record.stage, record.op): record for record in timeline.records}
    for record in timeline.records:
        source = schedule.source(record.stage, record.op)
        if source is not None:
            way_s = latency_s if source.stage != record.stage else 0.0
            assert times[source].end_s + way_s <= record.start_s, "nothing begins before its input is there"
        if record.op.kind is Kind.FORWARD:
            assert record.start_s >= release_s[record.op.microbatch]
    for stage in range(schedule.stages):
        done = timeline.of_stage(stage)
        assert all(one.end_s <= other.start_s for one, other in pairwise(done))
    for edge, most in queued(schedule, timeline).items():
        assert most <= (queue_length if edge.kind is Kind.FORWARD else depth)
    first, last = starts_s(timeline, 0), starts_s(timeline, 0, Kind.BACK)
    for started, start_s in enumerate(first, 1):
        assert started - sum(return_s <= start_s for return_s in last) <= depth, "at most depth are in flight"


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 8), st.integers(1, 24), st.integers(1, 3), st.randoms(use_true_random=False))
def test_training_needs_no_more_than_one_place_in_a_queue(
    stages: int, microbatches: int, queue_length: int, chance: Random
) -> None:
    for build in (gpipe, one_f_one_b):
        schedule = build(stages, microbatches)
        timeline = simulate(schedule, lambda *_: chance.choice([0.5, 1, 4]), queue_length=queue_length)
        assert tuple(map(timeline.ops, range(stages))) == schedule.ops
        assert all(most <= queue_length for most in queued(schedule, timeline).values())


@pytest.mark.parametrize("stages", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("chunks", [2, 3, 5])
def test_interleaving_deadlocks_in_queues_of_one_and_not_in_queues_of_two(stages: int, chunks: int) -> None:
    for groups in (1, 2, 3):
        schedule = interleaved(stages, stages * groups, chunks)
        simulate(schedule, constant(1.0, 2.0), queue_length=2)
    with pytest.raises(DeadlockError, match=r"stage 0 at F\(0\.1\) waits for the room that is made by F"):
        simulate(schedule, constant(1.0, 2.0), queue_length=1)


def test_a_wrong_order_is_a_deadlock_that_says_who_waits() -> None:
    forward, back = Op(Kind.FORWARD, 0), Op(Kind.BACK, 0)
    schedule = Schedule("wrong", 1, ((back, forward), (forward, back)))
    with pytest.raises(DeadlockError) as error:
        simulate(schedule, constant(1.0, 1.0))
    assert str(error.value) == (
        "stage 0 at B(0) waits for the output of B(0) of stage 1; "
        "stage 1 at F(0) waits for the output of F(0) of stage 0"
    )


def test_edges_of_inference_skip_the_inner_stages() -> None:
    assert set(edges(decode_rounds(4, 4, 1, 4))) == {
        Edge(0, 1, Kind.FORWARD),
        Edge(1, 2, Kind.FORWARD),
        Edge(2, 3, Kind.FORWARD),
        Edge(3, 0, Kind.BACK),
    }


def test_held_counts_what_is_out() -> None:
    assert held(one_f_one_b(4, 8).ops[1]) == 3
    assert held(()) == 0


def test_busy_time_counts_overlapping_operations_once() -> None:
    records = [
        OpRecord(0, Op(Kind.FORWARD, 0), 10.0, 12.0),
        OpRecord(0, Op(Kind.BACK, 0), 11.0, 11.5),
        OpRecord(0, Op(Kind.FORWARD, 1), 11.0, 13.0),
        OpRecord(1, Op(Kind.FORWARD, 0), 13.0, 20.0),
    ]
    timeline = in_order(reversed(records))
    assert (timeline.start_s, timeline.end_s, timeline.stages) == (10.0, 20.0, 2)
    assert (timeline.busy_s(0), timeline.busy_s(1)) == (3.0, 7.0)
    assert timeline.bubble() == pytest.approx(0.5)
    assert timeline.busy_s(0, 11.5, 12.5) == 1.0
    assert timeline.bubble(13.0, 20.0) == pytest.approx(0.5)
    assert timeline.bubble(13.0, 13.0) == 0.0


def test_an_empty_timeline_has_no_bubble() -> None:
    empty = in_order([], stages=3)
    assert (empty.span_s, empty.bubble(), empty.stages) == (0.0, 0.0, 3)
