"""In what phase a fault strikes: of requests, of replicas, of the coordinator; and the table of faults by phase.

Read off the journal's state, the coordinator's core and its replicas' cores, by the names that users know.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from string import ascii_lowercase

from coordinator.replica.state import State
from coordinator.requests.life import Phase as LifePhase
from tests.simulation.checker import Checker
from tests.simulation.ranks import Site
from tests.simulation.supervisor import Supervisor

# Of requests: they wait, their prompt is computed, tokens come, all is computed again, nobody reads.
QUEUED, PREFILL, DECODE, REPLAY, PARKED = "queued", "prefill", "decode", "replay", "parked"
# Of replicas: processes are killed and waited for, are started and load, are taken over, end their epoch by themselves.
FENCING, LOADING, ADOPTING, RETIRING = "fencing", "loading", "adopting", "retiring"
HEADLESS = "headless"  # no coordinator answers
SERVING = "serving"  # a replica is up; no column of its own
PHASES = (QUEUED, PREFILL, DECODE, REPLAY, PARKED, FENCING, LOADING, ADOPTING, RETIRING, HEADLESS)

Cell = tuple[str, str]  # fault, phase

_REPLICA_PHASES: Mapping[State, str] = {
    State.FENCING: FENCING,
    State.WAITING: FENCING,
    State.LAUNCHING: LOADING,
    State.FORMING: LOADING,
    State.ADOPTING: ADOPTING,
    State.RETIRING: RETIRING,
    State.READY: SERVING,
}
_LIFE_PHASES: Mapping[LifePhase, str] = {LifePhase.QUEUED: QUEUED, LifePhase.PARKED: PARKED}


class Phases:
    """Of one simulation, as they are now."""

    def __init__(self, checker: Checker, supervisor: Supervisor, sites: Sequence[Site]) -> None:
        self._checker = checker
        self._supervisor = supervisor
        self._sites = sites

    def everywhere(self) -> frozenset[str]:
        """Of all requests and replicas."""
        requests = (phase for _, phase, _ in self._requests())
        return frozenset((*requests, *(phase for site in self._sites for phase in self._replica(site))))

    def at(self, site: Site) -> frozenset[str]:
        """Of what this replica does, and of what waits."""
        requests = (phase for _, phase, index in self._requests() if index in (None, site.index))
        return frozenset((*requests, *self._replica(site)))

    def around(self, request_id: str) -> frozenset[str]:
        """Of this request, and of what goes on around it."""
        own = [phase for known, phase, _ in self._requests() if known == request_id]
        return frozenset((*own, *(phase for site in self._sites for phase in self._replica(site))))

    def _requests(self) -> Iterator[tuple[str, str, int | None]]:
        """Of each that has not ended: its id, its phase, and the replica that has it."""
        lives = self._supervisor.coordinator.core._lives._lives if self._supervisor.up else {}
        for request_id, entry in self._checker.disk.entries.items():
            life = lives.get(request_id)
            if entry.finished:
                continue
            if life and life.phase in _LIFE_PHASES:
                yield request_id, _LIFE_PHASES[life.phase], None
            elif assigned := entry.assigned:
                begun = self._checker.told_by(request_id) == assigned.attempt
                phase = DECODE if begun else REPLAY if assigned.recomputed_tokens else PREFILL
                yield request_id, phase, assigned.replica

    def _replica(self, site: Site) -> Iterator[str]:
        if not self._supervisor.up:
            yield HEADLESS
        elif (state := self._supervisor.coordinator.replicas[site.index].core.state) in _REPLICA_PHASES:
            yield _REPLICA_PHASES[state]
        if any(process.phase == "retiring" for process in site.processes):
            yield RETIRING


def table(hits: Counter[Cell], faults: Iterable[str], impossible: Mapping[Cell, str]) -> str:
    """How often each fault struck in each phase; a letter where it cannot, and below why."""
    faults, width = tuple(faults), max(map(len, faults))
    letters = dict(zip(dict.fromkeys(impossible.values()), ascii_lowercase, strict=False))
    rows = [f"{'':<{width}}" + "".join(f"{phase:>9}" for phase in PHASES)]
    for fault in faults:
        reasons = ((impossible.get((fault, phase)), hits[fault, phase]) for phase in PHASES)
        cells = (f"({letters[why]})" if why else str(count) for why, count in reasons)
        rows.append(f"{fault:<{width}}" + "".join(f"{cell:>9}" for cell in cells))
    notes = (f"({letter}) {why}" for why, letter in letters.items())
    return "\n".join([*rows, *notes]) + "\n"
