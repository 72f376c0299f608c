"""The simulated coordinator: one process, from its start to its end, around the real cores.

It executes its cores' effects in order and decides nothing, as the real shells do (`coordinator/service.py`,
`coordinator/internal_server.py`). It may die before any effect, and in the middle of a write; then all its parts are
gone, and whatever they meant to do later never happens. It may be stopped too, and wake when another has taken over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from coordinator.answer_text import AnswerText
from coordinator.detokenizer import Detokenizer
from coordinator.fences import SupersededError
from coordinator.jobs.runner import JobConfig
from coordinator.journal.codec import frame, unframe
from coordinator.journal.state import Assigned, JournalState, Record
from coordinator.requests.core import CoordinatorCore, CoreConfig
from coordinator.requests.events import (
    Append,
    Deliver,
    Effect,
    Emit,
    Event,
    LinkClosed,
    LinkOpened,
    ReplicaEnded,
    Reported,
    Send,
    StreamClosed,
    Submit,
    Tick,
)
from coordinator.requests.life import Phase
from coordinator.requests.nouns import Received, Request, Shown
from echelon.errors import OverloadedError
from echelon.internal.link import Command, Fence, Report
from parallel.degrees import Degrees
from tests.simulation.checker import require
from tests.simulation.crashes import KILLED_BEFORE_DELIVERY, KILLED_BETWEEN_EFFECTS, KILLED_IN_A_WRITE, Crash, Crashes
from tests.simulation.disk import Disk
from tests.simulation.jobs import Jobs
from tests.simulation.model import decode
from tests.simulation.network import Connection
from tests.simulation.ranks import Site
from tests.simulation.replica import Replica
from tests.simulation.world import PEER, SERVER, TICK_S, Process, World


@dataclass(frozen=True, slots=True)
class Settings:
    """What every coordinator of this simulation is started with."""

    resume_window_s: float
    max_queue_tokens: int
    jobs: JobConfig


class Coordinator(Process):
    """To be built, then begun. on_end is told, once."""

    def __init__(
        self, world: World, disk: Disk, crashes: Crashes, term: int, on_end: Callable[[Coordinator], None]
    ) -> None:
        super().__init__()
        self.world = world
        self.disk = disk
        self.connections: list[Connection] = []
        self.term = term
        self._crashes = crashes
        self._on_end = on_end
        self._unwritten, self._refused = b"", disk.full
        self._ticked_s = world.clock.now
        self._streams: dict[int, Callable[[Shown], None]] = {}
        self._links: dict[int, Connection] = {}
        self._heard: set[Connection] = set()  # leaders' calls that were taken

    def begin(self, settings: Settings, sites: list[Site], state: JournalState) -> None:
        limits = settings.resume_window_s, settings.max_queue_tokens
        config = CoreConfig(self.term, *limits, len(sites), canary_idle_s=3.0)
        self._sites = sites
        self.core = CoordinatorCore(config, lambda stops: AnswerText(Detokenizer(decode), stops), state)
        self.jobs = Jobs(self, self.disk.jobs, settings.jobs)
        self.replicas = [Replica(self, site) for site in sites]
        self.here(self.jobs.load)()
        self.after(TICK_S, self._tick)

    @property
    def superseded(self) -> bool:
        """A successor owns the disk."""
        return self.term < self.disk.owner

    @property
    def unwritten(self) -> bool:
        """The disk has refused what was told since."""
        return bool(self._unwritten)

    def end(self) -> None:
        """Everything but the disk is gone."""
        if not self.ended:
            super().end()
            for connection in self.connections:
                connection.cut()
            self._on_end(self)

    def perform(self, action: Callable[..., None], *arguments: Any) -> None:
        """Where it crashes in doing so, or finds that it was superseded, the rest never happens."""
        try:
            action(*arguments)
        except Crash:
            self.end()
        except SupersededError:
            self.world.checker.seen["write of an old term refused"] += 1
            self.end()

    def after(self, delay_s: float, action: Callable[..., None], *arguments: Any) -> None:
        self.world.clock.after(delay_s, self.here(action, *arguments))

    def accept(self, connection: Connection, on_message: Callable[..., None], *arguments: Any) -> None:
        """Serve a connection."""
        self.connections.append(connection)
        connection.ends[SERVER].on_message = self.here(on_message, *arguments)

    # To be called within `here`.

    def persist_epoch(self, replica: int, epoch: int, layout: Degrees) -> None:
        """Raises SupersededError."""
        self.disk.persist_epoch(self.term)
        self._sites[replica].persist(epoch, layout)

    def maybe_crash(self) -> None:
        if self._crashes.at(KILLED_BETWEEN_EFFECTS):
            raise Crash

    def give_up(self) -> None:
        """A replica cannot be started; whoever supervises starts another coordinator."""
        raise Crash

    def post(self, event: Event) -> None:
        """One event through the core, its effects in order."""
        if self._refused:
            self._write([])
        effects = self.core.step(self.world.clock.now, event)
        records = [effect.record for effect in effects if isinstance(effect, Append)]
        assigned = [record.request_id for record in records if isinstance(record, Assigned)]
        lives = self.core._lives._lives.values() if assigned else ()
        waiting = [life.request_id for life in lives if life.phase is Phase.QUEUED]
        self._check_routes(event, effects)
        self._execute(effects)
        suspects = self.core._lives.quarantine.suspects  # have an order of their own
        in_turn = [[each for each in some if not suspects(each)] for some in (assigned, waiting)]
        self.world.checker.assigned(*in_turn)
        if effects:
            self.world.stepped()

    def _check_routes(self, event: Event, effects: list[Effect]) -> None:
        """What ends with one replica, and what waits, before the effects reach the disk."""
        for effect in effects:
            match effect:
                case Append(Assigned() as record):
                    current = record.epoch == self._sites[record.replica].epoch
                    require(current or self.superseded, "{} to an epoch that is over", record)
                case Emit("request.replayed", request_id) if isinstance(event, ReplicaEnded):
                    if not self.superseded:
                        assigned = self.world.checker.disk.entries[request_id].assigned
                        lost = assigned and assigned.replica == event.fence.replica
                        require(lost, "{} is interrupted by {}", assigned, event)
        links, first = self.core._router.links.values(), self.core._lives.first_queued()
        require(all(link.free_slots >= 0 for link in links), "more choices than slots: {}", links)
        able = [link for link in links if first and link.fits(first.size)]
        require(not able, "{} waits while {} could take it", first, able)

    def _execute(self, effects: list[Effect]) -> None:
        """Records that stand together go in one write."""
        records: list[Record] = []
        for effect in effects:
            if isinstance(effect, Append):
                records.append(effect.record)
                continue
            if records:
                self._write(records)
                records = []
                if isinstance(effect, Deliver) and self._crashes.at(KILLED_BEFORE_DELIVERY):
                    raise Crash
            self.maybe_crash()
            match effect:
                case Deliver(stream, event):
                    self.world.checker.delivered(stream, event, self.superseded)
                    self._streams[stream](event)
                case Send(command):
                    self._send(command)
                case Emit(kind, subject, detail):
                    self.world.checker.heard(kind, subject, detail)
                    if kind == "request.replayed":
                        self.jobs.interrupted(subject)
        if records:
            self._write(records)

    def _send(self, command: Command) -> None:
        if link := self._links.get(command.fence.replica):
            some = sum(abandon.choice is not None for abandon in command.abandons)
            self.world.checker.seen["one choice abandoned"] += some
            link.send(PEER, command)

    def open_stream(self, request: Request, received: Received | None, deliver: Callable[[Shown], None]) -> int:
        stream = next(self.world.streams)
        self._streams[stream] = deliver
        self.world.checker.submitted(stream, request.request_id, request.sampling.n, received or ())
        if self._refused and not self.core.is_open(request.request_id):
            full = OverloadedError("the journal cannot be written", reason="JOURNAL_UNAVAILABLE", retry_after_s=0.2)
            self.world.checker.delivered(stream, full)
            deliver(full)
        else:
            self.post(Submit(stream, request, received))
        return stream

    def serve_user(self, connection: Connection, request: Request, received: Received | None) -> None:
        """A user's call, like GenerationServicer."""
        self.connections.append(connection)
        stream = self.open_stream(request, received, lambda event: connection.send(PEER, event))
        connection.ends[SERVER].on_cut = self.here(self.post, StreamClosed(stream))

    def serve_link(self, connection: Connection) -> None:
        """A leader's call, like ReplicaLinkServicer: open to the leader of the epoch that serves and to no other."""
        self.accept(connection, self._hear, connection)

    def _hear(self, connection: Connection, report: Report) -> None:
        if report.hello is None:
            if connection in self._heard:
                self._take_report(connection, report)
            return
        fence = report.fence
        if self.replicas[fence.replica].serving != fence:
            connection.cut()
            return
        self._heard.add(connection)
        older = self._links.get(fence.replica)
        self._links[fence.replica] = connection
        connection.ends[SERVER].on_cut = self.here(self._close_link, connection, fence)
        if older:
            older.cut()
        self.post(LinkOpened(fence, report.hello))

    def _take_report(self, connection: Connection, report: Report) -> None:
        if self.replicas[report.fence.replica].serving != report.fence:
            connection.cut()
            return
        epoch = self._sites[report.fence.replica].epoch
        current = report.fence.epoch == epoch or self.superseded
        require(current, "{} is heard, but epoch {} is on disk", report, epoch)
        self.post(Reported(report))

    def _close_link(self, connection: Connection, fence: Fence) -> None:
        if self._links.get(fence.replica) is connection:
            del self._links[fence.replica]
            self.post(LinkClosed(fence))

    def _write(self, records: list[Record]) -> None:
        """While the disk refuses, running streams go on; what it lacks goes ahead of the next write."""
        content = frame(records, self.term)
        if content and not (self._unwritten or self.disk.full) and self._crashes.at(KILLED_IN_A_WRITE):
            torn = content[: self.world.random.randrange(len(content) + 1)]
            self.disk.append(self.term, torn)
            self.world.checker.written(unframe(torn)[0])
            raise Crash
        self._unwritten += content
        try:
            self.disk.append(self.term, self._unwritten)
        except SupersededError:
            raise
        except OSError:
            self._refused = True
        else:
            self._unwritten, self._refused = b"", False
        self.world.checker.written(records)

    def _tick(self) -> None:
        now = self.world.clock.now
        lag_s, self._ticked_s = max(now - self._ticked_s - TICK_S, 0.0), now
        self.after(TICK_S, self._tick)
        self.post(Tick())
        for replica in self.replicas:
            replica.tick(lag_s)
