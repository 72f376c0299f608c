"""The simulated coordinator: one after another on the same disk, around the real cores.

It executes its cores' effects in order and decides nothing, as the real shells do (`coordinator/service.py`,
`coordinator/internal_server.py`). It may die before any effect, and in the middle of a write; then all its parts are
gone, and whatever they meant to do later never happens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from coordinator.answer_text import AnswerText
from coordinator.detokenizer import Detokenizer
from coordinator.jobs.runner import JobConfig
from coordinator.journal.codec import frame, unframe
from coordinator.journal.state import Assigned, JournalState, Record
from coordinator.replica.events import Event as ReplicaEvent
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
from echelon.internal.link import Command, Fence, Report
from tests.simulation.checker import require
from tests.simulation.jobs import Jobs, JobTable
from tests.simulation.model import decode
from tests.simulation.network import Connection
from tests.simulation.ranks import Site
from tests.simulation.replica import Replica
from tests.simulation.world import PEER, SERVER, TICK_S, World


class Crash(Exception):
    """The coordinator dies here."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What every coordinator of this simulation is started with."""

    resume_window_s: float
    max_queue_tokens: int
    jobs: JobConfig


class Coordinator:
    """Up or down; a successor comes by itself."""

    def __init__(self, world: World, settings: Settings, sites: list[Site]) -> None:
        self.world = world
        self.up = False
        self.term = 0
        self.crash_rate = 0.0
        self.job_table = JobTable()
        self._settings = settings
        self._sites = sites
        self._journal = b""
        self._start()

    def _start(self) -> None:
        records, size = unframe(self._journal)
        state = JournalState()
        state.apply_all(records)
        self.world.checker.restarted(state)
        self.up = True
        self.term += 1
        compacted = self.world.random.random() < 0.5
        self._journal = frame(state.records(), self.term) if compacted else self._journal[:size]
        settings = self._settings
        limits = settings.resume_window_s, settings.max_queue_tokens
        config = CoreConfig(self.term, *limits, len(self._sites), canary_idle_s=3.0)
        self._streams: dict[int, Callable[[Shown], None]] = {}
        self._next_stream = 1
        self._links: dict[int, Connection] = {}
        self._connections: list[Connection] = []
        self.core = CoordinatorCore(config, lambda stops: AnswerText(Detokenizer(decode), stops), state)
        self.jobs = Jobs(self, self.job_table, settings.jobs)
        self.replicas = [Replica(self, site) for site in self._sites]
        self.act(self.jobs.load)
        self.after(TICK_S, self._tick)

    def crash(self) -> None:
        """Everything but the disk is gone."""
        self.up = False
        for connection in self._connections:
            connection.cut()
        self.world.clock.after(0.05 + self.world.random.random(), self._start)

    def act(self, action: Callable[..., None], *arguments: Any) -> None:
        """Do something if it is up. Where it crashes in doing so, the rest never happens."""
        if self.up:
            try:
                action(*arguments)
            except Crash:
                self.crash()

    def here(self, action: Callable[..., None], *arguments: Any) -> Callable[..., None]:
        """The action as this very coordinator's: it does nothing once this one is gone."""
        term = self.term

        def act(*more: Any) -> None:
            if self.term == term:
                self.act(action, *arguments, *more)

        return act

    def after(self, delay_s: float, action: Callable[..., None], *arguments: Any) -> None:
        self.world.clock.after(delay_s, self.here(action, *arguments))

    def accept(self, connection: Connection, on_message: Callable[..., None], *arguments: Any) -> None:
        """Serve a connection."""
        self._connections.append(connection)
        connection.ends[SERVER].on_message = self.here(on_message, *arguments)

    def maybe_crash(self) -> None:
        if self.world.random.random() < self.crash_rate:
            raise Crash

    def tell_replica(self, index: int, event: ReplicaEvent) -> None:
        """Like the agents' word of a death; nobody hears it while no coordinator is up."""
        self.act(lambda: self.replicas[index].post(event))

    # To be called within `act`.

    def give_up(self) -> None:
        """A replica cannot be started; whoever supervises starts another coordinator."""
        raise Crash

    def post(self, event: Event) -> None:
        """One event through the core, its effects in order."""
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

    def _check_routes(self, event: Event, effects: list[Effect]) -> None:
        """What ends with one replica, and what waits, before the effects reach the disk."""
        for effect in effects:
            match effect:
                case Append(Assigned() as record):
                    require(record.epoch == self._sites[record.replica].epoch, "{} to an epoch that is over", record)
                case Emit("request.replayed", request_id) if isinstance(event, ReplicaEnded):
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
            self.maybe_crash()
            match effect:
                case Deliver(stream, event):
                    self.world.checker.delivered(stream, event)
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
        stream = self._next_stream
        self._next_stream += 1
        self._streams[stream] = deliver
        self.world.checker.submitted(stream, request.request_id, request.sampling.n, received or ())
        self.post(Submit(stream, request, received))
        return stream

    def serve_user(self, connection: Connection, request: Request, received: Received | None) -> None:
        """A user's call, like GenerationServicer."""
        stream = self._next_stream
        self._connections.append(connection)
        connection.ends[SERVER].on_cut = self.here(self.post, StreamClosed(stream))
        self.open_stream(request, received, lambda event: connection.send(PEER, event))

    def serve_link(self, connection: Connection) -> None:
        """A leader's call, like ReplicaLinkServicer: open to the leader of the epoch that serves and to no other."""
        self.accept(connection, self._open_link, connection)

    def _open_link(self, connection: Connection, report: Report) -> None:
        fence = report.fence
        assert report.hello is not None
        if self.replicas[fence.replica].serving != fence:
            connection.ends[SERVER].on_message = lambda report: None
            connection.cut()
            return
        older = self._links.get(fence.replica)
        self._links[fence.replica] = connection
        end = connection.ends[SERVER]
        end.on_message = self.here(self._take_report, connection)
        end.on_cut = self.here(self._close_link, connection, fence)
        if older:
            older.cut()
        self.post(LinkOpened(fence, report.hello))

    def _take_report(self, connection: Connection, report: Report) -> None:
        if self.replicas[report.fence.replica].serving != report.fence:
            connection.cut()
            return
        epoch = self._sites[report.fence.replica].epoch
        require(report.fence.epoch == epoch, "{} is heard, but epoch {} is on disk", report, epoch)
        self.post(Reported(report))

    def _close_link(self, connection: Connection, fence: Fence) -> None:
        if self._links.get(fence.replica) is connection:
            del self._links[fence.replica]
            self.post(LinkClosed(fence))

    def _write(self, records: list[Record]) -> None:
        content = frame(records, self.term)
        if self.world.random.random() < self.crash_rate:
            torn = content[: self.world.random.randrange(len(content) + 1)]
            whole, _ = unframe(torn)
            self._journal += torn
            self.world.checker.written(whole)
            raise Crash
        self._journal += content
        self.world.checker.written(records)

    def _tick(self) -> None:
        self.after(TICK_S, self._tick)
        self.post(Tick())
        for replica in self.replicas:
            replica.tick()
