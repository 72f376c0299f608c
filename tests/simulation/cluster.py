"""Simulated processes around the real cores: a coordinator with its disk, and the replicas' leaders.

Each executes its core's effects in order and decides nothing, as the real shells do. The coordinator may die before
any effect, and in the middle of a write.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from coordinator.core import CoordinatorCore, CoreConfig
from coordinator.detokenizer import Detokenizer
from coordinator.journal import JournalState, Record
from coordinator.journal_codec import frame, unframe
from coordinator.requests import (
    Append,
    Deliver,
    Event,
    LinkClosed,
    LinkOpened,
    ReplicaEnded,
    Reported,
    Request,
    Send,
    StreamClosed,
    Submit,
    Tick,
)
from echelon.internal.link import Command, Fence, Report
from tests.simulation.checker import Checker
from tests.simulation.device import Device, decode
from tests.simulation.network import Clock, Connection
from worker.engine import Commanded, Completed, EngineCore, EngineLimits, RunPlan, SendReport
from worker.engine import Event as EngineEvent
from worker.engine import LinkClosed as EngineLinkClosed
from worker.engine import LinkOpened as EngineLinkOpened

TICK_S = 0.5
SERVER, PEER = 0, 1  # ends of a connection


class Crash(Exception):
    """The coordinator dies here."""


@dataclass(frozen=True, slots=True)
class World:
    """What all processes of one simulation share."""

    clock: Clock
    random: Random
    checker: Checker
    latency_s: float

    def connect(self) -> Connection:
        return Connection(self.clock, self.random, self.latency_s)


class Coordinator:
    """One coordinator after another on the same disk."""

    def __init__(self, world: World, resume_window_s: float, max_queue_tokens: int) -> None:
        self.up = False
        self.term = 0
        self.crash_rate = 0.0
        self._world = world
        self._config = resume_window_s, max_queue_tokens
        self._disk = b""
        self._core: CoordinatorCore | None = None
        self._streams: dict[int, Connection] = {}
        self._links: dict[int, Connection] = {}
        self._connections: list[Connection] = []
        self._next_stream = 1
        self.start()

    @property
    def core(self) -> CoordinatorCore:
        assert self._core is not None
        return self._core

    def start(self) -> None:
        records, size = unframe(self._disk)
        state = JournalState()
        state.apply_all(records)
        self._world.checker.restarted(state)
        self.up = True
        self.term += 1
        compacted = self._world.random.random() < 0.5
        self._disk = frame(state.records(), self.term) if compacted else self._disk[:size]
        self._core = CoordinatorCore(CoreConfig(self.term, *self._config), lambda: Detokenizer(decode), state)
        self._tick(self.term)

    def crash(self) -> None:
        """Everything but the disk is gone; a successor comes."""
        self.up = False
        self._core = None
        connections, self._connections = self._connections, []
        self._streams, self._links = {}, {}
        for connection in connections:
            connection.deafen(SERVER)
            connection.cut()
        self._world.clock.after(0.05 + self._world.random.random(), self.start)

    def post(self, event: Event) -> None:
        """One event through the core; whatever is not executed before a crash never happens."""
        if not self.up:
            return
        records: list[Record] = []
        try:
            for effect in self.core.step(self._world.clock.now, event):
                if isinstance(effect, Append):
                    records.append(effect.record)
                    continue
                self._write(records)
                records = []
                self._maybe_crash()
                match effect:
                    case Deliver(stream, stream_event):
                        self._world.checker.delivered(stream, stream_event)
                        self._streams[stream].send(PEER, stream_event)
                    case Send(command):
                        if link := self._links.get(command.fence.replica):
                            link.send(PEER, command)
            self._write(records)
        except Crash:
            self.crash()

    def open_stream(self, connection: Connection, request: Request, received: tuple[int, ...] | None) -> None:
        stream = self._next_stream
        self._next_stream += 1
        self._streams[stream] = connection
        self._connections.append(connection)
        connection.ends[SERVER].on_cut = lambda: self.post(StreamClosed(stream))
        self._world.checker.submitted(stream, request.request_id, len(received or ()))
        self.post(Submit(stream, request, received))

    def open_link(self, connection: Connection) -> None:
        self._connections.append(connection)
        connection.ends[SERVER].on_message = lambda report: self._take_report(connection, report)

    def _take_report(self, connection: Connection, report: Report) -> None:
        if report.hello is None:
            self.post(Reported(report))
            return
        fence = report.fence
        known = self._links.get(fence.replica)
        self._links[fence.replica] = connection
        connection.ends[SERVER].on_cut = lambda: self._close_link(connection, fence)
        if known:
            known.cut()
        self.post(LinkOpened(fence, report.hello))

    def _close_link(self, connection: Connection, fence: Fence) -> None:
        if self._links.get(fence.replica) is connection:
            del self._links[fence.replica]
            self.post(LinkClosed(fence))

    def _write(self, records: list[Record]) -> None:
        if not records:
            return
        content = frame(records, self.term)
        if self._world.random.random() < self.crash_rate:
            torn = content[: self._world.random.randrange(len(content) + 1)]
            whole, _ = unframe(torn)
            self._disk += torn
            self._world.checker.written(whole)
            raise Crash
        self._disk += content
        self._world.checker.written(records)

    def _maybe_crash(self) -> None:
        if self._world.random.random() < self.crash_rate:
            raise Crash

    def _tick(self, term: int) -> None:
        if self.up and self.term == term:
            self.post(Tick())
            self._world.clock.after(TICK_S, self._tick, term)


class Leader:
    """One epoch of a replica: the engine, a device, and a link that it dials again and again."""

    def __init__(self, world: World, coordinator: Coordinator, fence: Fence, limits: EngineLimits, noisy: bool) -> None:
        self.core = EngineCore(fence, limits)
        self.alive = True
        self._world = world
        self._coordinator = coordinator
        self._device = Device(limits.block_tokens, world.random if noisy else None)
        self._step_s = world.random.choice((0.01, 0.05, 0.2))
        self._busy_until = 0.0
        self._link: Connection | None = None
        self._dial()

    def kill(self) -> None:
        self.alive = False
        self.cut()

    def cut(self) -> None:
        if self._link:
            self._link.cut()

    def _dial(self) -> None:
        if not self.alive:
            return
        if not self._coordinator.up:
            self._world.clock.after(0.05 + 0.3 * self._world.random.random(), self._dial)
            return
        connection = self._link = self._world.connect()
        connection.ends[PEER].on_message = lambda command: self._obey(connection, command)
        connection.ends[PEER].on_cut = lambda: self._closed(connection)
        self._coordinator.open_link(connection)
        self._step(EngineLinkOpened(self._coordinator.term))

    def _obey(self, connection: Connection, command: Command) -> None:
        if self._link is connection:
            self._step(Commanded(command))

    def _closed(self, connection: Connection) -> None:
        if self._link is connection:
            self._link = None
            self._step(EngineLinkClosed())
            self._dial()

    def _step(self, event: EngineEvent) -> None:
        if not self.alive:
            return
        clock = self._world.clock
        for effect in self.core.step(clock.now, event):
            match effect:
                case RunPlan(plan):
                    result = self._device.run(plan)
                    self._busy_until = max(self._busy_until, clock.now) + self._step_s
                    clock.after(self._busy_until - clock.now, self._step, Completed(result))
                case SendReport(report):
                    assert self._link is not None
                    self._link.send(SERVER, report)


class Replica:
    """One epoch after another. An epoch's end is a kill, or a false suspicion whose process lives on for a while."""

    def __init__(
        self, world: World, coordinator: Coordinator, limits: EngineLimits, make: Callable[[Fence], Leader], index: int
    ) -> None:
        self.epoch = 1
        self.limits = limits
        self._world = world
        self._coordinator = coordinator
        self._make = make
        self._index = index
        self.leader = make(Fence(coordinator.term, index, 1))

    def end_epoch(self) -> None:
        old, ended = self.leader, Fence(self._coordinator.term, self._index, self.epoch)
        random, clock = self._world.random, self._world.clock
        if random.random() < 0.5:
            old.kill()
        self.epoch += 1
        clock.after(random.random(), lambda: self._coordinator.post(ReplicaEnded(ended, "killed")))
        clock.after(random.random() * 2, self._start, old, self.epoch)

    def _start(self, old: Leader, epoch: int) -> None:
        self._world.clock.after(self._world.random.random() * 2, old.kill)
        if epoch == self.epoch:
            self.leader = self._make(Fence(self._coordinator.term, self._index, epoch))
