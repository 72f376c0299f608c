"""When a simulated cluster is struck: by faults at random times, and by faults aimed at a phase.

An aim waits until its phase holds, having brought it about where it does not come by itself, and strikes then. Every
strike is counted in all the phases that hold where it strikes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random

from tests.simulation import strikes
from tests.simulation.client import User
from tests.simulation.crashes import KILLED_BEFORE_DELIVERY, KILLED_BETWEEN_EFFECTS, KILLED_IN_A_WRITE
from tests.simulation.phases import (
    ADOPTING,
    DECODE,
    FENCING,
    HEADLESS,
    LOADING,
    PARKED,
    PHASES,
    PREFILL,
    QUEUED,
    REPLAY,
    RETIRING,
    SERVING,
    Cell,
    Phases,
)
from tests.simulation.ranks import Site
from tests.simulation.strikes import ORDERS, Strikes
from tests.simulation.supervisor import Supervisor
from tests.simulation.world import World

OF_THE_COORDINATOR = (
    strikes.KILLED,
    KILLED_BETWEEN_EFFECTS,
    KILLED_BEFORE_DELIVERY,
    KILLED_IN_A_WRITE,
    strikes.STOPPED,
)
OF_REPLICAS = (
    strikes.LEADER_KILLED,
    strikes.LEADER_KILLED_WITHIN,
    strikes.RANK_KILLED,
    strikes.ALL_KILLED,
    strikes.RANK_STOPPED,
    strikes.NODE_STOPPED,
    strikes.NODE_WOKEN,
    strikes.STREAM_BROKEN,
    strikes.LINK_BROKEN,
    strikes.REPORT_TWICE,
    strikes.RANKS_PARTED,
    strikes.RANKS_DELAYED,
    strikes.RELAYOUT,
)
OF_CLIENTS = (strikes.CLIENT_BROKEN, strikes.CLIENT_PARTED, strikes.CLIENT_DELAYED)
FAULTS = (*OF_THE_COORDINATOR, strikes.WOKEN, strikes.POWER_LOST, strikes.DISK_FULL, *OF_REPLICAS, *OF_CLIENTS)

# What cannot happen, and why.
IMPOSSIBLE: Mapping[Cell, str] = {
    **{(fault, HEADLESS): "no coordinator is there to be struck" for fault in OF_THE_COORDINATOR},
    **{(fault, HEADLESS): "a call has ended with the coordinator that served it" for fault in OF_CLIENTS},
    **{(fault, PARKED): "a parked request has no client" for fault in OF_CLIENTS},
    **{
        (fault, phase): "only an epoch that serves has a link"
        for fault in (strikes.LINK_BROKEN, strikes.REPORT_TWICE)
        for phase in (FENCING, LOADING, ADOPTING, RETIRING, HEADLESS)
    },
    (strikes.LEADER_KILLED_WITHIN, FENCING): "its process is being killed",
    (strikes.LEADER_KILLED_WITHIN, LOADING): "no engine runs before its epoch is ready",
    (strikes.STREAM_BROKEN, HEADLESS): "a stream has ended with the coordinator that served it",
    (strikes.RANKS_DELAYED, HEADLESS): "nothing is under way to a coordinator that is gone",
}
CELLS: tuple[Cell, ...] = tuple(
    cell for fault in FAULTS for phase in PHASES if (cell := (fault, phase)) not in IMPOSSIBLE
)


# How often to aim at a cell: the more, the less the two fall together by themselves.
_OFTEN = (strikes.KILLED, KILLED_BETWEEN_EFFECTS)
_BY_PHASE = {QUEUED: 0, PREFILL: 3, DECODE: 4, REPLAY: 9, PARKED: 2, FENCING: 3, ADOPTING: 4, RETIRING: 3, HEADLESS: 2}
_BY_CELL = {
    **{(strikes.WOKEN, phase): 4 for phase in (PREFILL, DECODE, PARKED, ADOPTING, HEADLESS)},
    (strikes.WOKEN, REPLAY): 30,
    **{(strikes.NODE_WOKEN, phase): 5 for phase in (PREFILL, PARKED, LOADING)},
    **{(strikes.NODE_WOKEN, phase): 12 for phase in (DECODE, ADOPTING, RETIRING)},
    (strikes.NODE_WOKEN, REPLAY): 34,
    (strikes.NODE_WOKEN, HEADLESS): 6,
    (strikes.LEADER_KILLED_WITHIN, QUEUED): 1,
    (strikes.LEADER_KILLED_WITHIN, ADOPTING): 24,
    **{(strikes.LEADER_KILLED_WITHIN, phase): 12 for phase in (RETIRING, HEADLESS)},
    (KILLED_BEFORE_DELIVERY, REPLAY): 22,
    (KILLED_IN_A_WRITE, REPLAY): 12,
    **{(fault, phase): 13 for fault in (KILLED_BEFORE_DELIVERY, KILLED_IN_A_WRITE) for phase in (ADOPTING, RETIRING)},
    **{
        (fault, phase): 6 for fault in (strikes.REPORT_TWICE, strikes.LINK_BROKEN) for phase in (QUEUED, DECODE, PARKED)
    },
    (strikes.STREAM_BROKEN, DECODE): 6,
    **{(fault, phase): 6 for fault in OF_CLIENTS for phase in (PREFILL, ADOPTING)},
    **{(fault, DECODE): 8 for fault in (strikes.CLIENT_PARTED, strikes.CLIENT_DELAYED)},
    **{(fault, REPLAY): 15 for fault in (strikes.STREAM_BROKEN, *OF_CLIENTS)},
}


def _weight(cell: Cell) -> int:
    fault, phase = cell
    weight = _BY_CELL.get(cell, _BY_PHASE.get(phase, 0))
    return weight // 2 if fault in _OFTEN else weight


def _mixed(cells: Sequence[Cell]) -> tuple[Cell, ...]:
    """A life takes those that stand together; several alike would be in each other's way."""
    return tuple(Random(0).sample(cells, len(cells)))


AIMED = _mixed([cell for cell in CELLS for _ in range(_weight(cell))])

STRIKES_S = 12.0  # faults are over by then
LOOK_S = 0.1  # how often aims look, beside after every step of a coordinator
PATIENCE_S = 8.0  # of an aim


# What brings a phase about, where it strikes in that other one.
_LEADS = {
    ADOPTING: (strikes.KILLED, SERVING),
    HEADLESS: (strikes.KILLED, DECODE),
    FENCING: (strikes.RANK_KILLED, SERVING),
    LOADING: (strikes.RANK_KILLED, SERVING),
    RETIRING: (strikes.RELAYOUT, SERVING),
    REPLAY: (strikes.CLIENT_BROKEN, DECODE),
    PARKED: (strikes.CLIENT_BROKEN, DECODE),
}


@dataclass(slots=True)
class Aim:
    """missing: what has to be brought about first."""

    fault: str
    phase: str
    until: float
    missing: list[str]


class Faults:
    """Of one simulation; users may join. relayout: has a site laid out otherwise."""

    def __init__(
        self,
        world: World,
        supervisor: Supervisor,
        sites: Sequence[Site],
        users: Sequence[User],
        relayout: Callable[[Site], None],
    ) -> None:
        self.hits: Counter[Cell] = Counter()
        self._clock = world.clock
        self._random = world.random
        self._sites = sites
        self._users = users
        self._phases = Phases(world.checker, supervisor, sites)
        self._strikes = Strikes(world, supervisor, sites, relayout, self._carried_out)
        self._end_s = world.clock.now + STRIKES_S
        self._aims: list[Aim] = []
        self._watches = self._looks = False  # now and then; once the step is over
        world.watchers.append(self._stepped)
        supervisor.crashes.told = lambda place: self._count(place, self._phases.everywhere())

    def end(self) -> None:
        """No more of them: orders that were not carried out are taken back."""
        self._strikes.take_back()

    def strike(self, fault: str, phase: str | None = None) -> bool:
        """Somewhere where this phase holds. False: it cannot."""
        targets = [(able, phases) for able, phases in self._targets(fault) if phase is None or phase in phases]
        self._random.shuffle(targets)
        for done, phases in targets:
            if done():
                if fault not in ORDERS:
                    self._count(fault, phases)
                return True
        return False

    def aim(self, fault: str, phase: str) -> None:
        """Strike in this phase, as soon as it holds."""
        until = min(self._clock.now + PATIENCE_S, self._end_s)
        self._aims.append(Aim(fault, phase, until, [fault, phase]))
        if not self._watches:
            self._watch()

    def _watch(self) -> None:
        self._watches = bool(self._aims)
        if self._watches:
            self._look()
            self._clock.after(LOOK_S, self._watch)

    def _stepped(self) -> None:
        """Something may have changed: look once the step is over."""
        if self._aims and not self._looks:
            self._looks = True
            self._clock.after(0.0, self._look)

    def _look(self) -> None:
        self._looks = False
        phases = self._phases.everywhere()
        for aim in list(self._aims):
            if self._clock.now > aim.until or (aim.phase in phases and self.strike(aim.fault, aim.phase)):
                self._aims.remove(aim)
            elif aim.missing and self._lead_to(aim.missing[0], phases):
                aim.missing.pop(0)

    def _lead_to(self, wanted: str, phases: frozenset[str]) -> bool:
        """Bring this fault or phase about, if it needs that and can be. True: from here on it can be waited for."""
        if wanted == strikes.WOKEN:
            return self._strikes.sleeping or self._not_yet(strikes.STOPPED)
        if wanted == strikes.NODE_WOKEN:
            return self._strikes.replaced if self._strikes.frozen else self._not_yet(strikes.NODE_STOPPED, SERVING)
        if wanted not in _LEADS:
            return True
        fault, phase = _LEADS[wanted]
        return phase in phases and self.strike(fault, phase)

    def _not_yet(self, fault: str, phase: str | None = None) -> bool:
        """Strike, and look again later what has come of it."""
        self.strike(fault, phase)
        return False

    def _count(self, fault: str, phases: frozenset[str]) -> None:
        self.hits.update((fault, phase) for phase in phases)

    def _carried_out(self, fault: str, site: Site) -> None:
        self._count(fault, self._phases.at(site))

    def _targets(self, fault: str) -> Iterator[tuple[Callable[[], bool], frozenset[str]]]:
        """What can be struck, in which phases."""
        if strike := self._strikes.on_coordinator.get(fault):
            yield strike, self._phases.everywhere()
        elif strike_site := self._strikes.on_site.get(fault):
            for site in self._sites:
                yield partial(strike_site, site), self._phases.at(site)
        else:
            strike_client = self._strikes.on_client[fault]
            for user in self._users:
                if user.reading:
                    yield partial(strike_client, user), self._phases.around(user.order.request_id)
