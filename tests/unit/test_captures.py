"""Graphs that are captured while an epoch serves: which one before which step, and that answers stay what they were."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echelon.internal.link import Command, Fence
from tests.unit.paged_device import PagedDevice, answer, request
from worker.captures import PACE_STEPS, Captures, graph_rows
from worker.decode_graphs import decode_rows
from worker.engine import Commanded, Completed, EngineCore, LinkOpened, RunPlan, SendReport
from worker.lanes import Lanes
from worker.limits import EngineLimits
from worker.plan import Row, StepPlan, StepResult, decode, encode, lane_of

FENCE = Fence(1, 0, 1)
DECODES, PROMPT, UNSAMPLED = Row(0, 5, 1, None, True), Row(1, 0, 1, (7,), True), Row(2, 5, 1, None, False)
SIZES = (1, 2, 4, 8)
LIMITS = EngineLimits(8, 200, 4, 64, 400, captures=SIZES)


def plan(step: int, *rows: Row) -> tuple[StepPlan, ...]:
    return (StepPlan(FENCE, step, rows=rows),)


def in_order(captures: Captures, rows: int, steps: int = 100) -> dict[int, int]:
    """What is captured before which step, of steps of so many decode rows."""
    asked = {step: captures.before(plan(step, *[DECODES] * rows)) for step in range(1, steps)}
    return {step: size for step, size in asked.items() if size}


@pytest.mark.parametrize(
    ("rows", "order"), [(1, (8, 1, 4, 2)), (2, (8, 2, 4, 1)), (3, (8, 4, 2, 1)), (8, (8, 4, 2, 1)), (9, (8, 4, 2, 1))]
)
def test_the_largest_then_the_one_in_use_then_the_largest_that_is_left(rows: int, order: tuple[int, ...]) -> None:
    captures = Captures(SIZES)
    found = in_order(captures, rows)
    assert tuple(found.values()) == order and not captures.left
    assert list(found) == [1 + PACE_STEPS * place for place in range(len(SIZES))]


def test_a_deep_pipeline_has_no_two_captures_in_it() -> None:
    steps = list(in_order(Captures(SIZES, depth=7), 1))
    assert steps == [1, 8, 15, 22]


def test_steps_that_compute_prompts_wait_for_no_graph() -> None:
    captures = Captures(SIZES)
    assert [captures.before(plan(step, *rows)) for step, rows in enumerate(([DECODES, PROMPT], [UNSAMPLED], []))] == [
        0
    ] * 3
    assert captures.before(plan(3, DECODES)) == 8


@given(st.lists(st.lists(st.sampled_from([DECODES, PROMPT, UNSAMPLED]), max_size=4), min_size=1, max_size=3))
def test_leader_and_ranks_see_the_same_rows(lanes: list[list[Row]]) -> None:
    plans = [StepPlan(FENCE, 1, rows=tuple(sorted(rows, key=lambda row: row.given is not None))) for rows in lanes]
    shapes = tuple(map(lane_of, plans)) if len(plans) > 1 else ()
    for each in plans:
        assert decode_rows(decode(encode(replace(each, lanes=shapes)))) == graph_rows(plans)


class Leader:
    """An engine, and a device that runs each plan when the test says so."""

    def __init__(self, limits: EngineLimits) -> None:
        self.core = EngineCore(FENCE, limits)
        self.devices = [PagedDevice(limits.block_tokens) for _ in range(limits.data)]
        self.waiting: list[tuple[StepPlan, ...]] = []
        self.run: list[tuple[StepPlan, ...]] = []
        self.ids: dict[str, list[int]] = {}
        self.released: list[str] = []
        self._seq = 0
        self.step(LinkOpened(1))

    def step(self, event: LinkOpened | Commanded | Completed) -> None:
        for effect in self.core.step(0.0, event):
            match effect:
                case RunPlan(plans):
                    self.waiting.append(plans)
                case SendReport(report):
                    self._seq = max(self._seq, report.report_seq)
                    for run in report.runs:
                        self.ids.setdefault(run.request, []).extend(run.ids)
                    self.released += [released.request for released in report.released]

    def ask(self, *names: str) -> None:
        assigns = tuple(request(name, range(len(name) + 2), 6) for name in names)
        self.step(Commanded(Command(FENCE, self._seq, assigns)))

    def complete(self) -> None:
        plans = self.waiting.pop(0)
        self.run.append(plans)
        parts = [device.run(each) for device, each in zip(self.devices, plans, strict=True)]
        ids = tuple(token for part in parts for token in part.ids)
        self.step(Completed(StepResult(plans[0].step, ids, (None,) * len(ids))))

    def finish(self) -> None:
        while self.waiting:
            self.complete()

    @property
    def captured(self) -> list[int]:
        """Each before a step, the same of all data ranks."""
        found = [{each.captures for each in plans} for plans in self.run]
        assert all(len(sizes) == 1 for sizes in found)
        return [size for sizes in found for size in sizes if size]


@pytest.mark.parametrize("data", [1, 2])
def test_each_graph_is_captured_once_and_no_answer_changes(data: int) -> None:
    leader = Leader(replace(LIMITS, data=data))
    leader.ask("one", "three", "thirteen")
    leader.finish()
    assert sorted(leader.captured) == list(SIZES) and leader.captured[0] == 8
    assert leader.ids == {name: answer(request(name, range(len(name) + 2), 6)) for name in ("one", "three", "thirteen")}
    assert sorted(leader.released) == ["one", "thirteen", "three"]
    leader.core.check_integrity()


def test_what_is_left_is_captured_while_nothing_is_asked_one_at_a_time() -> None:
    leader = Leader(LIMITS)
    assert not leader.waiting, "whoever made the epoch necessary comes first"
    leader.ask("one")
    while not leader.released:
        leader.complete()
    leader.core.check_integrity()
    left = len(SIZES) - len(leader.captured)
    for _ in range(left):
        (plans,) = leader.waiting
        assert plans[0].captures and not plans[0].rows
        leader.complete()
    assert not leader.waiting and sorted(leader.captured) == list(SIZES)
    leader.ask("another")
    assert leader.waiting[0][0].rows and not leader.waiting[0][0].captures


def test_whoever_comes_meanwhile_waits_for_one_capture() -> None:
    leader = Leader(LIMITS)
    leader.ask("one")
    while not leader.released:
        leader.complete()
    assert len(leader.waiting) == 1 and not leader.waiting[0][0].rows
    leader.ask("another")
    assert [bool(plans[0].rows) for plans in leader.waiting] == [False, True]
    leader.finish()
    assert leader.ids["another"] == answer(request("another", range(9), 6)) and sorted(leader.captured) == list(SIZES)


def test_an_epoch_that_has_its_graphs_captures_none() -> None:
    lanes = Lanes(replace(LIMITS, captures=()))
    lanes.add(request("one", range(3), 6))
    plans = lanes.schedule(FENCE)
    assert plans is not None and not plans[0].captures
