"""Simulated rank processes, and the slots that they are in.

A rank dials the coordinator again and again and does as it is told, like `worker/control.py` and `worker/rank.py`. It
may die, be stopped for a while, be cut off from the coordinator, or freeze with its whole node.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING

from coordinator.replica.events import (
    Attached,
    Beat,
    Died,
    Form,
    OpenStore,
    RankEvent,
    Ready,
    Refuse,
    Resident,
    Retire,
    Retired,
    Settled,
    StoreOpened,
    Tell,
)
from echelon.internal.link import Fence
from parallel.degrees import Degrees
from tests.simulation.checker import require
from tests.simulation.leader import Leader
from tests.simulation.network import Connection
from tests.simulation.world import PEER, SERVER, Process, World
from worker.engine import EngineLimits

if TYPE_CHECKING:
    from tests.simulation.supervisor import Supervisor

HEARTBEAT_S = 1.0
CAPTURES = (1, 2, 4)  # rows of the graphs that an epoch is without when it is formed again
SERVING = ("ready", "retiring")  # until it has ended, an epoch's work goes on


class Site:
    """A replica's slots with the processes in them, its epoch on the coordinator's disk, and the layout wanted now.

    layouts, served: of each epoch how it is laid out, and which of its ranks have come to serve.
    """

    def __init__(self, world: World, index: int, degrees: Degrees, limits: EngineLimits, noisy: bool) -> None:
        self.world = world
        self.index = index
        self.degrees = degrees
        self.limits = limits
        self.noisy = noisy
        self.supervisor: Supervisor  # set before anything is started
        self.epoch = 0
        self.layouts: dict[int, Degrees] = {}
        self.served: defaultdict[int, set[int]] = defaultdict(set)
        self.processes: list[RankProcess] = []
        self.leaders: list[Leader] = []  # of all epochs

    @property
    def leader(self) -> Leader | None:
        """Of the epoch that is on disk, once it serves."""
        leaders = [process.leader for process in self.processes if process.epoch == self.epoch]
        return next((leader for leader in leaders if leader), None)

    @property
    def as_wanted(self) -> bool:
        """It serves, in the layout that is wanted."""
        return self.leader is not None and self.computes(self.epoch) and self.layouts[self.epoch] == self.degrees

    def persist(self, epoch: int, layout: Degrees) -> None:
        require(epoch > self.epoch, "epoch {} after {}", epoch, self.epoch)
        self.epoch, self.layouts[epoch] = epoch, layout

    def may_launch(self, incarnation: str) -> None:
        require(incarnation == str(self.epoch), "{} is launched, epoch {} is on disk", incarnation, self.epoch)

    def start(self, rank: int, incarnation: str) -> None:
        self.processes.append(RankProcess(self, rank, incarnation))

    def survivors(self) -> frozenset[tuple[int, str]]:
        return frozenset((process.rank, process.incarnation) for process in self.processes if not process.out_of_reach)

    def form(self, epoch: int) -> None:
        """A group forms when all its ranks have come to it."""
        group = [process for process in self._peers(epoch) if process.phase == "loading"]
        if len(group) == self.layouts[epoch].ranks:
            for process in group:
                self.world.clock.after(self.world.random.random() * 0.5, process.here(process.serve))

    def serves_alone(self, epoch: int) -> None:
        serving = {each.epoch for each in self.processes if each.phase in SERVING and not each.out_of_reach}
        others = serving - {epoch}
        require(not others, "epoch {} of replica {} begins while {} serve", epoch, self.index, others)

    def computes(self, epoch: int) -> bool:
        """A step needs all ranks of its epoch."""
        return len([each for each in self._peers(epoch) if each.phase in SERVING]) == self.layouts[epoch].ranks

    def woken(self, epoch: int) -> None:
        """A rank of this epoch goes on: what the others waited for can come."""
        self.form(epoch)
        for process in self.processes:
            if process.epoch == epoch and process.leader:
                process.leader.catch_up()

    def _peers(self, epoch: int) -> list[RankProcess]:
        return [each for each in self.processes if each.epoch == epoch and each.running]


class RankProcess(Process):
    """From launch to kill. phase is what it tells the coordinator.

    unseen: its node's agent is lost. frozen: its whole node is stopped, the agent too. doomed: it was to be killed.
    """

    def __init__(self, site: Site, rank: int, incarnation: str) -> None:
        super().__init__()
        self.rank = rank
        self.incarnation = incarnation
        self.phase = "waiting"
        self.unseen = self.frozen = self.doomed = False
        self.leader: Leader | None = None
        self._site = site
        self._supervisor = site.supervisor
        self._clock = site.world.clock
        self._random = site.world.random
        self.epoch = 0  # that it forms or serves, or ends
        self._term = 0
        self._told_epoch = 0
        self._blocks = 0
        self._captures: tuple[int, ...] = ()
        self._unreachable_until = 0.0
        self._stream: Connection | None = None
        self._outgoing: list[RankEvent] = []
        self._dial()
        self._beat()

    @property
    def out_of_reach(self) -> bool:
        """Of the coordinator, with its node's agent."""
        return self.unseen or self.frozen or not self.reaches_coordinator

    @property
    def reaches_coordinator(self) -> bool:
        return self._clock.now >= self._unreachable_until

    @property
    def connections(self) -> list[Connection]:
        """That stand now."""
        both = self._stream, self.leader.link if self.leader else None
        return [connection for connection in both if connection and connection.open]

    def end(self) -> None:
        """SIGKILL."""
        if not self.ended:
            super().end()
            self._site.processes.remove(self)
            self.cut()
            if self.leader:
                self.leader.close()

    def die(self) -> None:
        """By itself; its node's agent tells."""
        if self.ended:
            return
        told = not self.out_of_reach
        self.end()
        if told:
            died = Died(self.rank, self.incarnation)
            told_s = self._random.random() * self._random.choice((0.001, 0.1, 3.0))
            self._clock.after(told_s, self._supervisor.tell_replica, self._site.index, died)

    def freeze(self) -> None:
        """With its node."""
        self.stop()
        self.frozen = self.stopped

    def wake(self) -> None:
        """An agent that wakes finds its lease over if it was to kill this process meanwhile, and kills it."""
        if self.stopped:
            self.frozen, self.unseen = False, self.unseen or self.doomed
            super().wake()
            if self.epoch:
                self._site.woken(self.epoch)
            if self.doomed:
                self._clock.after(self._random.random(), self.end)

    def part(self, seconds: float, notice_s: float) -> None:
        """Nothing reaches it and nothing comes from it; either end gives up what is open if it takes too long."""
        self._unreachable_until = self._clock.now + seconds
        for connection in self.connections:
            connection.stall(seconds)
            if seconds > notice_s:
                self._clock.after(notice_s, connection.cut)

    def cut(self) -> None:
        if self._stream:
            self._stream.cut()

    def serve(self) -> None:
        """The group has formed, the weights are loaded."""
        if self.phase != "loading":
            return
        self.phase = "ready"
        self._site.served[self.epoch].add(self.rank)
        if not self.out_of_reach:
            self._site.serves_alone(self.epoch)
        self._send(Ready(self.rank, self.incarnation, self._resident()))
        if self.rank == 0:
            fence = Fence(self._term, self._site.index, self.epoch)
            self.leader = Leader(self, self._site, fence, self._blocks, self._captures)
            self._site.leaders.append(self.leader)
            self.leader.dial()

    def _retire(self) -> None:
        """Told again it changes nothing; it takes its time."""
        if self.phase == "waiting":
            self._send(Retired(self.rank, self.incarnation, self._site.limits.kv_blocks))
        elif self.phase != "retiring":
            require(self.phase == "ready", "told to retire in phase {}", self.phase)
            self.phase = "retiring"
            self._after(self._random.random() * self._random.choice((0.1, 1.0, 10.0)), self._retired)

    def _retired(self) -> None:
        self.epoch, self.phase = 0, "waiting"
        if self.leader:
            self.leader.close()
            self.leader = None
        self._retire()

    def _resident(self) -> Resident:
        return Resident(0, self._blocks, Settled(0, graphs=True))

    def _dial(self) -> None:
        if not (self._supervisor.up and self.reaches_coordinator):
            self._after(0.05 + 0.3 * self._random.random(), self._dial)
            return
        stream = self._stream = self._site.world.connect()
        stream.ends[PEER].on_message = self.here(self._obey, stream)
        stream.ends[PEER].on_cut = self.here(self._detached, stream)
        self._supervisor.coordinator.replicas[self._site.index].serve_rank(stream)
        hello = Attached(
            rank=self.rank,
            incarnation=self.incarnation,
            pid=1,
            node_id="",
            phase=self.phase,
            device="cpu",
            memory_bytes=self._site.limits.kv_blocks,
            epoch=self._told_epoch,
            layout=str(self._site.layouts.get(self.epoch, "")),
            resident=self._resident() if self.phase == "ready" else None,
        )
        stream.send(SERVER, (self._told_epoch, hello))
        outgoing, self._outgoing = self._outgoing, []
        for event in outgoing:
            self._send(event)

    def _detached(self, stream: Connection) -> None:
        if self._stream is stream:
            self._stream = None
            self._after(0.2, self._dial)

    def _send(self, event: RankEvent) -> None:
        if self._stream:
            self._stream.send(SERVER, (self._told_epoch, event))
        else:
            self._outgoing.append(event)

    def _beat(self) -> None:
        if self._stream:
            self._send(Beat(self.rank, self.incarnation, self.phase, 0))
        self._after(HEARTBEAT_S, self._beat)

    def _after(self, delay_s: float, action: Callable[[], None]) -> None:
        self._clock.after(delay_s, self.here(action))

    def _obey(self, stream: Connection, tell: Tell) -> None:
        if self._stream is not stream or tell.fence.term < self._term:
            return
        self._term = tell.fence.term
        if self.leader:
            self.leader.term = self._term
        match tell.command:
            case OpenStore():
                self._told_epoch, self.phase = tell.fence.epoch, "store"  # told twice, it answers the same
                self._send(StoreOpened(self.rank, self.incarnation, f"store of {self.incarnation}"))
            case Form(_, kv_blocks, settled):
                require(self.phase in ("waiting", "store"), "told to form in phase {}", self.phase)
                self._told_epoch = self.epoch = tell.fence.epoch
                self.phase, self._blocks, self._captures = "loading", kv_blocks, CAPTURES if settled else ()
                self._site.form(self.epoch)
            case Retire():
                self._told_epoch = tell.fence.epoch
                self._retire()
            case Refuse():
                self.die()
