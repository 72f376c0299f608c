"""Times to look at requests: none is missed, none is kept for what is forgotten; and the queue of those that wait."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from coordinator.requests.timers import SLACK, Timers
from coordinator.requests.waiting import Waiting

IDS = st.sampled_from("abc")


@given(st.lists(st.tuples(st.sampled_from(("look", "discard", "take")), IDS, st.integers(0, 9)), max_size=60))
def test_each_request_comes_up_at_its_earliest_time(steps: list[tuple[str, str, int]]) -> None:
    """Against a dictionary of the earliest times."""
    timers, expected = Timers(), dict[str, float]()
    for kind, request_id, when in steps:
        if kind == "look":
            timers.look_at(request_id, when)
            expected[request_id] = min(when, expected.get(request_id, when))
        elif kind == "discard":
            timers.discard(request_id)
            expected.pop(request_id, None)
        else:
            due = sorted(time for time in expected.values() if time <= when)
            came: list[float] = []
            while (found := timers.take_due(when)) is not None:
                came.append(expected.pop(found))
            assert came == due
    assert timers.take_due(-1) is None


def test_what_is_forgotten_leaves_no_time_behind() -> None:
    """A day's deadline of each, which an end after a second overtakes."""
    timers = Timers()
    for number in range(10_000):
        request_id = f"job.nightly.{number}"
        timers.look_at(request_id, number + 86_400.0)
        timers.look_at(request_id, number + 1.0)
        while (due := timers.take_due(number)) is not None:
            timers.discard(due)
        assert len(timers) <= 2 * 3 + SLACK


def waits(number: int) -> Any:
    """As much of a life as a queue looks at."""
    request = SimpleNamespace(priority=0, prompt=(1, 2))
    return SimpleNamespace(request_id=f"r{number}", arrival=number, entry=SimpleNamespace(request=request))


def test_those_that_leave_a_queue_leave_no_place_behind() -> None:
    """Nobody is taken, the first one waits, and all behind it give up."""
    waiting, head = Waiting(), waits(0)
    waiting.add(head)
    for number in range(1, 1000):
        life = waits(number)
        waiting.add(life)
        waiting.discard(life)
        assert len(waiting) <= 2 * 2 + SLACK
    assert waiting.first is head and waiting.prompt_tokens == 2
