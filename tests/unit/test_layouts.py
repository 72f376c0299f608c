"""What the benchmark of layouts reports: agreement up to the first other id, and bubbles of forwards alone."""

from __future__ import annotations

import pytest

from benchmarks.layouts import Row, reason, table
from benchmarks.layouts_figures import Answer, agreement, between, executed, rounds_from
from benchmarks.layouts_session import Layout
from echelon.bench.cases import Case
from parallel.schedule import Kind, Op
from parallel.timeline import OpRecord


def pipeline(rounds: int, slot_s: float, gap_s: float) -> list[OpRecord]:
    """Two stages and two cohorts: every slot is followed by a gap, and ids that return are waited for in it."""
    records = []
    for number in range(2 * rounds):
        start_s = number * (slot_s + gap_s)
        records.append(OpRecord(0, Op(Kind.FORWARD, number), start_s, start_s + slot_s))
        records.append(OpRecord(0, Op(Kind.BACK, number), start_s + slot_s, start_s + slot_s + gap_s))
        later_s = start_s + slot_s + gap_s
        records.append(OpRecord(1, Op(Kind.FORWARD, number), later_s, later_s + slot_s))
    return records


def test_agreement_ends_where_the_ids_part() -> None:
    reference = [Answer((1, 2, 3, 4), (-1.0, -1.0, -1.0, -1.0)), Answer((5, 6, 7, 8), (-2.0, -2.0, -2.0, -2.0))]
    answers = [Answer((1, 2, 9, 4), (-1.5, -1.0, -7.0, -9.0)), Answer((5, 6, 7, 8), (-2.0, -2.0, -2.0, -2.25))]
    found = agreement(answers, reference)
    assert (found.answers, found.identical, found.equal) == (2, 1, 6 / 8)
    assert found.greatest_difference == 0.5
    assert found.mean_difference == pytest.approx(0.75 / 6)


def test_answers_that_differ_at_once_agree_in_nothing() -> None:
    found = agreement([Answer((1,), (-1.0,))], [Answer((2,), (-1.0,))])
    assert (found.equal, found.greatest_difference, found.mean_difference) == (0.0, 0.0, 0.0)


def test_waiting_for_ids_is_idle_time() -> None:
    found = executed(pipeline(rounds=50, slot_s=0.03, gap_s=0.01), stages=2, cohorts=2)
    assert found is not None
    assert found.forwards == 100
    assert found.median_slot_ms == (30.0, 30.0)
    assert found.median_round_ms == pytest.approx(80)
    assert found.bubble == pytest.approx((0.25, 0.25), abs=0.01)


def test_nothing_is_said_of_a_stage_that_logged_nothing() -> None:
    records = pipeline(rounds=3, slot_s=1.0, gap_s=0.0)
    assert executed([record for record in records if record.stage == 0], stages=2, cohorts=2) is None
    assert executed([], stages=2, cohorts=2) is None


def test_a_piece_of_the_log_holds_what_began_in_it() -> None:
    records = pipeline(rounds=10, slot_s=1.0, gap_s=0.0)
    assert {record.op.microbatch for record in between(records, 4.0, 6.0) if record.stage == 0} == {3, 4, 5}
    drawn = rounds_from(records, stages=2, since_s=4.0, count=3)
    assert [op.microbatch for op in drawn.ops(0) if op.kind is Kind.FORWARD] == [4, 5, 6]


def test_a_layout_is_told_by_its_degrees() -> None:
    layout = Layout.parse("pipeline=2,pipeline_depth=1")
    assert (layout.stages, layout.cohorts, str(layout)) == (2, 1, "pipeline=2,pipeline_depth=1")
    assert (str(Layout({})), Layout.parse("pipeline=3").cohorts) == ("one device", 3)
    with pytest.raises(SystemExit, match="'tensr' is none of"):
        Layout.parse("tensr=2")


def test_a_layout_that_failed_is_in_the_table_with_what_the_server_said() -> None:
    text = "RuntimeError: echelon serve ended with exit code 2:\nechelon: error: --data: is too much\n"
    assert reason(text) == "--data: is too much"
    assert reason("TimeoutError: 5 s\nits log") == "TimeoutError: 5 s"
    case = Case(2, 3, 4)
    lines = table([Row("data=2", "float32", tokens_per_s={"2x3x4": 7.0}, error=reason(text))], [case]).splitlines()
    assert lines[0].split()[:2] == ["layout", "dtype"] and "2x3x4 tok/s" in lines[0]
    assert lines[1].split()[:6] == ["data=2", "float32", "-", "-", "-", "7"]
    assert lines[1].endswith("--data: is too much")
