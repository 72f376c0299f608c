"""Is a rank alive and moving? One pure judgement over what was last heard of it.

Runs in the coordinator. A process that died is told by its node agent and by the end of its stream; this module
is for the ones that are stopped, wedged or unreachable. It knows no clock, no Ray and no transport.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

STEPPING = "stepping"


@dataclass(frozen=True, slots=True)
class Bounds:
    """silence_s: without any message. standstill_s: with heartbeats, yet without progress; None: may rest."""

    silence_s: float
    standstill_s: float | None


@dataclass(frozen=True, slots=True)
class HealthLimits:
    """Bounds by the phase a rank reports. Importing and loading hold the interpreter for long; serving must not."""

    heartbeat_s: float = 0.5
    detached_s: float = 1.5
    retire_s: float = 8.0  # to end an epoch, the steps in it included
    phases: Mapping[str, Bounds] = field(
        default_factory=lambda: {
            "waiting": Bounds(30.0, None),
            "store": Bounds(30.0, 60.0),
            "loading": Bounds(25.0, 180.0),
            "ready": Bounds(5.0, None),
            STEPPING: Bounds(5.0, 60.0),
        }
    )


@dataclass(frozen=True, slots=True)
class Observation:
    """heard_s: the last message. moved_s: the last change of phase, step or bytes loaded. Times are unix seconds."""

    phase: str
    step: int
    heard_s: float
    moved_s: float
    detached_s: float | None = None

    def later(self, seconds: float) -> Observation:
        """The same, so much later: time in which nobody listened is not held against the rank."""
        detached_s = None if self.detached_s is None else self.detached_s + seconds
        return Observation(self.phase, self.step, self.heard_s + seconds, self.moved_s + seconds, detached_s)


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
    if bounds.standstill_s is not None and now - seen.moved_s > bounds.standstill_s:
        stood_s = now - seen.moved_s
        return False, f"no progress for {stood_s:.1f} s in phase {seen.phase} at step {seen.step}"
    return True, ""
