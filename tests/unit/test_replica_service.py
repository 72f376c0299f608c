"""ReplicaService: epochs wait for the disk, strangers end nobody's stream, and what breaks is told."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any, cast

import pytest

from coordinator.events import EventLog
from coordinator.fences import SupersededError
from coordinator.internal_server import event_of
from coordinator.metrics import Metrics
from coordinator.placement import ReplicaPlan
from coordinator.replica import service as replica_service
from coordinator.replica.config import ReplicaConfig
from coordinator.replica.core import ReplicaCore
from coordinator.replica.events import Accept, Attached, Died, Noted, Refuse, Started
from coordinator.replica.service import Callbacks, Outbox, ReplicaService
from coordinator.service import Service
from echelon.internal.v1 import control_pb2
from parallel.degrees import Degrees

PLAN = ReplicaPlan(
    degrees=Degrees(tensor=1),
    parameter_bytes=(100,),
    block_bytes=(10,),
    block_tokens=16,
    max_context=32,
    memory_fraction=0.5,
    shared_memory=True,
    kv_blocks_limit=8,
)


class Site:
    """Processes, disk and coordinator around one replica. full: the disk refuses. superseded: it is a successor's."""

    def __init__(self) -> None:
        self.full = self.superseded = self.agents_obey_another = False
        self.killed = 0
        self.persisted: list[int] = []
        self.launched: list[str] = []
        self.failures: list[Exception] = []
        core = ReplicaCore(ReplicaConfig(replica=0, term=1, epoch=0, plan=PLAN))
        service = cast(Service, SimpleNamespace(events=EventLog(1), metrics=Metrics.create()))
        callbacks = Callbacks(
            persist_epoch=self.persist,
            loading=lambda loaded, total: None,
            serving=lambda serving: None,
            fail=self.failures.append,
        )
        self.replica = ReplicaService(0, core, self, service, callbacks)

    def persist(self, epoch: int) -> None:
        if self.superseded:
            raise SupersededError(errno.ESTALE, "another coordinator has taken term 2")
        if self.full:
            raise OSError("no space left on device")
        self.persisted.append(epoch)

    async def launch(
        self, replica: int, rank: int, incarnation: str, no_room: Callable[[str], None] | None = None
    ) -> None:
        self.launched.append(incarnation)

    async def replace(self, replica: int, rank: int) -> bool:
        return False

    async def kill(self, replica: int, suspect: int | None) -> None:
        self.killed += 1
        if self.agents_obey_another:
            raise SupersededError(errno.ESTALE, "agents obey a later coordinator")


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 10.0))


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0.01)


def hello(incarnation: str) -> Attached:
    return Attached(
        rank=0, incarnation=incarnation, pid=1, node_id="n", phase="waiting", device="cpu", memory_bytes=10_000, epoch=0
    )


def told(outbox: Outbox) -> list[object]:
    return [None if (next_ := outbox.get_nowait()) is None else next_.command for _ in range(outbox.qsize())]


def test_an_epoch_begins_once_it_is_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_service, "RETRY_S", 0.01)

    async def work() -> None:
        site = Site()
        site.full = True
        running = asyncio.create_task(site.replica.run())
        site.replica.post(Started())
        await settled()
        assert (site.launched, site.persisted) == ([], [])
        site.full = False
        await settled()
        assert (site.persisted, site.launched, site.failures) == ([1], ["1"], [])
        running.cancel()

    run(work())


def test_one_that_was_replaced_kills_no_rank_of_its_successor() -> None:
    async def work() -> None:
        site = Site()
        site.superseded = True
        with pytest.raises(SupersededError):
            site.replica.post(Started(frozenset()))
        await settled()
        assert (site.killed, site.launched, site.persisted) == (0, [], [])

    run(work())


def test_one_whose_agents_obey_another_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told once, and not tried again."""
    monkeypatch.setattr(replica_service, "RETRY_S", 0.01)

    async def work() -> None:
        site = Site()
        site.agents_obey_another = True
        site.replica.post(Started())
        await settled()
        assert [type(error) for error in site.failures] == [SupersededError]
        assert (site.killed, site.launched) == (1, [])

    run(work())


def test_a_stranger_is_refused_and_ends_nobody_s_stream() -> None:
    async def work() -> None:
        site = Site()
        running = asyncio.create_task(site.replica.run())
        site.replica.post(Started())
        await settled()
        ours = site.replica.attach(hello("1"))
        stranger = site.replica.attach(hello("another cluster's"))
        assert [type(command) for command in told(stranger)] == [Refuse]
        assert None not in told(ours)
        again = site.replica.attach(hello("1"))
        assert told(ours) == [None], "its own next stream takes its place"
        assert Accept() in told(again)
        running.cancel()

    run(work())


def test_what_breaks_beside_the_loop_fails_the_coordinator(monkeypatch: pytest.MonkeyPatch) -> None:
    """The core waits for the answer of every order; one that never comes would leave it waiting for ever."""

    async def work() -> None:
        site = Site()
        monkeypatch.setattr(site.replica, "_persist", lambda: 1 // 0)
        site.replica._spawn(site.replica._kill(1, None, False))
        await settled()
        assert [type(error) for error in site.failures] == [ZeroDivisionError]

    run(work())


def test_what_a_rank_tells_of_its_weights_is_for_the_event_log() -> None:
    fence = control_pb2.Fence(epoch=3)
    loaded = control_pb2.WeightsLoaded(origin="source", bytes=5, took_s=0.12345, reason="torn")
    formed = control_pb2.EpochFormed(took_s={"weights": 0.12345, "groups": 2})
    written = control_pb2.ShardWritten(bytes=7, took_s=1)
    failed = control_pb2.ShardWritten(took_s=1, reason="full")
    messages = [
        control_pb2.RankMessage(fence=fence, loaded=loaded),
        control_pb2.RankMessage(fence=fence, formed=formed),
        control_pb2.RankMessage(fence=fence, written=written),
        control_pb2.RankMessage(fence=fence, written=failed),
    ]
    assert [event_of(message, 1, "c-3") for message in messages] == [
        Noted(
            1, "c-3", "weights.loaded", {"epoch": 3, "origin": "source", "bytes": 5, "took_s": 0.123, "reason": "torn"}
        ),
        Noted(1, "c-3", "rank.formed", {"epoch": 3, "groups_s": 2.0, "weights_s": 0.123}),
        Noted(1, "c-3", "shard.written", {"epoch": 3, "bytes": 7, "took_s": 1.0}),
        Noted(1, "c-3", "shard.not_written", {"epoch": 3, "took_s": 1.0, "reason": "full"}),
    ]


def test_an_epoch_that_ends_hangs_up_on_its_ranks_so_that_those_nobody_can_kill_are_refused() -> None:
    async def work() -> None:
        site = Site()
        site.replica.post(Started())
        await settled()
        old = site.replica.attach(hello("1"))
        told(old)
        site.replica.post(Died(0, "1"))
        assert told(old) == [None]
        await settled()
        new, again = site.replica.attach(hello("2")), site.replica.attach(hello("1"))
        assert [type(command) for command in told(again)] == [Refuse]
        assert None not in told(new)

    run(work())
