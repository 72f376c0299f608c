"""Budgets of restarts: a device that faults again and again is left alone for longer and longer, and never given up."""

from __future__ import annotations

import pytest

from coordinator.replica.core import ReplicaCore
from coordinator.replica.events import Acquitted, Beat, Died, Effect, Emit, Fault, Killed, StartEnded, Tick
from coordinator.replica.recovery import MAX_BACKOFF_S, Budget, Failures, Restart, backoff_s, restart
from coordinator.replica.recovery import Fault as DeviceFault
from coordinator.replica.state import State
from tests.unit.test_replica import form, launch, make

BUDGET = Budget()


def faults(*times: float, rank: int = 1) -> list[DeviceFault]:
    return [DeviceFault(when_s, rank) for when_s in times]


@pytest.mark.parametrize(
    ("failures", "history", "wait_s", "suspect", "quarantined"),
    [
        (1, [], 0.0, None, False),
        (3, [], 2.0, None, False),
        (1, faults(1000), 0.0, None, False),
        (1, faults(900, 1000), 0.0, 1, False),
        (2, faults(800, 900, 1000), 1.0, 1, False),
        (1, faults(700, 800, 900, 1000), 30.0, 1, True),
        (9, faults(600, 700, 800, 900, 1000), 60.0, 1, True),
        (9, faults(*range(900, 1001)), 120.0, 1, True),
        (1, [*faults(100, 200, 300), *faults(1000)], 0.0, None, False),  # long ago
        (1, [*faults(700, 800, 900, rank=0), *faults(1000)], 0.0, None, False),  # of another device
    ],
)
def test_restarts(
    failures: int, history: list[DeviceFault], wait_s: float, suspect: int | None, quarantined: bool
) -> None:
    found = restart(1000.0, failures, history, BUDGET)
    assert (found.wait_s, found.suspect, found.quarantined) == (wait_s, suspect, quarantined)
    assert found.reason


def test_backing_off_is_bounded() -> None:
    assert [backoff_s(failures) for failures in (1, 2, 3, 4, 10_000)] == [0.0, 1.0, 2.0, 4.0, MAX_BACKOFF_S]
    assert not list(Restart(0.0, "at once").told())


def serve_again(core: ReplicaCore, now: float) -> str:
    core.step(now, Killed(core.fence.epoch))
    core.step(now, Tick())
    assert core.state is State.LAUNCHING
    form(core, now)
    return core.incarnation()


def told(effects: list[Effect], *kinds: str) -> list[Emit]:
    return [effect for effect in effects if isinstance(effect, Emit) and effect.kind in kinds]


def start() -> ReplicaCore:
    core = make()
    launch(core)
    form(core, 1.0)
    core.step(1.0, StartEnded())
    return core


def test_a_device_that_breaks_steps_again_and_again_is_quarantined_and_tried_again() -> None:
    core, now = start(), 1.0
    heard: list[Emit] = []
    for _ in range(4):
        now += 20.0
        broken = Fault(0, core.incarnation(), "ready", "CUDA error", first_step=1, last_step=1, requests=("a",))
        heard = told(core.step(now, broken), "device.suspect", "device.quarantined", "replica.waiting")
        core.step(now, Killed(core.fence.epoch))
        if core.state is State.LAUNCHING:
            form(core, now)
    assert [emit.kind for emit in heard] == ["device.quarantined", "replica.waiting"]
    assert heard[0].subject == "rank/0/0" and heard[0].detail["wait_s"] == 30.0
    states = [core.state]
    assert "CUDA error" in core.reason
    assert core.step(now + 29.0, Tick()) == []
    core.step(now + 30.0, Tick())
    states.append(core.state)
    form(core, now + 31.0)
    assert [*states, core.state] == [State.WAITING, State.LAUNCHING, State.READY]
    assert not core.reason


def test_no_number_of_kills_makes_a_device_suspect() -> None:
    core, now = start(), 1.0
    for _ in range(20):
        now += 20.0
        effects = core.step(now, Died(1, core.incarnation()))
        assert not told(effects, "device.suspect", "device.quarantined", "replica.waiting")
        serve_again(core, now)


def test_another_device_is_tried_at_once_however_quickly_the_last_one_failed() -> None:
    failures = Failures(BUDGET)
    for fault in (*faults(700, rank=0), *faults(996, 997, 998, 999)):
        failures.failed(fault, settled=False)
    assert failures.restart(1000.0, True).wait_s == 30.0
    assert failures.replaced(1) == 0.0
    failures.failed(DeviceFault(1001.0, 1), settled=False)
    assert failures.restart(1001.0, True) == Restart(0.0, "at once")
    failures.failed(DeviceFault(1002.0, 0), settled=True)
    assert failures.restart(1002.0, True).suspect == 0, "what is held against other devices stays"


def test_a_request_that_was_found_to_break_steps_acquits_the_device() -> None:
    core, now = start(), 1.0
    for _ in range(9):
        now += 20.0
        broken = Fault(0, core.incarnation(), "ready", "error", first_step=1, last_step=1, requests=("a",))
        assert not told(core.step(now, broken), "device.quarantined")
        core.step(now, Acquitted())
        serve_again(core, now)


def test_a_device_on_which_steps_stand_still_is_suspect() -> None:
    core, now, heard = start(), 1.0, []
    for _ in range(2):
        now += 20.0
        for beat_s in (0.0, 3.0, 3.5):
            for rank in (0, 1):
                step = 3 - rank
                core.step(now + beat_s, Beat(rank, core.incarnation(), "stepping", step, "decode of 1 tokens", 0.01))
        heard = told(core.step(now + 3.6, Tick()), "device.suspect")
        now += 4.0
        serve_again(core, now)
    assert [emit.subject for emit in heard] == ["rank/0/1"], "the one that is behind"
