"""When a replica is started again after a failure, and which device is left alone for a while. Pure, with reasons.

Part of the replica's core. A process that is killed, stopped or lost with its node says nothing against its device; one
that breaks, wedges or cannot be started by itself does. A cluster that has served is never given up: what fails again
and again is only tried less often.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from coordinator.replica.events import Effect

MAX_BACKOFF_S = 5.0


@dataclass(frozen=True, slots=True)
class Fault:
    """A failure that a rank's own device may be to blame for. in_step: a request may be, too."""

    when_s: float
    rank: int
    in_step: bool = False


@dataclass(frozen=True, slots=True)
class Budget:
    """How many faults of one device, within how long, make it suspect, and how many put it into quarantine.

    It is left alone for first_wait_s, and for twice as long with each fault more, up to most_wait_s.
    """

    window_s: float = 600.0
    suspect_faults: int = 2
    quarantine_faults: int = 4
    first_wait_s: float = 30.0
    most_wait_s: float = 120.0


@dataclass(frozen=True, slots=True)
class Restart:
    """Wait so long before the ranks are started again. suspect: the rank whose device is; quarantined: is why."""

    wait_s: float
    reason: str
    suspect: int | None = None
    quarantined: bool = False

    def told(self) -> Iterator[tuple[str, int | None]]:
        """The events that tell of it: kind, and the rank that it is about."""
        if self.suspect is not None:
            yield "device.quarantined" if self.quarantined else "device.suspect", self.suspect
        if self.wait_s:
            yield "replica.waiting", None


AT_ONCE = Restart(0.0, "at once")


def restart(now: float, failures: int, faults: Sequence[Fault], budget: Budget) -> Restart:
    """failures: of the replica, since it last served for a while. faults: of all its devices, the last one last."""
    wait_s = backoff_s(failures)
    reason = f"{failures} failures in a row" if wait_s else "at once"
    if not faults:
        return Restart(wait_s, reason)
    rank = faults[-1].rank
    count = sum(fault.rank == rank and now - fault.when_s < budget.window_s for fault in faults)
    told = f"the device of rank {rank} has had {count} faults within {budget.window_s:g} s"
    if count < budget.suspect_faults:
        return Restart(wait_s, reason)
    if count < budget.quarantine_faults:
        return Restart(wait_s, told, rank)
    doubled = budget.first_wait_s * 2.0 ** min(count - budget.quarantine_faults, 16)
    return Restart(max(wait_s, min(doubled, budget.most_wait_s)), told, rank, quarantined=True)


def backoff_s(failures: int) -> float:
    """No wait after the first failure, then 1, 2, 4 s and so on: a replica that keeps dying must not spin."""
    return 0.0 if failures < 2 else min(2.0 ** (min(failures, 32) - 2), MAX_BACKOFF_S)


class Failures:
    """What has befallen a replica: failures in a row, and the faults of its devices while they count."""

    def __init__(self, budget: Budget) -> None:
        self.in_a_row = 0
        self._budget = budget
        self._faults: list[Fault] = []

    def failed(self, fault: Fault | None, settled: bool) -> None:
        """Once more. fault: None where no device is to blame. settled: it had served long enough to begin anew."""
        self.in_a_row = 1 if settled else self.in_a_row + 1
        if fault is not None:
            oldest_s = fault.when_s - self._budget.window_s
            self._faults = [*(earlier for earlier in self._faults if earlier.when_s > oldest_s), fault]

    def acquit(self) -> list[Effect]:
        """A request was found to break steps: they say nothing against a device. Nothing follows from that now."""
        self._faults = [fault for fault in self._faults if not fault.in_step]
        return []

    def replaced(self, rank: int) -> float:
        """It has another device, against which nothing is held yet. Returns how many seconds to wait all the same."""
        self.in_a_row = 0
        self._faults = [fault for fault in self._faults if fault.rank != rank]
        return backoff_s(self.in_a_row)

    def restart(self, now: float, blamed: bool) -> Restart:
        """After the last failure; blamed: a device was."""
        return restart(now, self.in_a_row, self._faults if blamed else (), self._budget)
