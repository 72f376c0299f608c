"""The leader that rank 0 of a simulated replica is: a real EngineCore on a fake device, like `worker/leader.py`.

It goes on while nobody listens, and links again and again. It may die before any effect, or send a report twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from echelon.internal.link import Command, Fence
from tests.simulation.attempts import Attempts
from tests.simulation.checker import require
from tests.simulation.network import Connection
from tests.simulation.pipeline import Pipeline
from tests.simulation.world import PEER, SERVER
from worker.engine import Commanded, Completed, Drain, EngineCore, Event, LinkClosed, LinkOpened, RunPlan, SendReport
from worker.plan import StepPlan, StepResult

if TYPE_CHECKING:
    from tests.simulation.ranks import RankProcess, Site


class Leader:
    """The engine of one epoch, its device, and a link that it dials again and again.

    repeats: its next report is sent twice. effects_left: until its process dies, None where it is not to.
    told: of either, once it has happened.
    """

    def __init__(
        self, process: RankProcess, site: Site, fence: Fence, kv_blocks: int, captures: tuple[int, ...]
    ) -> None:
        degrees, random = site.layouts[fence.epoch], site.world.random
        stages = degrees.pipeline
        depth = random.randint(1, stages + 1)
        limits = replace(site.limits, kv_blocks=kv_blocks, stages=stages, depth=depth, data=degrees.data)
        limits = replace(limits, captures=captures)
        self.core = EngineCore(fence, limits)
        self.closed = False
        self.term = fence.term
        self.link: Connection | None = None
        self.repeats = False
        self.effects_left: int | None = None
        self.told: Callable[[], None] = lambda: None
        self._process = process
        self._site = site
        self._epoch = fence.epoch
        self._clock = site.world.clock
        self._attempts = Attempts(limits)
        self._step_s = random.choice((0.01, 0.05, 0.2)) / stages
        self.pipeline = Pipeline(limits, random if site.noisy else None, self._slot_s, self._after)
        self._delayed: list[StepResult] = []
        self._left, self.captured = set(captures), 0  # graphs

    @property
    def busy(self) -> bool:
        """Steps are under way."""
        return self.core._lanes.plans_in_flight > 0

    @property
    def linked(self) -> bool:
        return self.link is not None and self.link.open

    def close(self) -> None:
        self.closed = True
        self.cut()

    def cut(self) -> None:
        if self.link:
            self.link.cut()

    def dial(self) -> None:
        if self.closed:
            return
        supervisor = self._site.supervisor
        if not (supervisor.up and self._process.reaches_coordinator):
            self._clock.after(0.05 + 0.3 * self._site.world.random.random(), self._process.here(self.dial))
            return
        link = self.link = self._site.world.connect()
        link.ends[PEER].on_message = self._process.here(self._obey, link)
        link.ends[PEER].on_cut = self._process.here(self._closed, link)
        supervisor.coordinator.serve_link(link)
        self._step(LinkOpened(self.term))

    def _obey(self, link: Connection, command: Command) -> None:
        if self.link is link:
            if command.fence == self.core.fence:
                self._attempts.commanded(command)
                self._site.world.checker.had |= {(assign.request, assign.attempt) for assign in command.assigns}
            self._step(Commanded(command))

    def _closed(self, link: Connection) -> None:
        if self.link is link:
            self.link = None
            self._step(LinkClosed())
            self._clock.after(0.2, self._process.here(self.dial))

    def _step(self, event: Event) -> None:
        if self.closed:
            return
        effects = self.core.step(self._clock.now, event)
        self._attempts.running(self.core._lanes.schedulers)
        for effect in effects:
            if self._dies():
                return
            match effect:
                case RunPlan(plans):
                    self._attempts.planned(plans)
                    self._captured(plans)
                    self.pipeline.take(self._clock.now, plans)
                case Drain():
                    self.pipeline.take(self._clock.now, None)
                case SendReport(report):
                    self._attempts.reported(report)
                    assert self.link is not None
                    self.link.send(SERVER, report)
                    if self.repeats and report.hello is None:
                        self.repeats = False
                        self.told()
                        self.link.send(SERVER, report)

    def _captured(self, plans: tuple[StepPlan, ...]) -> None:
        """Each graph once, the same on all ranks, and only before a step that has nothing else than one would serve."""
        sizes = {plan.captures for plan in plans}
        require(len(sizes) == 1, "data ranks capture {}", sizes)
        if (size := sizes.pop()) == 0:
            return
        require(size in self._left, "{} is captured, left are {}", size, self._left)
        self._left.remove(size)
        self.captured += 1
        require(all(row.given is None for plan in plans for row in plan.rows), "prompts wait for a graph")

    def _slot_s(self) -> float:
        """Slots of a step differ, and a slow one comes now and then."""
        return self._step_s * self._site.world.random.choice((0.5, 1.0, 1.0, 1.5, 4.0))

    def _dies(self) -> bool:
        """Before this effect, where it is meant to."""
        if self.effects_left is None:
            return False
        self.effects_left -= 1
        if self.effects_left < 0:
            self.told()
            self._process.die()
        return self.closed

    def _after(self, delay_s: float, result: StepResult) -> None:
        self._clock.after(delay_s, self._process.here(self._completed, result))

    def _completed(self, result: StepResult) -> None:
        self._delayed.append(result)
        self.catch_up()

    def catch_up(self) -> None:
        """A step ends when every rank has computed it; one that is stopped may do so later."""
        while self._delayed and self._site.computes(self._epoch):
            self._step(Completed(self._delayed.pop(0)))
