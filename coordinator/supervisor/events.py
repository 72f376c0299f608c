"""What the supervisor's core hears and answers: the events and effects of `coordinator/supervisor/core.py`.

Frozen values without behaviour, between the core and its shell in the supervisor's process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Begin:
    """The first event."""


@dataclass(frozen=True, slots=True)
class RayUp:
    """Our Ray serves."""


@dataclass(frozen=True, slots=True)
class RayFailed:
    """Our Ray did not start."""

    message: str


@dataclass(frozen=True, slots=True)
class RayEnded:
    """Our Ray was up, and a process that it cannot do without has ended."""

    reason: str = "Ray has ended"


@dataclass(frozen=True, slots=True)
class Told:
    """One message of the coordinator: beat, loading, ready, failed, ray_lost or ray_back."""

    message: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class CoordinatorEnded:
    """Its exit code; negative for a signal."""

    code: int


@dataclass(frozen=True, slots=True)
class Signalled:
    """The supervisor got a signal."""

    number: int


@dataclass(frozen=True, slots=True)
class ConfigurationRead:
    """What the file says now can be served. changed: it is not what is served."""

    changed: bool


@dataclass(frozen=True, slots=True)
class ConfigurationRefused:
    """What the file says now cannot be served."""

    message: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Now and then. lag_s: how late it is; meanwhile the supervisor itself could hear nothing."""

    lag_s: float = 0.0


Event = (
    Begin
    | RayUp
    | RayFailed
    | RayEnded
    | Told
    | CoordinatorEnded
    | Signalled
    | ConfigurationRead
    | ConfigurationRefused
    | Tick
)


@dataclass(frozen=True, slots=True)
class StartRay:
    """Answered by RayUp or RayFailed. What is left of an earlier one is ended first."""


@dataclass(frozen=True, slots=True)
class StartCoordinator:
    """Its end is answered by CoordinatorEnded. served: an earlier one has, so that no failure to start ends it all."""

    served: bool = False


@dataclass(frozen=True, slots=True)
class PrepareSuccessor:
    """Have a process that waits to be the next coordinator: importing takes longer than all else that it does."""


@dataclass(frozen=True, slots=True)
class SignalCoordinator:
    """Send it a signal."""

    number: int


@dataclass(frozen=True, slots=True)
class ReadConfiguration:
    """Answered by ConfigurationRead or ConfigurationRefused."""


@dataclass(frozen=True, slots=True)
class SendConfiguration:
    """Tell the coordinator what was read."""


@dataclass(frozen=True, slots=True)
class TakeConfiguration:
    """Coordinators that are started from now on get what was read, or again what was served before."""

    read: bool


@dataclass(frozen=True, slots=True)
class ShowLoading:
    """Progress of the weights."""

    loaded_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class ShowReady:
    """The cluster serves at this address. Once. took_s: of each part of its start, one after the other."""

    address: str
    took_s: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Warn:
    """One line for the user."""

    message: str


@dataclass(frozen=True, slots=True)
class Exit:
    """End our Ray and leave with this code; message says what went wrong, empty for nothing."""

    code: int
    message: str = ""


Effect = (
    StartRay
    | StartCoordinator
    | PrepareSuccessor
    | SignalCoordinator
    | ReadConfiguration
    | SendConfiguration
    | TakeConfiguration
    | ShowLoading
    | ShowReady
    | Warn
    | Exit
)
