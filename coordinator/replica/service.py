"""The shell of one ReplicaCore: its effects executed in order, the ranks' streams, and the leader's right to link.

Runs on the coordinator's loop. Launching and killing take their time on tasks of their own and come back as events.
An epoch is persisted before anything else of it is done; while the disk refuses, it does not begin. It decides
nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Protocol

from coordinator.fences import SupersededError
from coordinator.replica.core import ReplicaCore
from coordinator.replica.events import (
    Attached,
    AwaitPersisted,
    Command,
    Detached,
    Emit,
    Event,
    GiveUp,
    Kill,
    Killed,
    Launch,
    LaunchFailed,
    Loading,
    NoRoom,
    Persisted,
    PersistEpoch,
    ReplicaDown,
    ReplicaUp,
    Tell,
    Tick,
)
from coordinator.requests.events import ReplicaEnded
from coordinator.service import Service
from echelon.internal.link import Fence

TICK_S = 0.25
RETRY_S = 1.0


@dataclass(frozen=True, slots=True)
class Told:
    """A command for a rank, with the fence it travels under; None ends the stream."""

    fence: Fence
    command: Command


Outbox = asyncio.Queue[Told | None]


class RankProcesses(Protocol):
    """What starts and ends rank processes: `coordinator/cluster.py` over Ray, or a test's own."""

    async def launch(
        self, replica: int, rank: int, incarnation: str, no_room: Callable[[str], None] | None = None
    ) -> None:
        """Start a rank's process in its slot. Raises when it cannot be started.

        no_room is told why there is no place for it, now and then while it waits for one; without it it raises soon.
        """

    async def kill(self, replica: int, suspect: int | None) -> None:
        """Kill every process of the replica, suspect first; returns when all are confirmed gone."""

    async def replace(self, replica: int, rank: int) -> bool:
        """Take the device of a rank, none of whose processes lives, out and give it another; False: there is none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Callbacks:
    """What the coordinator's edges do about a replica. fail: it cannot be served, or what served it is defective."""

    persist_epoch: Callable[[int], None]
    loading: Callable[[int, int], None]
    serving: Callable[[bool], None]
    fail: Callable[[Exception], None]


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
        self._outboxes: dict[tuple[int, str], Outbox] = {}  # by rank and incarnation: a stranger ends nobody's stream
        self._unpersisted: int | None = None
        self._serving: Fence | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._launches: set[asyncio.Task[None]] = set()
        self._closing = False

    @property
    def serving(self) -> Fence | None:
        """The fence its leader must carry to link, None while no epoch serves."""
        return self._serving

    async def run(self) -> None:
        """Tell the core the time for as long as the coordinator lives."""
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
        rank = hello.rank, hello.incarnation
        if older := self._outboxes.pop(rank, None):
            older.put_nowait(None)
        outbox = self._outboxes[rank] = asyncio.Queue()
        self.post(hello)
        return outbox

    def detach(self, rank: int, incarnation: str, outbox: Outbox) -> None:
        """A rank's stream ended."""
        if self._outboxes.get((rank, incarnation)) is outbox:
            del self._outboxes[rank, incarnation]
            self.post(Detached(rank, incarnation))

    def post(self, event: Event) -> None:
        """One event through the core; its effects in order."""
        if self._closing:
            return
        for effect in self.core.step(time.monotonic(), event):  # a clock that is set must not end a rank
            match effect:
                case Launch():
                    self._launches.add(self._spawn(self._launch(effect)))
                case Kill(epoch, suspect, replace):
                    self._give_up_launches()
                    self._hang_up()
                    self._spawn(self._kill(epoch, suspect, replace))
                case PersistEpoch(epoch):
                    self._unpersisted = epoch
                    self._persist()
                case AwaitPersisted(epoch):
                    self._spawn(self._await_persisted(epoch))
                case Tell(fence, rank, incarnation, command):
                    self._tell(rank, incarnation, Told(fence, command))
                case ReplicaUp(fence):
                    self._serving = fence
                    self._callbacks.serving(True)
                case ReplicaDown(fence, reason, step_broke, requests):
                    self._serving = None
                    self._callbacks.serving(False)
                    self._service.post(ReplicaEnded(fence, reason, step_broke, requests))
                case Loading(loaded_bytes, total_bytes):
                    self._callbacks.loading(loaded_bytes, total_bytes)
                case Emit(kind, subject, detail):
                    self._service.events.emit(kind, subject, detail)
                case GiveUp(error):
                    self._callbacks.fail(error)

    def _tell(self, rank: int, incarnation: str, told: Told) -> None:
        if outbox := self._outboxes.get((rank, incarnation)):
            outbox.put_nowait(told)

    def _persist(self) -> bool:
        """Whether the epoch is on disk. Raises SupersededError."""
        if self._unpersisted is None:
            return True
        try:
            self._callbacks.persist_epoch(self._unpersisted)
        except SupersededError:  # the ranks are a successor's: kill none of them
            raise
        except OSError as error:
            self._emit("replica.not_persisted", error)
            return False
        self._service.metrics.epoch.labels(str(self._replica)).set(self._unpersisted)
        self._unpersisted = None
        return True

    async def _launch(self, wanted: Launch) -> None:
        rank, incarnation = wanted.rank, wanted.incarnation

        def no_room(reason: str) -> None:
            self.post(NoRoom(rank, incarnation, reason))

        try:
            await self._processes.launch(self._replica, rank, incarnation, no_room if wanted.patient else None)
        except Exception as error:  # noqa: BLE001 - whatever Ray says is the reason, and the core decides
            self.post(LaunchFailed(rank, incarnation, f"{type(error).__name__}: {error}"))

    def _hang_up(self) -> None:
        """Whoever no agent can kill dials again, is refused, and ends itself."""
        for (_, incarnation), outbox in self._outboxes.items():
            if incarnation != self.core.incarnation():
                outbox.put_nowait(None)

    def _give_up_launches(self) -> None:
        """What waits for room must not take the place of its successor once there is some."""
        for launch in self._launches:
            launch.cancel()
        self._launches.clear()

    async def _kill(self, epoch: int, suspect: int | None, replace: bool) -> None:
        """An epoch must not begin before its predecessor is confirmed dead, nor before it is on disk."""
        while not await self._killed(suspect) or not self._persist():
            await asyncio.sleep(RETRY_S)
        replaced = replace and suspect is not None and await self._replaced(suspect)
        self.post(Killed(epoch, suspect if replaced else None))

    async def _await_persisted(self, epoch: int) -> None:
        while not self._persist():
            await asyncio.sleep(RETRY_S)
        self.post(Persisted(epoch))

    async def _killed(self, suspect: int | None) -> bool:
        try:
            await self._processes.kill(self._replica, suspect)
        except SupersededError:
            raise
        except Exception as error:  # noqa: BLE001 - told, and tried again
            self._emit("replica.kill_failed", error)
            return False
        return True

    async def _replaced(self, rank: int) -> bool:
        try:
            return await self._processes.replace(self._replica, rank)
        except SupersededError:
            raise
        except Exception as error:  # noqa: BLE001 - told, and the device is waited for
            self._emit("device.not_replaced", error)
            return False

    def _emit(self, kind: str, error: Exception) -> None:
        self._service.events.emit(kind, f"replica/{self._replica}", {"error": str(error)})

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        """What breaks here leaves the core waiting for an answer that never comes: the coordinator must end."""
        self._tasks.discard(task)
        self._launches.discard(task)
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            self._callbacks.fail(error)
