"""The shell of one ReplicaCore: its effects executed in order, the ranks' streams, and the leader's right to link.

Runs on the coordinator's loop. Launching and killing take their time on tasks of their own and come back as events;
persisting an epoch happens at once, for everything after it relies on it. It decides nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Protocol

from coordinator.replica import ReplicaCore
from coordinator.replica_events import (
    Accept,
    Attached,
    Detached,
    Emit,
    Event,
    Form,
    GiveUp,
    Kill,
    Killed,
    Launch,
    LaunchFailed,
    Loading,
    OpenStore,
    PersistEpoch,
    Refuse,
    ReplicaDown,
    ReplicaUp,
    Started,
    Tell,
    Tick,
)
from coordinator.requests import ReplicaEnded
from coordinator.service import Service
from echelon.errors import EchelonError
from echelon.internal.link import Fence

TICK_S = 0.25

Command = Accept | OpenStore | Form | Refuse


@dataclass(frozen=True, slots=True)
class Told:
    """A command for a rank, with the fence it travels under; None ends the stream."""

    fence: Fence
    command: Command


Outbox = asyncio.Queue[Told | None]


class RankProcesses(Protocol):
    """What starts and ends rank processes: `coordinator/cluster.py` over Ray, or a test's own."""

    async def launch(self, replica: int, rank: int, incarnation: str) -> None:
        """Start a rank's process in its slot. Raises when it cannot be started."""

    async def kill(self, replica: int, suspect: int | None) -> None:
        """Kill every process of the replica, suspect first; returns when all are confirmed gone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Callbacks:
    """What the coordinator's edges do about a replica."""

    persist_epoch: Callable[[int], None]
    loading: Callable[[int, int], None]
    serving: Callable[[bool], None]
    give_up: Callable[[EchelonError], None]


@dataclass(slots=True)
class _Attachment:
    incarnation: str
    outbox: Outbox = field(default_factory=asyncio.Queue)


class ReplicaService:
    """One replica as the coordinator's shell keeps it."""

    def __init__(
        self, replica: int, core: ReplicaCore, processes: RankProcesses, service: Service, callbacks: Callbacks
    ) -> None:
        self.core = core
        self._replica = replica
        self._processes = processes
        self._service = service
        self._callbacks = callbacks
        self._attachments: dict[int, _Attachment] = {}
        self._serving: Fence | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False

    @property
    def serving(self) -> Fence | None:
        """The fence its leader must carry to link, None while no epoch serves."""
        return self._serving

    async def run(self, survivors: frozenset[tuple[int, str]]) -> None:
        """Start, then tell the core the time for as long as the coordinator lives."""
        self.post(Started(survivors))
        while True:
            before = time.monotonic()
            await asyncio.sleep(TICK_S)
            self.post(Tick(max(time.monotonic() - before - TICK_S, 0.0)))

    def close(self) -> None:
        """Take no more events: the coordinator is ending, and ends the ranks itself."""
        self._closing = True
        self._serving = None
        for task in self._tasks:
            task.cancel()

    def attach(self, hello: Attached) -> Outbox:
        """A rank's new stream; what it is told comes out of the outbox. An older stream of the rank ends."""
        if older := self._attachments.pop(hello.rank, None):
            older.outbox.put_nowait(None)
        attachment = _Attachment(hello.incarnation)
        self._attachments[hello.rank] = attachment
        self.post(hello)
        return attachment.outbox

    def detach(self, rank: int, outbox: Outbox) -> None:
        """A rank's stream ended."""
        attachment = self._attachments.get(rank)
        if attachment is not None and attachment.outbox is outbox:
            del self._attachments[rank]
            self.post(Detached(rank, attachment.incarnation))

    def post(self, event: Event) -> None:
        """One event through the core; its effects in order."""
        if self._closing:
            return
        for effect in self.core.step(time.time(), event):
            match effect:
                case Launch(rank, incarnation):
                    self._spawn(self._launch(rank, incarnation))
                case Kill(epoch, suspect):
                    self._spawn(self._kill(epoch, suspect))
                case PersistEpoch(epoch):
                    self._callbacks.persist_epoch(epoch)
                    self._service.metrics.epoch.labels(str(self._replica)).set(epoch)
                case Tell(fence, rank, incarnation, command):
                    self._tell(rank, incarnation, Told(fence, command))
                case ReplicaUp(fence):
                    self._serving = fence
                    self._callbacks.serving(True)
                case ReplicaDown(fence, reason):
                    self._serving = None
                    self._callbacks.serving(False)
                    self._service.post(ReplicaEnded(fence, reason))
                case Loading(loaded_bytes, total_bytes):
                    self._callbacks.loading(loaded_bytes, total_bytes)
                case Emit(kind, subject, detail):
                    self._service.events.emit(kind, subject, detail)
                case GiveUp(error):
                    self._callbacks.give_up(error)

    def _tell(self, rank: int, incarnation: str, told: Told) -> None:
        attachment = self._attachments.get(rank)
        if attachment is not None and attachment.incarnation == incarnation:
            attachment.outbox.put_nowait(told)

    async def _launch(self, rank: int, incarnation: str) -> None:
        try:
            await self._processes.launch(self._replica, rank, incarnation)
        except Exception as error:  # noqa: BLE001 - whatever Ray says is the reason, and the core decides
            self.post(LaunchFailed(rank, incarnation, f"{type(error).__name__}: {error}"))

    async def _kill(self, epoch: int, suspect: int | None) -> None:
        await retried(lambda: self._processes.kill(self._replica, suspect), self._kill_failed)
        self.post(Killed(epoch))

    def _kill_failed(self, error: Exception) -> None:
        self._service.events.emit("replica.kill_failed", f"replica/{self._replica}", {"error": str(error)})

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def retried(call: Callable[[], Awaitable[None]], tell: Callable[[Exception], None]) -> None:
    """Until it succeeds, once a second: an epoch must not begin before its predecessor is confirmed dead."""
    while True:
        try:
            return await call()
        except Exception as error:  # noqa: BLE001 - told, and tried again
            tell(error)
        await asyncio.sleep(1.0)
