"""Simulated rank processes, and the leader that one of them is.

A rank dials the coordinator again and again and does as it is told, like `worker/control.py` and `worker/rank.py`; the
leader drives a real EngineCore on a fake device, like `worker/leader.py`.
"""

from __future__ import annotations

from dataclasses import replace
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
    StoreOpened,
    Tell,
)
from echelon.internal.link import Command, Fence
from parallel.degrees import Degrees
from tests.simulation.attempts import Attempts
from tests.simulation.checker import require
from tests.simulation.network import Connection
from tests.simulation.pipeline import Pipeline
from tests.simulation.world import PEER, SERVER, World
from worker.engine import (
    Commanded,
    Completed,
    Drain,
    EngineCore,
    EngineLimits,
    Event,
    LinkClosed,
    LinkOpened,
    RunPlan,
    SendReport,
)
from worker.plan import StepResult

if TYPE_CHECKING:
    from tests.simulation.coordinator import Coordinator

HEARTBEAT_S = 1.0
SERVING = ("ready", "retiring")  # until it has ended, an epoch's work goes on


class Site:
    """A replica's slots with the processes in them, its epoch on the coordinator's disk, and the layout wanted now."""

    def __init__(self, world: World, index: int, degrees: Degrees, limits: EngineLimits, noisy: bool) -> None:
        self.world = world
        self.index = index
        self.degrees = degrees
        self.limits = limits
        self.noisy = noisy
        self.epoch = 0
        self.layouts: dict[int, Degrees] = {}  # of each epoch
        self.processes: list[RankProcess] = []
        self.leaders: list[Leader] = []  # of all epochs

    @property
    def leader(self) -> Leader | None:
        """Of the epoch that is on disk, once it serves."""
        leaders = [process.leader for process in self.processes if process.epoch == self.epoch]
        return next((leader for leader in leaders if leader), None)

    def persist(self, epoch: int) -> None:
        require(epoch > self.epoch, "epoch {} after {}", epoch, self.epoch)
        self.epoch, self.layouts[epoch] = epoch, self.degrees

    def may_launch(self, incarnation: str) -> None:
        require(incarnation == str(self.epoch), "{} is launched, epoch {} is on disk", incarnation, self.epoch)

    def start(self, coordinator: Coordinator, rank: int, incarnation: str) -> None:
        self.processes.append(RankProcess(self, coordinator, rank, incarnation))

    def survivors(self) -> frozenset[tuple[int, str]]:
        return frozenset((process.rank, process.incarnation) for process in self.processes if not process.unseen)

    def form(self, epoch: int) -> None:
        """A group forms when all its ranks have come to it."""
        group = [process for process in self._peers(epoch) if process.phase == "loading"]
        if len(group) == self.layouts[epoch].ranks:
            for process in group:
                self.world.clock.after(self.world.random.random() * 0.5, process.serve)

    def serves_alone(self, epoch: int) -> None:
        serving = {process.epoch for process in self.processes if process.phase in SERVING and not process.unseen}
        others = serving - {epoch}
        require(not others, "epoch {} of replica {} begins while {} serve", epoch, self.index, others)

    def computes(self, epoch: int) -> bool:
        """A step needs all ranks of its epoch."""
        return len([each for each in self._peers(epoch) if each.phase in SERVING]) == self.layouts[epoch].ranks

    def _peers(self, epoch: int) -> list[RankProcess]:
        return [each for each in self.processes if each.epoch == epoch and not each.stopped]


class RankProcess:
    """From launch to kill. phase is what it tells the coordinator. unseen: its node's agent is lost."""

    def __init__(self, site: Site, coordinator: Coordinator, rank: int, incarnation: str) -> None:
        self.rank = rank
        self.incarnation = incarnation
        self.phase = "waiting"
        self.stopped = False
        self.unseen = False
        self.leader: Leader | None = None
        self._site = site
        self._coordinator = coordinator
        self._clock = site.world.clock
        self._random = site.world.random
        self.epoch = 0  # that it forms or serves, or ends
        self._term = 0
        self._told_epoch = 0
        self._blocks = 0
        self._stream: Connection | None = None
        self._outgoing: list[RankEvent] = []
        self._dial()
        self._beat()

    @property
    def alive(self) -> bool:
        return self in self._site.processes

    def end(self) -> None:
        """SIGKILL."""
        if self.alive:
            self._site.processes.remove(self)
            self.stopped = True
            self.cut()
            if self.leader:
                self.leader.stop()

    def die(self) -> None:
        """By itself; its node's agent tells."""
        if not self.alive:
            return
        self.end()
        if not self.unseen:
            died = Died(self.rank, self.incarnation)
            told_s = self._random.random() * self._random.choice((0.001, 0.1, 3.0))
            self._clock.after(told_s, self._coordinator.tell_replica, self._site.index, died)

    def hang(self) -> None:
        """SIGSTOP: nothing is heard of it any more, and its connections stand."""
        self.stopped = True
        if self.leader:
            self.leader.stopped = True

    def cut(self) -> None:
        if self._stream:
            self._stream.cut()

    def serve(self) -> None:
        """The group has formed, the weights are loaded."""
        if self.stopped:
            return
        self.phase = "ready"
        self._site.serves_alone(self.epoch)
        self._send(Ready(self.rank, self.incarnation, self._resident()))
        if self.rank == 0:
            fence = Fence(self._term, self._site.index, self.epoch)
            self.leader = Leader(self._site, self._coordinator, fence, self._blocks)
            self._site.leaders.append(self.leader)
            self.leader.dial()

    def _retire(self) -> None:
        """Told again it changes nothing; it takes its time."""
        if self.phase == "waiting":
            self._send(Retired(self.rank, self.incarnation, self._site.limits.kv_blocks))
        elif self.phase != "retiring":
            require(self.phase == "ready", "told to retire in phase {}", self.phase)
            self.phase = "retiring"
            self._clock.after(self._random.random() * self._random.choice((0.1, 1.0, 10.0)), self._retired)

    def _retired(self) -> None:
        if self.stopped:
            return
        self.epoch, self.phase = 0, "waiting"
        if self.leader:
            self.leader.stop()
            self.leader = None
        self._retire()

    def _resident(self) -> Resident:
        return Resident(0, self._blocks)

    def _dial(self) -> None:
        if self.stopped:
            return
        if not self._coordinator.up:
            self._clock.after(0.05 + 0.3 * self._random.random(), self._dial)
            return
        stream = self._stream = self._site.world.connect()
        stream.ends[PEER].on_message = lambda command: self._obey(stream, command)
        stream.ends[PEER].on_cut = lambda: self._detached(stream)
        self._coordinator.replicas[self._site.index].serve_rank(stream)
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
            self._clock.after(0.2, self._dial)

    def _send(self, event: RankEvent) -> None:
        if self._stream:
            self._stream.send(SERVER, (self._told_epoch, event))
        else:
            self._outgoing.append(event)

    def _beat(self) -> None:
        if not self.stopped:
            if self._stream:
                self._send(Beat(self.rank, self.incarnation, self.phase, 0))
            self._clock.after(HEARTBEAT_S, self._beat)

    def _obey(self, stream: Connection, tell: Tell) -> None:
        if self.stopped or self._stream is not stream or tell.fence.term < self._term:
            return
        self._term = tell.fence.term
        if self.leader:
            self.leader.term = self._term
        match tell.command:
            case OpenStore():
                self._told_epoch, self.phase = tell.fence.epoch, "store"  # told twice, it answers the same
                self._send(StoreOpened(self.rank, self.incarnation, f"store of {self.incarnation}"))
            case Form(_, kv_blocks):
                require(self.phase in ("waiting", "store"), "told to form in phase {}", self.phase)
                self._told_epoch = self.epoch = tell.fence.epoch
                self.phase, self._blocks = "loading", kv_blocks
                self._site.form(self.epoch)
            case Retire():
                self._told_epoch = tell.fence.epoch
                self._retire()
            case Refuse():
                self.die()


class Leader:
    """The engine of one epoch, its device, and a link that it dials again and again."""

    def __init__(self, site: Site, coordinator: Coordinator, fence: Fence, kv_blocks: int) -> None:
        degrees, random = site.layouts[fence.epoch], site.world.random
        stages = degrees.pipeline
        depth = random.randint(1, stages + 1)
        limits = replace(site.limits, kv_blocks=kv_blocks, stages=stages, depth=depth, data=degrees.data)
        self.core = EngineCore(fence, limits)
        self.stopped = False
        self.term = fence.term
        self._site = site
        self._coordinator = coordinator
        self._epoch = fence.epoch
        self._clock = site.world.clock
        self._attempts = Attempts(limits)
        self._step_s = random.choice((0.01, 0.05, 0.2)) / stages
        self.pipeline = Pipeline(limits, random if site.noisy else None, self._slot_s, self._after)
        self._link: Connection | None = None

    def stop(self) -> None:
        self.stopped = True
        self.cut()

    def cut(self) -> None:
        if self._link:
            self._link.cut()

    def dial(self) -> None:
        if self.stopped:
            return
        if not self._coordinator.up:
            self._clock.after(0.05 + 0.3 * self._site.world.random.random(), self.dial)
            return
        link = self._link = self._site.world.connect()
        link.ends[PEER].on_message = lambda command: self._obey(link, command)
        link.ends[PEER].on_cut = lambda: self._closed(link)
        self._coordinator.serve_link(link)
        self._step(LinkOpened(self.term))

    def _obey(self, link: Connection, command: Command) -> None:
        if self._link is link:
            if command.fence == self.core.fence:
                self._attempts.commanded(command)
            self._step(Commanded(command))

    def _closed(self, link: Connection) -> None:
        if self._link is link:
            self._link = None
            self._step(LinkClosed())
            self._clock.after(0.2, self.dial)

    def _step(self, event: Event) -> None:
        if self.stopped:
            return
        effects = self.core.step(self._clock.now, event)
        self._attempts.running(self.core._lanes.schedulers)
        for effect in effects:
            match effect:
                case RunPlan(plans):
                    self._attempts.planned(plans)
                    self.pipeline.take(self._clock.now, plans)
                case Drain():
                    self.pipeline.take(self._clock.now, None)
                case SendReport(report):
                    self._attempts.reported(report)
                    assert self._link is not None
                    self._link.send(SERVER, report)

    def _slot_s(self) -> float:
        """Slots of a step differ, and a slow one comes now and then."""
        return self._step_s * self._site.world.random.choice((0.5, 1.0, 1.0, 1.5, 4.0))

    def _after(self, delay_s: float, result: StepResult) -> None:
        self._clock.after(delay_s, self._completed, Completed(result))

    def _completed(self, event: Completed) -> None:
        if self._site.computes(self._epoch):
            self._step(event)
