"""ReplicaCore: the life of one replica, from launch to epoch to fence, as `step(now, event) -> effects`.

Sans-IO, in the coordinator: the shell executes effects in order and feeds events back. Whatever ends a rank ends
the epoch: the next epoch is persisted, every process of the replica is killed and confirmed gone, and all ranks
start again in their slots. A new coordinator adopts ranks that serve the persisted epoch instead. It knows no Ray,
no gRPC and no clock. All events of a rank carry its incarnation; those of another incarnation are ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from coordinator.placement import RankMemory, ReplicaPlan
from coordinator.replica import health
from coordinator.replica.attempt import Attempt, RankState, State, backoff_s
from coordinator.replica.events import (
    Accept,
    Attached,
    Beat,
    Detached,
    Died,
    Effect,
    Emit,
    Event,
    Fault,
    Form,
    GiveUp,
    Kill,
    Killed,
    Launch,
    LaunchFailed,
    Loading,
    OpenStore,
    PersistEpoch,
    Progress,
    RankEvent,
    Ready,
    Refuse,
    ReplicaDown,
    ReplicaUp,
    Started,
    StartEnded,
    StoreOpened,
    Tell,
    Tick,
)
from coordinator.replica.health import HealthLimits, Observation
from echelon.errors import ConfigError, InternalError
from echelon.internal.link import Fence
from echelon.types import Rank

START_ATTEMPTS = 3  # of a replica that never served; afterwards its last error is told and the start fails
SETTLED_S = 10.0  # a replica that served this long has left its earlier failures behind


@dataclass(frozen=True, slots=True)
class ReplicaConfig:
    """epoch is the persisted one, 0 before the first. incarnation_prefix differs between clusters on one Ray."""

    replica: int
    term: int
    epoch: int
    plan: ReplicaPlan
    incarnation_prefix: str = ""
    limits: HealthLimits = field(default_factory=HealthLimits)
    adopt_window_s: float = 10.0
    launch_timeout_s: float = 120.0


class ReplicaCore:
    """One per replica."""

    def __init__(self, config: ReplicaConfig) -> None:
        self._config = config
        self._epoch = config.epoch
        self._state = State.STARTING
        self._attempt = Attempt(0.0, 0.0)
        self._early: list[RankEvent] = []
        self._failures, self._up_s = 0, 0.0
        self.adopted = self._kept = False  # serves an earlier coordinator's epoch; is started again after any failure
        self._down_s: float | None = None
        self._handlers: Mapping[type, Callable[..., list[Effect]]] = {
            Attached: self._attached,
            Detached: self._detached,
            Died: self._died,
            Beat: self._beat,
            StoreOpened: self._store_opened,
            Progress: self._progress,
            Ready: self._ready,
            Fault: self._fault,
            LaunchFailed: self._launch_failed,
        }

    @property
    def state(self) -> State:
        return self._state

    @property
    def fence(self) -> Fence:
        """What every message of this replica carries now."""
        return Fence(self._config.term, self._config.replica, self._epoch)

    @property
    def kv_blocks(self) -> int:
        """Planned for the current epoch; 0 until its ranks have told their memory, or if they were adopted."""
        return self._attempt.kv_blocks

    def incarnation(self) -> str:
        """Of the ranks of the current epoch; epochs are never reused, so neither are incarnations."""
        return f"{self._config.incarnation_prefix}{self._epoch}"

    def ranks(self) -> tuple[Rank, ...]:
        """The processes that have attached, for GetCluster."""
        return self._attempt.describe(self.fence, self._config.plan)

    def step(self, now: float, event: Event) -> list[Effect]:
        """Take one event in; the effects are to be executed in order."""
        if isinstance(event, Started):
            effects = self._started(now, event)
            return effects + [effect for early in self._early for effect in self.step(now, early)]
        if isinstance(event, Tick):
            return self._tick(now, event)
        if isinstance(event, Killed):
            return self._killed(now, event)
        if isinstance(event, StartEnded):
            self._kept = True
            return []
        if self._state is State.STARTING:
            self._early.append(event)  # a survivor dials before it is known which others there are
            return []
        rank = self._rank_of(event)
        if rank is None:
            stranger = isinstance(event, Attached)
            reason = f"incarnation {event.incarnation} is not of epoch {self._epoch}"
            return [Tell(self.fence, event.rank, event.incarnation, Refuse(reason))] if stranger else []
        return self._handlers[type(event)](now, event, rank)

    def _rank_of(self, event: RankEvent) -> RankState | None:
        rank = self._attempt.ranks.get(event.rank)
        return rank if rank is not None and rank.incarnation == event.incarnation else None

    # From nothing to launched.

    def _started(self, now: float, event: Started) -> list[Effect]:
        expected = {(rank, self.incarnation()) for rank in self._config.plan.ranks}
        if self._epoch == 0 or event.survivors != expected:
            alive = f"{len(event.survivors & expected)} of {len(expected)} ranks of epoch {self._epoch} are alive"
            return self._fence(now, f"cold start: {alive}")
        self._state = State.ADOPTING
        self._expect_ranks(now, "ready", now + self._config.adopt_window_s)
        return [self._emit("replica.adopting", epoch=self._epoch)]

    def _fence(self, now: float, reason: str, suspect: int | None = None) -> list[Effect]:
        """End the epoch. Nothing of it can be heard or write again once the next one is persisted."""
        down: list[Effect] = [ReplicaDown(self.fence, reason)] if self._state is State.READY else []
        if self._down_s is None:
            self._down_s = now
        self._epoch += 1
        self._state = State.FENCING
        self._attempt = Attempt(now + backoff_s(self._failures), now)
        return [
            PersistEpoch(self._epoch),
            *down,
            self._emit("replica.fenced", epoch=self._epoch, reason=reason),
            Kill(self._epoch, suspect),
        ]

    def _killed(self, now: float, event: Killed) -> list[Effect]:
        if self._state is not State.FENCING or event.epoch != self._epoch:
            return []
        self._state = State.WAITING
        return self._launch(now) if now >= self._attempt.deadline_s else []

    def _launch(self, now: float) -> list[Effect]:
        self._state = State.LAUNCHING
        self._expect_ranks(now, "waiting", now + self._config.launch_timeout_s)
        launches = [Launch(rank, state.incarnation) for rank, state in self._attempt.ranks.items()]
        return [self._emit("replica.launching", epoch=self._epoch, ranks=len(launches)), *launches]

    def _expect_ranks(self, now: float, phase: str, deadline_s: float) -> None:
        seen = Observation(phase, 0, now, now)
        ranks = {rank: RankState(self.incarnation(), seen) for rank in self._config.plan.ranks}
        self._attempt = Attempt(deadline_s, now, ranks)

    # From attached to ready.

    def _attached(self, now: float, event: Attached, rank: RankState) -> list[Effect]:
        if self._state is State.ADOPTING and (event.resident is None or event.epoch != self._epoch):
            return self._fence(now, f"rank {event.rank} does not serve epoch {self._epoch}", event.rank)
        effects: list[Effect] = [Tell(self.fence, event.rank, event.incarnation, Accept())]
        if rank.hello is None:
            effects.append(self._emit("rank.attached", event.rank, pid=event.pid, epoch=self._epoch))
        rank.hello, rank.resident = event, event.resident
        rank.seen = Observation(event.phase, rank.seen.step, now, now)
        if self._state is State.FORMING and event.phase in ("waiting", "store"):
            return effects + self._repeat_command(event)
        if self._state is State.LAUNCHING and all(rank.hello for rank in self._attempt.ranks.values()):
            self._state = State.FORMING
            return [*effects, Tell(self.fence, 0, self.incarnation(), OpenStore())]
        return effects + self._serve_when_all_ready(now)

    def _repeat_command(self, event: Attached) -> list[Effect]:
        """A rank that attached again and has not begun to form may have missed what it was told."""
        if self._attempt.store_address:
            form = Form(self._attempt.store_address, self._attempt.kv_blocks)
            return [Tell(self.fence, event.rank, event.incarnation, form)]
        return [Tell(self.fence, 0, event.incarnation, OpenStore())] if event.rank == 0 else []

    def _store_opened(self, now: float, event: StoreOpened, rank: RankState) -> list[Effect]:
        if self._state is not State.FORMING or self._attempt.store_address or event.rank != 0:
            return []
        rank.heard(now, "store", 0, 0)
        hellos = [rank.hello for rank in self._attempt.ranks.values() if rank.hello]
        try:
            blocks = self._config.plan.kv_blocks([RankMemory(h.node_id, h.memory_bytes) for h in hellos])
        except ConfigError as error:
            return self._lost(now, 0, error.message) if self._kept else self._give_up(error)
        self._attempt.store_address, self._attempt.kv_blocks = event.address, blocks
        form = Form(event.address, blocks)
        return [Tell(self.fence, index, rank.incarnation, form) for index, rank in self._attempt.ranks.items()]

    def _progress(self, now: float, event: Progress, rank: RankState) -> list[Effect]:
        rank.heard(now, "loading", rank.seen.step, event.loaded_bytes)
        rank.total_bytes = event.total_bytes
        ranks = self._attempt.ranks.values()
        if self._state is not State.FORMING or not all(rank.total_bytes for rank in ranks):
            return []
        return [Loading(sum(rank.loaded_bytes for rank in ranks), sum(rank.total_bytes for rank in ranks))]

    def _ready(self, now: float, event: Ready, rank: RankState) -> list[Effect]:
        rank.heard(now, "ready", rank.seen.step, rank.loaded_bytes)
        rank.resident = event.resident
        return self._serve_when_all_ready(now)

    def _serve_when_all_ready(self, now: float) -> list[Effect]:
        ready = all(rank.hello and rank.resident for rank in self._attempt.ranks.values())
        if self._state not in (State.FORMING, State.ADOPTING) or not ready:
            return []
        self.adopted = self._state is State.ADOPTING
        kind = "replica.adopted" if self.adopted else "replica.ready"
        self._attempt.count_blocks(self._config.plan)
        took_s = now - (self._attempt.began_s if self._down_s is None else self._down_s)
        self._state, self._kept, self._up_s, self._down_s = State.READY, True, now, None
        return [ReplicaUp(self.fence), self._emit(kind, epoch=self._epoch, took_s=round(took_s, 3))]

    # What goes wrong.

    def _beat(self, now: float, event: Beat, rank: RankState) -> list[Effect]:
        rank.heard(now, event.phase, event.step, rank.loaded_bytes)
        return []

    def _detached(self, now: float, event: Detached, rank: RankState) -> list[Effect]:
        rank.detached(now)
        return []

    def _died(self, now: float, event: Died, rank: RankState) -> list[Effect]:
        return self._lost(now, event.rank, "its process has died")

    def _fault(self, now: float, event: Fault, rank: RankState) -> list[Effect]:
        return self._lost(now, event.rank, f"{event.phase}: {event.error}")

    def _launch_failed(self, now: float, event: LaunchFailed, rank: RankState) -> list[Effect]:
        return self._lost(now, event.rank, f"could not be started: {event.error}")

    def _tick(self, now: float, event: Tick) -> list[Effect]:
        if self._state is State.WAITING:
            return self._launch(now) if now >= self._attempt.deadline_s else []
        for index, rank in self._attempt.ranks.items():
            if event.lag_s > 0:
                rank.seen = rank.seen.later(event.lag_s)
            healthy, reason = health.judge(now, rank.seen, self._config.limits) if rank.hello else (True, "")
            if not healthy:
                return self._lost(now, index, reason)
        if self._state in (State.ADOPTING, State.LAUNCHING) and now >= self._attempt.deadline_s:
            absent = next(index for index, rank in self._attempt.ranks.items() if not rank.hello)
            return self._lost(now, absent, f"did not attach within {now - self._attempt.began_s:.0f} s")
        return []

    def _lost(self, now: float, index: int, reason: str) -> list[Effect]:
        """One rank is gone or wrong: the epoch ends, unless starting it over has failed too often."""
        if self._state is State.READY and now - self._up_s >= SETTLED_S:
            self._failures = 0
        self._failures += 1
        effects = [self._emit("rank.lost", index, epoch=self._epoch, reason=reason)]
        message = f"rank {index} of replica {self._config.replica}: {reason}"
        if not self._kept and self._state is not State.ADOPTING and self._failures >= START_ATTEMPTS:
            return effects + self._give_up(InternalError(message))
        return effects + self._fence(now, message, index)

    def _give_up(self, error: ConfigError | InternalError) -> list[Effect]:
        self._state = State.FAILED
        self._attempt = Attempt(0.0, 0.0)
        return [Kill(self._epoch, None), GiveUp(error)]

    # Telling.

    def _emit(self, kind: str, rank: int | None = None, **detail: object) -> Effect:
        replica = self._config.replica
        return Emit(kind, f"replica/{replica}" if rank is None else f"rank/{replica}/{rank}", detail)
