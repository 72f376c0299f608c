"""The simulated supervisor: starts a coordinator, and a successor when it has died or gives no sign of life.

It is also the address that clients and ranks dial. A coordinator that was stopped may be out of reach of its SIGKILL,
its machine being frozen; then it wakes beside its successor.
"""

from __future__ import annotations

from collections.abc import Callable

from coordinator.replica.events import Event as ReplicaEvent
from tests.simulation.coordinator import Coordinator, Settings
from tests.simulation.crashes import Crashes
from tests.simulation.disk import Disk
from tests.simulation.ranks import Site
from tests.simulation.world import World

PATIENCE_S = 1.5  # with one that gives no sign of life
OUT_OF_REACH = 0.7  # how often it cannot be killed
KEEPALIVE_S = 4.0  # until peers of a coordinator that was replaced hang up


class Supervisor:
    """One coordinator after another. sleepers: those that were replaced while they were stopped, and live."""

    coordinator: Coordinator  # the last one, dead or alive

    def __init__(self, world: World, settings: Settings, sites: list[Site]) -> None:
        self.crashes = Crashes(world.random)
        self.disk = Disk(world.random)
        self.sleepers: list[Coordinator] = []
        self._world = world
        self._settings = settings
        self._sites = sites
        for site in sites:
            site.supervisor = self
        self._start()

    @property
    def up(self) -> bool:
        """Somebody answers."""
        return self.coordinator.running

    def call(self, action: Callable[[Coordinator], None]) -> None:
        """Nobody hears it while no coordinator is up; one that is stopped hears it when it wakes."""
        self.coordinator.here(action, self.coordinator)()

    def tell_replica(self, index: int, event: ReplicaEvent) -> None:
        """Like the agents' word of a death."""
        self.call(lambda coordinator: coordinator.replicas[index].post(event))

    def cut_power(self) -> None:
        """On the coordinator's machine."""
        self.coordinator.end()
        self.disk.cut_power()

    def stop(self) -> None:
        """The coordinator, until it wakes by itself or its successor has come."""
        random, stopped = self._world.random, self.coordinator
        stopped.stop()
        self._world.clock.after(PATIENCE_S * (0.5 + random.random()), self._replace, stopped)
        if random.random() < 0.3:
            self._world.clock.after(PATIENCE_S * random.random(), stopped.wake)

    def wake(self, sleeper: Coordinator) -> None:
        if sleeper in self.sleepers:
            self.sleepers.remove(sleeper)
            sleeper.wake()

    def _replace(self, stopped: Coordinator) -> None:
        if not stopped.stopped or stopped is not self.coordinator:
            return
        random, clock = self._world.random, self._world.clock
        if random.random() > OUT_OF_REACH:
            stopped.end()
            return
        self.sleepers.append(stopped)
        clock.after(3.0 * KEEPALIVE_S * random.random(), self.wake, stopped)
        for connection in stopped.connections:
            clock.after(random.random() * random.choice((0.1, KEEPALIVE_S)), connection.cut)
        self.disk.lost |= stopped.unwritten
        self._start()

    def _ended(self, coordinator: Coordinator) -> None:
        self.disk.lost |= coordinator.unwritten and coordinator is self.coordinator
        if coordinator is self.coordinator:
            self._world.clock.after(0.05 + self._world.random.random(), self._start)

    def _start(self) -> None:
        lost = self.disk.lost
        state = self.disk.open()
        self._world.checker.restarted(state, lost)
        self.coordinator = Coordinator(self._world, self.disk, self.crashes, self.disk.owner, self._ended)
        self.coordinator.begin(self._settings, self._sites, state)
