"""How a simulated cluster is struck: each fault by its name, done to the coordinator, to a replica or to a client.

What is done may be an order for later: to die between two effects, to send the next report twice. Who gives it is told
when it is carried out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from tests.simulation.client import User
from tests.simulation.crashes import KILLED_BEFORE_DELIVERY, KILLED_BETWEEN_EFFECTS, KILLED_IN_A_WRITE
from tests.simulation.leader import Leader
from tests.simulation.ranks import RankProcess, Site
from tests.simulation.supervisor import Supervisor
from tests.simulation.world import World

KILLED = "coordinator killed"
STOPPED = "coordinator stopped"
WOKEN = "coordinator woken beside its successor"
POWER_LOST = "power lost, with what was not synced"
DISK_FULL = "disk full"
LEADER_KILLED = "leader killed"
LEADER_KILLED_WITHIN = "leader killed between effects"
RANK_KILLED = "rank killed"
ALL_KILLED = "all ranks of a replica killed"
RANK_STOPPED = "rank stopped"
NODE_STOPPED = "node stopped"
NODE_WOKEN = "node woken, its ranks replaced"
STREAM_BROKEN = "rank's stream broken"
LINK_BROKEN = "leader's link broken"
REPORT_TWICE = "report sent twice"
RANKS_PARTED = "ranks parted from the coordinator"
RANKS_DELAYED = "ranks' messages delayed"
RELAYOUT = "another layout asked for"
CLIENT_BROKEN = "client's stream broken"
CLIENT_PARTED = "client parted from the coordinator"
CLIENT_DELAYED = "client's messages delayed"

# Struck when an order is carried out, not when it is given.
ORDERS = (KILLED_BETWEEN_EFFECTS, KILLED_BEFORE_DELIVERY, KILLED_IN_A_WRITE, LEADER_KILLED_WITHIN, REPORT_TWICE)
NOTICE_S = 2.0  # at most, until an end of a connection gives up a network that is silent


class Strikes:
    """By fault. Each answers whether it could be done. relayout: has a site laid out otherwise."""

    def __init__(
        self,
        world: World,
        supervisor: Supervisor,
        sites: Sequence[Site],
        relayout: Callable[[Site], None],
        carried_out: Callable[[str, Site], None],
    ) -> None:
        self._clock = world.clock
        self._random = world.random
        self._supervisor = supervisor
        self._sites = sites
        self._relayout = relayout
        self._carried_out = carried_out
        self.on_coordinator: Mapping[str, Callable[[], bool]] = {
            KILLED: self._kill,
            KILLED_BETWEEN_EFFECTS: lambda: self._arm(KILLED_BETWEEN_EFFECTS),
            KILLED_BEFORE_DELIVERY: lambda: self._arm(KILLED_BEFORE_DELIVERY),
            KILLED_IN_A_WRITE: lambda: self._arm(KILLED_IN_A_WRITE),
            STOPPED: self._stop,
            WOKEN: self._wake,
            POWER_LOST: self._cut_power,
            DISK_FULL: self._fill_disk,
        }
        self.on_site: Mapping[str, Callable[[Site], bool]] = {
            LEADER_KILLED: lambda site: each(site.processes, RankProcess.die, lambda process: process.rank == 0),
            LEADER_KILLED_WITHIN: lambda site: self._order(site, LEADER_KILLED_WITHIN),
            RANK_KILLED: lambda site: each(self._one(site), RankProcess.die),
            ALL_KILLED: lambda site: each(site.processes, RankProcess.die),
            RANK_STOPPED: self._stop_rank,
            NODE_STOPPED: self._stop_node,
            NODE_WOKEN: lambda site: each(site.processes, RankProcess.wake, lambda each: each.frozen and each.doomed),
            STREAM_BROKEN: lambda site: each(
                self._one(site), RankProcess.cut, lambda process: bool(process.connections)
            ),
            LINK_BROKEN: lambda site: each(leaders(site), Leader.cut, lambda leader: leader.linked),
            REPORT_TWICE: lambda site: self._order(site, REPORT_TWICE),
            RANKS_PARTED: self._part_ranks,
            RANKS_DELAYED: self._delay_ranks,
            RELAYOUT: self._lay_out,
        }
        self.on_client: Mapping[str, Callable[[User], bool]] = {
            CLIENT_BROKEN: lambda user: each([user], User.break_stream),
            CLIENT_PARTED: lambda user: each([user], lambda user: user.part(self._while(), self._notice())),
            CLIENT_DELAYED: lambda user: each([user], lambda user: user.delay(self._short_while())),
        }

    def take_back(self) -> None:
        """The orders that were not carried out."""
        self._supervisor.crashes.disarm()
        for site in self._sites:
            for leader in leaders(site):
                leader.repeats, leader.effects_left = False, None

    @property
    def sleeping(self) -> bool:
        """A coordinator that was replaced is still stopped."""
        return bool(self._supervisor.sleepers)

    @property
    def frozen(self) -> bool:
        """Ranks are, with their node."""
        return any(process.frozen for site in self._sites for process in site.processes)

    @property
    def replaced(self) -> bool:
        """Some that are frozen have been replaced."""
        return any(process.frozen and process.doomed for site in self._sites for process in site.processes)

    # Times.

    def _while(self) -> float:
        return self._random.random() * self._random.choice((1.0, 6.0))

    def _short_while(self) -> float:
        return self._random.random() * 1.5

    def _notice(self) -> float:
        return self._random.random() * NOTICE_S

    # The coordinator.

    def _kill(self) -> bool:
        able = not self._supervisor.coordinator.ended
        self._supervisor.coordinator.end()
        return able

    def _arm(self, place: str) -> bool:
        self._supervisor.crashes.arm(place)
        return True

    def _stop(self) -> bool:
        able = self._supervisor.up
        if able:
            self._supervisor.stop()
        return able

    def _wake(self) -> bool:
        sleepers = self._supervisor.sleepers
        return each(sleepers, self._supervisor.wake)

    def _cut_power(self) -> bool:
        """On the coordinator's machine alone, or everywhere."""
        if self._random.random() < 0.5:
            for site in self._sites:
                each(site.processes, RankProcess.end)
        self._supervisor.cut_power()
        return True

    def _fill_disk(self) -> bool:
        disk = self._supervisor.disk
        if disk.full:
            return False
        disk.full = True
        self._clock.after(self._while() / 2, setattr, disk, "full", False)
        return True

    # Ranks.

    def _one(self, site: Site) -> list[RankProcess]:
        return [self._random.choice(site.processes)] if site.processes else []

    def _order(self, site: Site, what: str) -> bool:
        """To the leader, for its next step."""

        def order(leader: Leader) -> None:
            leader.told = lambda: self._carried_out(what, site)
            if what == REPORT_TWICE:
                leader.repeats = True
            else:
                leader.effects_left = self._random.randint(0, 1)

        return each(leaders(site), order, lambda leader: leader.busy or leader.linked)

    def _stop_rank(self, site: Site) -> bool:
        """For good, or for a while that is shorter than the silence it may keep, or longer."""

        def stop(process: RankProcess) -> None:
            process.stop()
            if self._random.random() < 0.7:
                self._clock.after(self._while(), process.wake)

        return each(self._one(site), stop, lambda process: process.running)

    def _stop_node(self, site: Site) -> bool:
        def freeze(process: RankProcess) -> None:
            process.freeze()
            self._clock.after(wake_s, process.wake)

        wake_s = 2.0 + self._random.random() * 10.0
        return each(site.processes, freeze, lambda process: process.running)

    def _part_ranks(self, site: Site) -> bool:
        """One of them, or all: a node or its network is cut off."""
        parted = self._one(site) if self._random.random() < 0.5 else site.processes
        seconds = self._while()
        return each(parted, lambda process: process.part(seconds, self._notice()))

    def _delay_ranks(self, site: Site) -> bool:
        connections = [connection for process in site.processes for connection in process.connections]
        return each(connections, lambda connection: connection.stall(self._short_while()))

    def _lay_out(self, site: Site) -> bool:
        self._relayout(site)
        return True


T = TypeVar("T")


def each(subjects: Sequence[T], action: Callable[[T], None], able: Callable[[T], bool] = lambda subject: True) -> bool:
    """Do it to all that can take it. Whether there are any."""
    chosen = [subject for subject in subjects if able(subject)]
    for subject in chosen:
        action(subject)
    return bool(chosen)


def leaders(site: Site) -> list[Leader]:
    return [process.leader for process in site.processes if process.leader]
