"""No room for a rank: once it has served a replica waits for a node, and says so; a first start tells and ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import pytest

from coordinator.events import EventLog
from coordinator.metrics import Metrics
from coordinator.replica.config import ReplicaConfig
from coordinator.replica.core import ReplicaCore
from coordinator.replica.events import Died, Emit, Kill, Killed, Launch, NoRoom, ReplicaUp, Started, Tick
from coordinator.replica.service import Callbacks, ReplicaService
from coordinator.replica.state import State
from coordinator.service import Service
from tests.unit.test_replica import PLAN, form, hello, launch, make

REASON = "Ray has no room: it needs 1 CPU, free are none"


def served_and_lost() -> tuple[ReplicaCore, str]:
    """Rank 1 has died with its node; rank 0 is up again."""
    core = make()
    name = launch(core)
    form(core)
    core.step(30.0, Died(1, name))
    launched = [effect for effect in core.step(30.1, Killed(2)) if isinstance(effect, Launch)]
    assert [effect.patient for effect in launched] == [True, True]
    name = core.incarnation()
    core.step(31.0, hello(0, name))
    return core, name


def test_a_replica_that_has_served_waits_however_long_and_says_so_once() -> None:
    core, name = served_and_lost()
    told = core.step(33.0, NoRoom(1, name, REASON))
    assert [(effect.kind, effect.subject) for effect in told if isinstance(effect, Emit)] == [
        ("rank.no_room", "rank/0/1")
    ]
    for later in range(35, 3600, 5):
        assert core.step(float(later), NoRoom(1, name, REASON)) == []
        core.step(float(later), hello(0, name))  # heard of: it is not silent
        assert [effect for effect in core.step(float(later), Tick()) if isinstance(effect, Kill)] == []
    assert (core.state, core.reason) == (State.LAUNCHING, REASON)
    assert any(isinstance(effect, ReplicaUp) for effect in form(core, 3600.0)), "a node has joined"
    assert core.reason == ""


def test_what_waits_no_more_must_attach_in_time() -> None:
    core, name = served_and_lost()
    core.step(33.0, NoRoom(1, name, REASON))
    core.step(150.0, hello(0, name))
    assert [effect for effect in core.step(152.0, Tick()) if isinstance(effect, Kill)] == []
    assert [effect for effect in core.step(154.0, Tick()) if isinstance(effect, Kill)], "120 s after the last word"


def test_a_first_start_is_not_patient_and_one_of_a_cluster_that_has_served_is() -> None:
    first, later = make(), ReplicaCore(ReplicaConfig(replica=0, term=2, epoch=0, plan=PLAN, served=True))
    for core, patient in ((first, False), (later, True)):
        core.step(0.0, Started())
        launched = [effect for effect in core.step(0.1, Killed(1)) if isinstance(effect, Launch)]
        assert [effect.patient for effect in launched] == [patient, patient]


class Site:
    """Processes that find no room until there is some."""

    def __init__(self) -> None:
        self.room = asyncio.Event()
        self.asked: list[tuple[str, bool]] = []
        self.given_up: list[str] = []
        core = ReplicaCore(ReplicaConfig(replica=0, term=2, epoch=0, plan=PLAN, served=True))
        self.events = EventLog(2)
        service = cast(Service, SimpleNamespace(events=self.events, metrics=Metrics.create()))
        callbacks = Callbacks(
            persist_epoch=lambda epoch: None,
            loading=lambda loaded, total: None,
            serving=lambda serving: None,
            fail=lambda error: pytest.fail(str(error)),
        )
        self.replica = ReplicaService(0, core, self, service, callbacks)

    async def launch(
        self, replica: int, rank: int, incarnation: str, no_room: Callable[[str], None] | None = None
    ) -> None:
        self.asked.append((incarnation, no_room is not None))
        if rank == 0:
            return
        assert no_room is not None
        try:
            while not self.room.is_set():
                no_room(REASON)
                await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            self.given_up.append(incarnation)
            raise

    async def kill(self, replica: int, suspect: int | None) -> None: ...

    async def replace(self, replica: int, rank: int) -> bool:
        return False


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def test_a_launch_that_waits_for_room_is_given_up_with_its_epoch() -> None:
    async def work() -> None:
        site = Site()
        site.replica.post(Started())
        await until(lambda: len(site.asked) == 2 and bool(site.replica.core.reason))
        assert site.asked == [("1", True), ("1", True)]
        assert site.replica.core.reason == REASON
        site.replica.post(Died(0, "1"))
        await until(lambda: len(site.asked) == 4 and bool(site.given_up))
        assert site.given_up == ["1"] and site.asked[2:] == [("2", True), ("2", True)]
        site.room.set()
        for rank in (0, 1):
            site.replica.attach(hello(rank, "2"))
        assert site.replica.core.state is State.FORMING
        site.replica.close()

    asyncio.run(asyncio.wait_for(work(), 10.0))
