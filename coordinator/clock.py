"""The coordinator's clock: unix seconds that run evenly, whatever is done to the machine's clock meanwhile.

A deadline or a resume window must not end, or begin anew, because somebody sets the clock. So it is read once, and
counted on by CLOCK_MONOTONIC, which is one for all processes of a boot: what a predecessor counted differently is
translated (`JournalState.resume`). Knows nothing of what it times.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class ClockOrigin:
    """Where a count of seconds begins: unix_s is the unix time at which the monotonic clock of this boot was zero.

    boot_id is empty where the system does not tell it; then no two counts can be compared.
    """

    boot_id: str
    unix_s: float

    def seconds_after(self, earlier: ClockOrigin | None) -> float:
        """What times of the earlier count lack; 0 across boots: there the machine's clock is all we have."""
        if earlier is None or not self.boot_id or self.boot_id != earlier.boot_id:
            return 0.0
        return self.unix_s - earlier.unix_s


class SteadyClock:
    """Called, it tells unix seconds. wall and monotonic: the clocks it goes by, in seconds."""

    def __init__(
        self,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        boot_id: str | None = None,
    ) -> None:
        self._monotonic = monotonic
        self.origin = ClockOrigin(_boot_id() if boot_id is None else boot_id, wall() - monotonic())

    def __call__(self) -> float:
        return self.origin.unix_s + self._monotonic()


def _boot_id() -> str:
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return ""
