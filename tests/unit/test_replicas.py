"""Replicas: one bar over all of them, health by how many serve, ready once all did, and no start that ends twice."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import pytest

from coordinator.events import EventLog
from coordinator.metrics import Metrics
from coordinator.replica import recovery as replica_recovery
from coordinator.replica import told as replica_told
from coordinator.replica.config import START_ATTEMPTS, ReplicaConfig
from coordinator.replica.core import ReplicaCore
from coordinator.replica.events import Attached, Fault, Killed, Progress, Ready, Resident, Started, StoreOpened, Tick
from coordinator.replica.service import Callbacks, ReplicaService
from coordinator.replica.state import State
from coordinator.replicas import Edges, Replicas
from coordinator.requests.events import Event, ReplicaEnded
from coordinator.service import Engine, Service
from echelon.internal.link import ReplicaStats
from tests.unit.test_replica_service import PLAN

RESIDENT = Resident(100, 80)


class Site:
    """Replicas of one rank each, their processes and the coordinator's edges. epochs: those on disk at the start."""

    def __init__(self, count: int, epochs: int = 0) -> None:
        self.epochs = dict.fromkeys(range(count), epochs)
        self.bars: list[tuple[int, int]] = []
        self.serving: list[int] = []
        self.ready = 0
        self.failures: list[Exception] = []
        self.posted: list[Event] = []
        service = SimpleNamespace(events=EventLog(1), metrics=Metrics.create(), post=self.posted.append)
        service.engine = lambda replica: Engine(0, ReplicaStats(step=replica))
        service.on_quarantined = lambda callback: None
        service.core = SimpleNamespace(affinity_hits=lambda replica: 7)
        self.service = cast(Service, service)
        edges = Edges(
            persist_epoch=self.epochs.__setitem__,
            loading=lambda *bar: self.bars.append(bar),
            serving=self.serving.append,
            ready=self._ready,
            fail=self.failures.append,
        )
        self.replicas = Replicas(count, self._make, self.service, edges)

    def _ready(self) -> None:
        self.ready += 1

    def _make(self, replica: int, callbacks: Callbacks) -> ReplicaService:
        core = ReplicaCore(ReplicaConfig(replica=replica, term=1, epoch=self.epochs[replica], plan=PLAN))
        return ReplicaService(replica, core, self, self.service, callbacks)

    async def launch(
        self, replica: int, rank: int, incarnation: str, no_room: Callable[[str], None] | None = None
    ) -> None: ...

    async def kill(self, replica: int, suspect: int | None) -> None: ...

    async def replace(self, replica: int, rank: int) -> bool:
        return False

    def start(self, replica: int, survives: bool = False) -> None:
        service = self.replicas.services[replica]
        name = service.core.incarnation()
        service.post(Started(frozenset({(0, name)} if survives else ())))
        if not survives:
            service.post(Killed(service.core.fence.epoch))
        self.attach(replica, survives)

    def attach(self, replica: int, serves: bool = False) -> None:
        core = self.replicas.services[replica].core
        hello = Attached(
            rank=0,
            incarnation=core.incarnation(),
            pid=1,
            node_id="n",
            phase="ready" if serves else "waiting",
            device="cpu",
            memory_bytes=10_000,
            epoch=core.fence.epoch if serves else 0,
            resident=RESIDENT if serves else None,
        )
        self.replicas.services[replica].attach(hello)

    def form(self, replica: int) -> None:
        service = self.replicas.services[replica]
        service.post(StoreOpened(0, service.core.incarnation(), "h:1"))

    def load(self, replica: int, loaded_bytes: int) -> None:
        service = self.replicas.services[replica]
        service.post(Progress(0, service.core.incarnation(), loaded_bytes, 100 * (replica + 1)))

    def serve(self, replica: int) -> None:
        service = self.replicas.services[replica]
        service.post(Ready(0, service.core.incarnation(), RESIDENT))

    def fault(self, replica: int) -> None:
        """A rank fails, and is killed."""
        service = self.replicas.services[replica]
        service.post(Fault(0, service.core.incarnation(), service.core.state.value, "it is broken"))
        service.post(Tick())
        service.post(Killed(service.core.fence.epoch))


async def up(count: int) -> Site:
    site = Site(count)
    for replica in range(count):
        site.start(replica)
        site.form(replica)
    return site


def test_one_bar_covers_the_ranks_of_all_replicas() -> None:
    async def work() -> None:
        site = await up(2)
        site.load(0, 30)
        assert site.bars == [], "how much the other has to load is not known yet"
        site.load(1, 50)
        site.load(0, 100)
        site.serve(0)
        site.load(1, 200)
        assert site.bars == [(80, 300), (150, 300), (300, 300)], "one that has loaded stays in the bar"
        site.serve(1)
        site.fault(1)
        site.attach(1)
        site.form(1)
        site.load(1, 20)
        assert site.bars[3:] == [(20, 200)], "one that comes back alone has a bar of its own"

    asyncio.run(work())


def test_the_cluster_serves_while_one_replica_does_and_is_ready_once_all_did() -> None:
    async def work() -> None:
        site = await up(2)
        site.serve(1)
        assert (site.serving, site.ready) == ([1], 0)
        site.serve(0)
        assert (site.serving, site.ready) == ([1, 2], 1)
        assert site.service.metrics.registry.get_sample_value("echelon_replicas_serving") == 2
        before = site.replicas.services[0].core.fence
        site.fault(0)
        assert site.serving == [1, 2, 1]
        assert [event.fence for event in site.posted if isinstance(event, ReplicaEnded)] == [before], "its own alone"
        assert [(each.index, each.state, each.step) for each in site.replicas.describe()] == [
            (0, "launching", 0),
            (1, "ready", 1),
        ]
        site.attach(0)
        site.form(0)
        site.serve(0)
        assert (site.serving, site.ready) == ([1, 2, 1, 2], 1), "ready is told once"
        events = [event async for event in site.service.events.watch(0, follow=False)]
        told = [event.detail for event in events if event.kind == "replicas.serving"]
        assert told[-2:] == [
            {"serving": 1, "of": 2},
            {"serving": 2, "of": 2},
        ]
        assert site.epochs == {0: 2, 1: 1}, "each has an epoch of its own"

    asyncio.run(work())


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No time passes between a fault and what is made of it."""
    monkeypatch.setattr(replica_recovery, "restart", lambda *known: replica_recovery.Restart(0.0, "at once"))
    monkeypatch.setattr(replica_told, "FAULT_S", 0.0)


def test_a_replica_that_cannot_be_started_ends_the_start_with_its_own_error(at_once: None) -> None:
    async def work() -> None:
        site = await up(2)
        site.serve(0)
        assert site.failures == []
        site.fault(1)
        assert ["rank 0 of replica 1: forming: it is broken" in str(error) for error in site.failures] == [True]
        assert site.ready == 0

    asyncio.run(work())


@pytest.mark.parametrize("adopted", [True, False])
def test_once_the_start_is_over_no_replica_ends_the_cluster(at_once: None, adopted: bool) -> None:
    """It is over when all have come up, or when one serves on for a new coordinator whatever became of the other."""

    async def work() -> None:
        site = Site(2, epochs=3)
        site.start(0, survives=adopted)
        site.start(1)
        for replica in () if adopted else (0, 1):
            site.form(replica)
            site.serve(replica)
        for _ in range(2 * START_ATTEMPTS):
            site.fault(1)
        assert site.failures == []
        assert (site.replicas.serving, site.replicas.services[1].core.state) == (1, State.LAUNCHING)

    asyncio.run(work())


def test_processes_of_a_replica_that_is_not_known_die_unheard() -> None:
    async def work() -> None:
        site = await up(1)
        site.serve(0)
        site.replicas.died(1, 0, "1")
        assert site.replicas.serving == 1
        site.replicas.died(0, 0, "1")
        assert site.replicas.serving == 0

    asyncio.run(work())
