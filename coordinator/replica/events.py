"""What a replica's core hears and answers: the events and effects of `coordinator/replica/core.py`.

Frozen values between the core and its shell in the coordinator process. Events named after a rank carry the
incarnation of the process they speak of, so that a late word of a dead one is recognised.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from coordinator.placement import ReplicaPlan
from coordinator.replica.commands import Accept as Accept
from coordinator.replica.commands import Blame as Blame
from coordinator.replica.commands import Command as Command
from coordinator.replica.commands import Form as Form
from coordinator.replica.commands import OpenStore as OpenStore
from coordinator.replica.commands import Refuse as Refuse
from coordinator.replica.commands import Resident as Resident
from coordinator.replica.commands import Retire as Retire
from coordinator.replica.commands import Settled as Settled
from echelon.errors import EchelonError
from echelon.internal.link import Fence


@dataclass(frozen=True, slots=True)
class Started:
    """Ray has been joined. survivors: (rank, incarnation) of this replica's processes that an agent has charge of."""

    survivors: frozenset[tuple[int, str]] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Attached:
    """A rank's hello on a new stream. epoch: that it serves or forms; resident, layout: set once it serves."""

    rank: int
    incarnation: str
    pid: int
    node_id: str
    phase: str
    device: str
    memory_bytes: int
    epoch: int = 0
    resident: Resident | None = None
    layout: str = ""


@dataclass(frozen=True, slots=True)
class Detached:
    """The rank's current stream ended (not one that a newer stream has replaced)."""

    rank: int
    incarnation: str


@dataclass(frozen=True, slots=True)
class Died:
    """The node agent saw the process end."""

    rank: int
    incarnation: str


@dataclass(frozen=True, slots=True)
class Beat:
    """A heartbeat. kind: of the step that runs; slowest_s: the slowest of that kind of late, 0 if none was measured."""

    rank: int
    incarnation: str
    phase: str
    step: int
    kind: str = ""
    slowest_s: float = 0.0


@dataclass(frozen=True, slots=True)
class StoreOpened:
    """Rank 0 has opened the rendezvous of the epoch."""

    rank: int
    incarnation: str
    address: str


@dataclass(frozen=True, slots=True)
class Progress:
    """Weights loaded so far."""

    rank: int
    incarnation: str
    loaded_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Ready:
    """The rank serves the epoch."""

    rank: int
    incarnation: str
    resident: Resident


@dataclass(frozen=True, slots=True)
class Fault:
    """The rank tells an error that it cannot go on from.

    first_step .. last_step: those that ran when it happened, 0 outside of steps. of_peer: another rank, or the way to
    it, is gone. requests: of those steps, where the rank knows them.
    """

    rank: int
    incarnation: str
    phase: str
    error: str
    first_step: int = 0
    last_step: int = 0
    of_peer: bool = False
    requests: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Blamed:
    """The leader's answer to Blame."""

    rank: int
    incarnation: str
    requests: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Retired:
    """The rank has ended its epoch and waits for another."""

    rank: int
    incarnation: str
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Noted:
    """The rank tells something that nothing depends on, for the event log."""

    rank: int
    incarnation: str
    kind: str
    detail: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class LaunchFailed:
    """Ray could not start the process."""

    rank: int
    incarnation: str
    error: str


@dataclass(frozen=True, slots=True)
class NoRoom:
    """No node has a place for the process; told again and again while that is so."""

    rank: int
    incarnation: str
    reason: str


@dataclass(frozen=True, slots=True)
class Relayout:
    """Serve another plan from the next epoch on. layout: a digest of all that its ranks are told of it."""

    plan: ReplicaPlan
    layout: str = ""


@dataclass(frozen=True, slots=True)
class Persisted:
    """The epoch of AwaitPersisted is on disk."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Killed:
    """Every process asked for by Kill(epoch) is confirmed gone. replaced: the rank that has another device now."""

    epoch: int
    replaced: int | None = None


@dataclass(frozen=True, slots=True)
class Tick:
    """Now and then. lag_s: how late this tick is; what was not heard meanwhile was the coordinator's own doing."""

    lag_s: float = 0.0


@dataclass(frozen=True, slots=True)
class StartEnded:
    """The cluster serves: from now on a failure is recovered from, however often it comes, and never ends it."""


@dataclass(frozen=True, slots=True)
class Acquitted:
    """A request was found to break steps, so those that broke say nothing against the replica's devices."""


OwnWord = Attached | Detached | Beat | StoreOpened | Progress | Ready | Fault | Blamed | Retired | Noted
RankEvent = OwnWord | Died | LaunchFailed | NoRoom
Event = RankEvent | Started | Relayout | Persisted | Killed | Tick | StartEnded | Acquitted


@dataclass(frozen=True, slots=True)
class Launch:
    """Start a rank's process in its slot. patient: wait for room however long, and tell NoRoom; else fail soon."""

    rank: int
    incarnation: str
    patient: bool = field(default=False, compare=False)


@dataclass(frozen=True, slots=True)
class Kill:
    """Kill all processes that the replica ever had, suspect first; replace: that one's device. Answer Killed(epoch)."""

    epoch: int
    suspect: int | None
    replace: bool = False


@dataclass(frozen=True, slots=True)
class PersistEpoch:
    """On disk before any later effect is executed."""

    epoch: int


@dataclass(frozen=True, slots=True)
class AwaitPersisted:
    """Answer Persisted(epoch) once that is so: nothing is killed that would be waited for meanwhile."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Tell:
    """Send a command on the stream of that incarnation, if it has one."""

    fence: Fence
    rank: int
    incarnation: str
    command: Command


@dataclass(frozen=True, slots=True)
class ReplicaUp:
    """All ranks serve the epoch; its leader may link."""

    fence: Fence


@dataclass(frozen=True, slots=True)
class ReplicaDown:
    """The epoch that served has ended; its requests go back to the queue.

    step_broke: an error inside a step ended it. requests: those that were in the step, none where that is not known.
    """

    fence: Fence
    reason: str
    step_broke: bool = False
    requests: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Loading:
    """Weights loaded by all ranks together."""

    loaded_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Emit:
    """One entry of the event log."""

    kind: str
    subject: str
    detail: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The replica cannot be started; the coordinator ends with this error."""

    error: EchelonError


Effect = Launch | Kill | PersistEpoch | AwaitPersisted | Tell | ReplicaUp | ReplicaDown | Loading | Emit | GiveUp
