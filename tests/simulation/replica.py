"""The coordinator's side of a replica: the real ReplicaCore, its effects executed on a site of simulated processes.

Like `coordinator/replica/service.py` with `coordinator/internal_server.py`. Orders to launch and to kill take their
time; a crash of the coordinator may leave some of them undone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from coordinator.placement import ReplicaPlan
from coordinator.replica.config import ReplicaConfig
from coordinator.replica.core import ReplicaCore
from coordinator.replica.events import (
    Attached,
    AwaitPersisted,
    Detached,
    Emit,
    Event,
    GiveUp,
    Kill,
    Killed,
    Launch,
    LaunchFailed,
    Persisted,
    PersistEpoch,
    RankEvent,
    Relayout,
    ReplicaDown,
    ReplicaUp,
    Started,
    Tell,
    Tick,
)
from coordinator.requests.events import ReplicaEnded
from echelon.internal.link import Fence
from tests.simulation.checker import require
from tests.simulation.network import Connection
from tests.simulation.ranks import Site
from tests.simulation.world import PEER, SERVER

if TYPE_CHECKING:
    from tests.simulation.coordinator import Coordinator

LAUNCH_FAILS, AGENT_LOST, DISK_REFUSES = 0.02, 0.1, 0.05  # how often
LEASE_S = 3.0  # of a lost node's agent
RETRY_S = 1.0


class Replica:
    """One replica as one coordinator keeps it."""

    def __init__(self, coordinator: Coordinator, site: Site) -> None:
        self.serving: Fence | None = None
        self._coordinator = coordinator
        self._site = site
        self._streams: dict[tuple[int, str], Connection] = {}  # by rank and incarnation
        self._unpersisted: int | None = None
        self._wanted = site.degrees  # the layout, as far as this coordinator knows
        self._random = coordinator.world.random
        config = ReplicaConfig(
            replica=site.index,
            term=coordinator.term,
            epoch=site.epoch,
            plan=self._plan(),
            layout=str(self._wanted),
            launch_timeout_s=20.0,
        )
        self.core = ReplicaCore(config)
        coordinator.after(self._random.random() * self._random.choice((0.01, 1.0)), self._begin)

    def serve_rank(self, connection: Connection) -> None:
        """A rank's call, like RankControlServicer."""
        self._coordinator.accept(connection, self._take, connection)

    def relayout(self) -> None:
        """The site is to be laid out otherwise."""
        self._wanted = self._site.degrees
        self.post(Relayout(self._plan(), str(self._wanted)))

    def _plan(self) -> ReplicaPlan:
        limits, degrees = self._site.limits, self._wanted
        return ReplicaPlan(
            degrees=degrees,
            parameter_bytes=(0,) * degrees.ranks,
            block_bytes=(1,) * degrees.ranks,
            block_tokens=limits.block_tokens,
            max_context=limits.max_context,
            memory_fraction=1.0,
            shared_memory=False,
        )

    def tick(self, lag_s: float) -> None:
        self.post(Tick(lag_s))

    def post(self, event: Event) -> None:
        """One event through the core; its effects in order."""
        coordinator = self._coordinator
        effects = self.core.step(coordinator.world.clock.now, event)
        for effect in effects:
            coordinator.maybe_crash()
            match effect:
                case PersistEpoch(epoch):
                    self._unpersisted = epoch
                    self._persist()
                case Launch(rank, incarnation):
                    self._launch(rank, incarnation)
                case Kill(epoch):
                    self._kill(epoch)
                case AwaitPersisted(epoch):
                    coordinator.after(0.0, self._await_persisted, epoch)
                case Tell(_, rank, incarnation):
                    if stream := self._streams.get((rank, incarnation)):
                        stream.send(PEER, effect)
                case ReplicaUp(fence):
                    self._check_up(fence)
                    self.serving = fence
                case ReplicaDown(fence, reason, step_broke, requests):
                    self.serving = None
                    coordinator.post(ReplicaEnded(fence, reason, step_broke, requests))
                case Emit(kind):
                    coordinator.world.checker.told[kind] += 1
                case GiveUp():
                    coordinator.give_up()
        if effects:
            coordinator.world.stepped()

    def _check_up(self, fence: Fence) -> None:
        """What is said to serve does, all of it; a coordinator that was superseded is about to find out."""
        site, ranks = self._site, set(range(self._wanted.ranks))
        if not self._coordinator.superseded:
            require(fence.epoch == site.epoch, "{} serves, epoch {} is on disk", fence, site.epoch)
            found = site.layouts[fence.epoch], site.served[fence.epoch]
            require(found == (self._wanted, ranks), "{} serves {}, where {} is wanted", fence, found, self._wanted)

    def _begin(self) -> None:
        self.post(Started(self._site.survivors()))

    def _take(self, connection: Connection, message: tuple[int, RankEvent]) -> None:
        epoch, event = message
        if isinstance(event, Attached):
            self._attach(connection, event)
        elif epoch in (0, self.core.fence.epoch):
            self.post(event)

    def _attach(self, stream: Connection, hello: Attached) -> None:
        rank = hello.rank, hello.incarnation
        older = self._streams.get(rank)
        self._streams[rank] = stream
        stream.ends[SERVER].on_cut = self._coordinator.here(self._detach, rank, stream)
        if older:
            older.cut()
        self.post(hello)

    def _detach(self, rank: tuple[int, str], stream: Connection) -> None:
        if self._streams.get(rank) is stream:
            del self._streams[rank]
            self.post(Detached(*rank))

    def _persist(self) -> None:
        """Sometimes the disk refuses; the epoch does not begin before it takes it."""
        if self._unpersisted is None:
            return
        self._coordinator.disk.check_term(self._coordinator.term)
        if self._random.random() >= DISK_REFUSES:
            self._coordinator.persist_epoch(self._site.index, self._unpersisted, self._wanted)
            self._unpersisted = None

    def _await_persisted(self, epoch: int) -> None:
        self._persist()
        if self._unpersisted is None:
            self.post(Persisted(epoch))
        else:
            self._coordinator.after(RETRY_S, self._await_persisted, epoch)

    def _launch(self, rank: int, incarnation: str) -> None:
        """An order that is out is carried out even if the coordinator dies meanwhile."""
        if not self._coordinator.superseded:
            self._site.may_launch(incarnation)
        if self._random.random() < LAUNCH_FAILS:
            self._coordinator.after(0.1, self.post, LaunchFailed(rank, incarnation, "no room"))
        else:
            self._coordinator.world.clock.after(self._random.random(), self._site.start, rank, incarnation)

    def _kill(self, epoch: int) -> None:
        """Each process in its time, and the confirmation after the last. Of a lost node's there is none to wait for."""
        confirmed_s = 0.0
        for process in self._site.processes:
            delay_s = self._random.random()
            if process.frozen:
                process.doomed = True
            elif process.out_of_reach or self._random.random() < AGENT_LOST:
                process.unseen = True
                self._coordinator.world.clock.after(self._random.random() * LEASE_S, process.end)
            else:
                self._coordinator.after(delay_s, process.end)
                confirmed_s = max(confirmed_s, delay_s)
        confirmed_s += self._random.random() * self._random.choice((0.01, 2.0))
        self._coordinator.after(confirmed_s, self._killed, epoch)

    def _killed(self, epoch: int) -> None:
        self._persist()
        if self._unpersisted is None:
            self.post(Killed(epoch))
        else:
            self._coordinator.after(RETRY_S, self._killed, epoch)
