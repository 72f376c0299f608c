"""Is a rank alive and moving, and if one is not, which is to blame? Pure judgements over what was last heard of them.

Runs in the coordinator. A process that died is told by its node agent and by the end of its stream; this module
is for the ones that are stopped, wedged or unreachable. It knows no clock, no Ray and no transport.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

READY, STEPPING, COMPILING = "ready", "stepping", "compiling"


@dataclass(frozen=True, slots=True)
class Bounds:
    """silence_s: without any message. standstill_s: with heartbeats, yet without progress; None: may rest."""

    silence_s: float
    standstill_s: float | None


@dataclass(frozen=True, slots=True)
class HealthLimits:
    """Bounds by the phase a rank reports. Importing, loading and compiling hold the interpreter for long; serving must
    not.

    A step may take as long as its phase allows until one of its kind has been measured: the first of a kind compiles
    and warms up. From then on it has step_factor times the slowest of late, and never less than step_least_s or six
    heartbeats, which alone tell of progress: a busy machine makes all steps slow, and the bound with them.
    """

    heartbeat_s: float = 0.5
    detached_s: float = 1.5
    retire_s: float = 8.0  # to end an epoch, the steps in it included
    step_least_s: float = 3.0
    step_factor: float = 20.0
    phases: Mapping[str, Bounds] = field(
        default_factory=lambda: {
            "waiting": Bounds(30.0, None),
            "store": Bounds(30.0, 60.0),
            "loading": Bounds(25.0, 180.0),
            READY: Bounds(3.0, None),
            STEPPING: Bounds(3.0, 60.0),
            COMPILING: Bounds(25.0, 60.0),
        }
    )

    @property
    def missed_s(self) -> float:
        """A silence that three heartbeats should have ended: no fault, but a reason to doubt."""
        return 3 * self.heartbeat_s


@dataclass(frozen=True, slots=True)
class Observation:
    """heard_s: the last message. moved_s: the last change of phase, step or bytes loaded. Times are one clock's.

    kind and slowest_s are those of the step that runs, as the rank tells them.
    """

    phase: str
    step: int
    heard_s: float
    moved_s: float
    detached_s: float | None = None
    kind: str = ""
    slowest_s: float = 0.0

    @property
    def death(self) -> str:
        """What is told where its process has ended."""
        return f"its process has died in phase {self.phase}"

    def later(self, seconds: float) -> Observation:
        """The same, so much later: time in which nobody listened is not held against the rank."""
        detached_s = None if self.detached_s is None else self.detached_s + seconds
        return replace(self, heard_s=self.heard_s + seconds, moved_s=self.moved_s + seconds, detached_s=detached_s)

    def in_step(self, kind: str, slowest_s: float) -> Observation:
        """The same in a step of this kind."""
        return replace(self, kind=kind, slowest_s=slowest_s)


def judge(now: float, seen: Observation, limits: HealthLimits) -> tuple[bool, str]:
    """(healthy, why not). A silence is at least six heartbeats long, so slow heartbeats are no fault."""
    if seen.detached_s is not None:
        gone_s = now - seen.detached_s
        if gone_s > limits.detached_s:
            return False, f"detached for {gone_s:.1f} s"
        return True, ""
    bounds = limits.phases.get(seen.phase, limits.phases["loading"])
    silence_s = max(bounds.silence_s, 6 * limits.heartbeat_s)
    if now - seen.heard_s > silence_s:
        return False, f"silent for {now - seen.heard_s:.1f} s in phase {seen.phase}, allowed {silence_s:g} s"
    allowed_s, stood_s = _standstill_s(seen, bounds, limits), now - seen.moved_s
    if allowed_s is not None and stood_s > allowed_s:
        doing = f"phase {seen.phase} at step {seen.step}" + (f", {seen.kind}" if seen.kind else "")
        return False, f"no progress for {stood_s:.1f} s in {doing}, allowed {allowed_s:.3g} s"
    return True, ""


def first_unfit(now: float, ranks: Mapping[int, Observation], limits: HealthLimits) -> tuple[int, str] | None:
    """The rank to blame and why, None if all are healthy. Ranks wait for each other in a step, so of who stands still:

    1. nobody is to blame while a rank compiles and may;
    2. a rank that has missed heartbeats is, the longest unheard first: a stopped process is found by its peers, too;
    3. else the one that is furthest behind.
    """
    reasons = {index: judge(now, seen, limits)[1] for index, seen in ranks.items()}
    quiet_s = {index: unheard_s(now, seen, limits) for index, seen in ranks.items()}
    compiling = any(seen.phase == COMPILING and not reasons[index] for index, seen in ranks.items())

    def excused(index: int) -> bool:
        return compiling and ranks[index].phase == STEPPING and not quiet_s[index]

    unfit = [index for index, reason in reasons.items() if reason and not excused(index)]
    if not unfit:
        return None
    unheard = [index for index, seen in ranks.items() if quiet_s[index] and seen.phase in (READY, STEPPING)]
    suspect = max(unfit + unheard, key=lambda index: (quiet_s[index], -ranks[index].step))
    if reasons[suspect]:
        return suspect, reasons[suspect]
    return suspect, f"unheard for {quiet_s[suspect]:.1f} s while rank {unfit[0]} waits: {reasons[unfit[0]]}"


def unheard_s(now: float, seen: Observation, limits: HealthLimits) -> float:
    """For how long, once at least three heartbeats are missing; else 0."""
    quiet_s = now - (seen.heard_s if seen.detached_s is None else min(seen.detached_s, seen.heard_s))
    return quiet_s if quiet_s >= limits.missed_s else 0.0


def _standstill_s(seen: Observation, bounds: Bounds, limits: HealthLimits) -> float | None:
    """How long it may go on without progress; None: for ever."""
    if seen.phase != STEPPING or not seen.slowest_s:
        return bounds.standstill_s
    return max(limits.step_least_s, 6 * limits.heartbeat_s, limits.step_factor * seen.slowest_s)
