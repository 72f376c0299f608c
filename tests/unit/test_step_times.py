"""StepTimes: what a rank tells of the step that it is in, and what it has learnt of that kind of step."""

from __future__ import annotations

import pytest

from echelon.internal.link import Sampling
from tests.unit.plans import FENCE
from worker.plan import Admit, Lane, PlanTables, Row, StepPlan, decode, encode
from worker.step_times import KEPT, StepTimes, kind_of


def decoding(rows: int) -> PlanTables:
    return tables(tuple(Row(slot, 5, 1, None, True) for slot in range(rows)))


def tables(rows: tuple[Row, ...], **more: object) -> PlanTables:
    return decode(encode(StepPlan(FENCE, 1, rows=rows, **more)))  # type: ignore[arg-type]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_kinds_are_modes_and_buckets() -> None:
    chunk = Row(1, 0, 9, tuple(range(9)), True)
    assert kind_of(decoding(1)) == "decode of 1 tokens"
    assert kind_of(decoding(5)) == kind_of(decoding(8)) == "decode of 8 tokens"
    assert kind_of(tables((Row(0, 5, 1, None, True), chunk))) == "prefill of 16 tokens"
    assert kind_of(tables(())) == kind_of(decoding(1))


def test_a_data_rank_steps_as_long_as_the_busiest_of_all() -> None:
    lanes = (Lane(1, True, (), ()), Lane(100, False, (), ()))
    assert kind_of(tables((Row(0, 5, 1, None, True),), lanes=lanes)) == "prefill of 128 tokens"


def test_a_step_that_is_like_no_other_has_no_kind() -> None:
    sampling = Sampling(1.0, 1.0, 0, 8, 1, grammar="start: /a/")
    assert kind_of(tables((Row(0, 0, 2, (1, 2), True),), admits=(Admit(0, 0, 2, sampling),))) == ""
    assert kind_of(tables((Row(0, 5, 1, None, True),), rebalances=True)).endswith("experts move")
    assert kind_of(tables((Row(0, 5, 1, None, True),), captures=8)).endswith("a graph is captured")


def run(times: StepTimes, clock: Clock, took_s: float, step: PlanTables) -> None:
    times.begin(step)
    clock.now += took_s
    times.end()


def test_the_first_of_a_kind_teaches_nothing_and_the_slowest_is_slowly_forgotten() -> None:
    clock = Clock()
    times = StepTimes(clock)
    assert times.current() == ("", 0.0)
    run(times, clock, 30.0, decoding(8))
    run(times, clock, 2.0, decoding(8))
    run(times, clock, 0.5, decoding(8))
    times.begin(decoding(8))
    assert times.current()[1] == pytest.approx(2.0 * KEPT)
    times.begin(decoding(3))
    assert times.current()[0] == "decode of 8 tokens", "the oldest that has not ended"
    times.end()
    assert times.current() == ("decode of 4 tokens", 0.0)


def test_a_step_that_waits_for_the_one_before_it_is_not_the_slower_for_it() -> None:
    clock = Clock()
    times = StepTimes(clock)
    run(times, clock, 1.0, decoding(1))
    times.begin(decoding(1))
    times.begin(decoding(1))
    clock.now += 4.0
    times.end()
    clock.now += 1.0
    times.end()
    times.begin(decoding(1))
    assert times.current()[1] == pytest.approx(4.0 * KEPT)
    clock.now += 1.0
    times.end()
    for _ in range(2):
        run(times, clock, 7.0, decoding(1))
    times.begin(decoding(1))
    assert times.current()[1] == 7.0, "it rises at once"
