"""ReplicaCore: the life of one replica, from launch to epoch to fence, as `step(now, event) -> effects`.

Sans-IO, in the coordinator: the shell executes effects in order and feeds events back. Whatever ends a rank ends
the epoch: the next epoch is persisted, every process of the replica is killed and confirmed gone, and all ranks
start again in their slots. For another layout healthy ranks end the epoch by themselves and form the next one. A new
coordinator adopts ranks that serve the persisted epoch. It knows no Ray, no gRPC and no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from coordinator.replica import events
from coordinator.replica.attempt import Attempt, RankState
from coordinator.replica.config import SETTLED_S, START_ATTEMPTS, ReplicaConfig
from coordinator.replica.early import Early, without_agent
from coordinator.replica.events import Effect, Event
from coordinator.replica.health import Observation
from coordinator.replica.recovery import AT_ONCE, Failures, Restart
from coordinator.replica.room import wait_for_room
from coordinator.replica.state import State
from echelon.errors import ConfigError, InternalError
from echelon.internal.link import Fence
from echelon.types import Rank

ANOTHER_LAYOUT = "another layout"


class ReplicaCore:
    """One per replica."""

    def __init__(self, config: ReplicaConfig) -> None:
        self._config = config
        self._plan, self._layout = config.plan, config.layout
        self._epoch = config.epoch
        self._state, self._attempt = State.STARTING, Attempt(self.fence, self._plan, 0.0, 0.0)
        self._early, self._on_word = Early(), False  # adopted before it is known which processes have an agent
        self._failures, self._up_s = Failures(config.budget), 0.0
        self.reason = ""  # why it does not serve
        self.adopted, self._kept = False, config.served  # an earlier one's epoch; is started again after any failure
        self._down_s: float | None = None
        self._handlers: Mapping[type, Callable[..., list[Effect]]] = {
            events.Attached: self._attached,
            events.Detached: lambda now, event, rank: rank.detached(now),
            events.Died: lambda now, e, rank: self._lost(now, e.rank, rank.seen.death),
            events.Beat: lambda now, event, rank: rank.beat(now, event),
            events.StoreOpened: self._store_opened,
            events.Progress: self._progress,
            events.Ready: self._ready,
            events.Fault: self._fault,
            events.Blamed: lambda now, event, rank: self._told(now, self._attempt.take_blamed(now, event.requests)),
            events.Retired: self._retired,
            events.LaunchFailed: lambda now, e, rank: self._lost(now, e.rank, f"could not be started: {e.error}"),
            events.NoRoom: self._no_room,
            events.Noted: lambda now, event, rank: [self._emit(event.kind, event.rank, **event.detail)],
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
        """Of the ranks that are started for the current epoch; epochs are never reused, so neither are incarnations."""
        return f"{self._config.incarnation_prefix}{self._epoch}"

    def ranks(self) -> tuple[Rank, ...]:
        """The processes that have attached, for GetCluster."""
        return self._attempt.describe()

    def step(self, now: float, event: Event) -> list[Effect]:
        """Take one event in; the effects are to be executed in order."""
        if isinstance(event, events.Started):
            begin = self._started if self._state is State.STARTING else self._joined
            return begin(now, event) + [effect for early in self._early.take() for effect in self.step(now, early)]
        if isinstance(event, events.Tick):
            return self._tick(now, event)
        if isinstance(event, events.Killed | events.Persisted):
            return self._answered(now, event)
        if isinstance(event, events.StartEnded):
            self._kept = True
            return []
        if isinstance(event, events.Acquitted):
            return self._failures.acquit()
        if isinstance(event, events.Relayout):
            return self._relayout(now, event)
        if self._state is State.STARTING:
            self._early.add(event)
            word = self._early.all_serve(self._epoch, self._layout, self._plan.ranks)
            self._on_word = bool(word)
            return self.step(now, events.Started(word)) if word else []
        if rank := self._attempt.find(event.rank, event.incarnation):
            return self._handlers[type(event)](now, event, rank)
        if not self._on_word:
            return list(self._attempt.refuse(event)) if isinstance(event, events.Attached) else []
        self._early.add(event)
        return []

    # From nothing to launched.

    def _started(self, now: float, event: events.Started) -> list[Effect]:
        survivors = dict(event.survivors)
        attempt = self._new_attempt(now + self._config.adopt_window_s, now)
        for index, incarnation in sorted(survivors.items()):
            attempt.add(index, RankState(incarnation, Observation("ready", 0, now, now)))
        if self._epoch == 0 or attempt.absent or len(survivors) < len(event.survivors):
            return self._fence(now, f"cold start: {len(attempt.ranks)} ranks of epoch {self._epoch} are alive")
        self._state, self._attempt = State.ADOPTING, attempt
        return [self._emit("replica.adopting", epoch=self._epoch)]

    def _joined(self, now: float, event: events.Started) -> list[Effect]:
        """Who was adopted on its word must have an agent; what lives besides is surplus, or a stranger."""
        self._on_word = False
        if self._state not in (State.ADOPTING, State.READY):
            return []
        own = {index: rank.incarnation for index, rank in self._attempt.everyone.items()}
        if (alone := without_agent(own, event.survivors)) is not None:
            return self._lost(now, alone, "no node agent has charge of it")
        for index, incarnation in event.survivors - own.items():
            if index in own:
                return self._fence(now, f"there is another rank {index}, {incarnation}", index)
            self._attempt.add(index, RankState(incarnation, Observation("ready", 0, now, now)))
        return []

    def _new_attempt(self, deadline_s: float, now: float) -> Attempt:
        return Attempt(self.fence, self._plan, deadline_s, now, known=self._attempt.known)

    def _fence(self, now: float, reason: str, suspect: int | None = None, again: Restart = AT_ONCE) -> list[Effect]:
        """End the epoch. Nothing of it can be heard or write again once the next one is persisted."""
        down = self._next_epoch(now, State.FENCING, reason)
        self._attempt = self._new_attempt(now + again.wait_s, now)
        fenced = self._emit("replica.fenced", epoch=self._epoch, reason=reason)
        return [events.PersistEpoch(self._epoch), *down, fenced, events.Kill(self._epoch, suspect, again.quarantined)]

    def _next_epoch(self, now: float, state: State, reason: str) -> list[Effect]:
        down: list[Effect] = [self._attempt.down(reason)] if self._state is State.READY else []
        self._down_s = now if self._down_s is None else self._down_s
        self._epoch += 1
        self._state, self.reason = state, reason
        return down

    def _answered(self, now: float, event: events.Killed | events.Persisted) -> list[Effect]:
        """What the epoch waited for before any process of it could be started."""
        awaited = State.FENCING if isinstance(event, events.Killed) else State.RETIRING, self._epoch
        if (self._state, event.epoch) != awaited:
            return []
        self._state = State.WAITING
        if isinstance(event, events.Killed) and event.replaced is not None:
            self._attempt.deadline_s = now + self._failures.replaced(event.replaced)
        gone = self._emit("replica.gone", epoch=self._epoch, took_s=round(now - self._attempt.began_s, 3))
        return [gone, *self._tick(now, events.Tick())]

    def _launch(self, now: float) -> list[Effect]:
        self._state, attempt = State.LAUNCHING, self._attempt
        attempt.deadline_s, attempt.began_s = now + self._config.launch_timeout_s, now
        launches: list[Effect] = [events.Launch(i, self.incarnation(), self._kept) for i in attempt.absent]
        for index in attempt.absent:
            attempt.add(index, RankState(self.incarnation(), Observation("waiting", 0, now, now)))
        launching = self._emit("replica.launching", epoch=self._epoch, ranks=len(launches))
        return [launching, *launches, *self._form_when_all_idle()]

    # From one layout to another.

    def _relayout(self, now: float, event: events.Relayout) -> list[Effect]:
        """Ranks that serve are told to end their epoch and stay; what does not serve starts over from nothing."""
        self._plan, self._layout, self._attempt.known = event.plan, event.layout, None
        self._failures, self._kept = Failures(self._config.budget), False
        if self._state is State.STARTING:
            return []
        if self._state is not State.READY:
            return self._fence(now, ANOTHER_LAYOUT)
        kept = {index: rank for index, rank in self._attempt.everyone.items() if rank.hello}
        down = self._next_epoch(now, State.RETIRING, ANOTHER_LAYOUT)
        attempt = self._attempt = self._new_attempt(now, now)
        for index, rank in kept.items():
            attempt.add(index, rank)
            rank.retiring_s = now if rank.resident else None
        told = self._emit("replica.relayout", epoch=self._epoch, kept=len(kept), surplus=len(attempt.surplus))
        retire = [attempt.retire(index) for index, rank in kept.items() if not rank.idle]
        return [events.PersistEpoch(self._epoch), *down, told, *retire, events.AwaitPersisted(self._epoch)]

    def _retired(self, now: float, event: events.Retired, rank: RankState) -> list[Effect]:
        if rank.retiring_s is None or rank.hello is None:
            return []
        rank.retired(now, replace(rank.hello, phase="waiting", memory_bytes=event.memory_bytes))
        return self._form_when_all_idle()

    # From attached to ready.

    def _attached(self, now: float, event: events.Attached, rank: RankState) -> list[Effect]:
        attempt, again = self._attempt, rank.hello is not None
        serves = event.resident is not None and (event.epoch, event.layout) == (self._epoch, self._layout)
        if self._state is State.ADOPTING and not serves and event.rank in attempt.ranks:
            return self._fence(now, f"rank {event.rank} does not serve epoch {self._epoch}", event.rank)
        rank.hello, rank.resident = event, event.resident
        rank.seen = Observation(event.phase, rank.seen.step, now, now)
        if event.phase == "waiting":
            rank.retired(now, event)
        effects: list[Effect] = [attempt.accept(event)]
        effects += [] if again else [self._emit("rank.attached", event.rank, pid=event.pid, epoch=self._epoch)]
        if self._state is State.FORMING or not rank.idle:
            effects += attempt.again(event)
        return effects + self._form_when_all_idle() + self._serve_when_all_ready(now)

    def _form_when_all_idle(self) -> list[Effect]:
        if self._state is not State.LAUNCHING or not self._attempt.all_idle:
            return []
        self._state = State.FORMING
        return [self._emit("replica.forming", epoch=self._epoch), self._attempt.open_store()]

    def _store_opened(self, now: float, event: events.StoreOpened, rank: RankState) -> list[Effect]:
        if self._state is not State.FORMING or self._attempt.formed or event.rank != 0:
            return []
        rank.heard(now, "store", 0, 0)
        try:
            return list(self._attempt.form(event.address))
        except ConfigError as error:
            return self._lost(now, 0, error.message) if self._kept else self._give_up(error)

    def _progress(self, now: float, event: events.Progress, rank: RankState) -> list[Effect]:
        rank.heard(now, "loading", rank.seen.step, event.loaded_bytes)
        rank.total_bytes = event.total_bytes
        loading = self._attempt.loading() if self._state is State.FORMING else None
        return [events.Loading(*loading)] if loading else []

    def _ready(self, now: float, event: events.Ready, rank: RankState) -> list[Effect]:
        rank.heard(now, "ready", rank.seen.step, rank.loaded_bytes)
        rank.resident = event.resident
        return self._serve_when_all_ready(now)

    def _serve_when_all_ready(self, now: float) -> list[Effect]:
        if self._state not in (State.FORMING, State.ADOPTING) or not self._attempt.all_ready:
            return []
        self.adopted = self._state is State.ADOPTING
        kind = "replica.adopted" if self.adopted else "replica.ready"
        self._attempt.count_blocks()
        took_s = now - (self._attempt.began_s if self._down_s is None else self._down_s)
        self._state, self._kept, self._up_s, self._down_s, self.reason = State.READY, True, now, None, ""
        return [events.ReplicaUp(self.fence), self._emit(kind, epoch=self._epoch, took_s=round(took_s, 3))]

    # What goes wrong.

    def _fault(self, now: float, event: events.Fault, rank: RankState) -> list[Effect]:
        return self._told(now, self._attempt.take_fault(now, event, self._state is State.FORMING))

    def _told(self, now: float, asks: list[Effect]) -> list[Effect]:
        """What a rank told ends the epoch, unless it may still be explained otherwise."""
        fault = self._attempt.fault
        return asks + (self._lost(now, fault.rank, fault.reason) if fault and now >= fault.until_s else [])

    def _no_room(self, now: float, event: events.NoRoom, rank: RankState) -> list[Effect]:
        self.reason = event.reason
        return wait_for_room(self._attempt, rank, event, now + self._config.launch_timeout_s)

    def _tick(self, now: float, event: events.Tick) -> list[Effect]:
        attempt, attaching = self._attempt, self._state in (State.ADOPTING, State.LAUNCHING)
        if self._state is State.WAITING:
            return self._launch(now) if now >= attempt.deadline_s else []
        attempt.later(event.lag_s)
        if unfit := attempt.first_unfit(now, self._config.limits, attaching):
            return self._lost(now, *unfit, wedged=attempt.wedged(now, unfit[0], self._config.limits))
        return []

    def _lost(self, now: float, index: int, reason: str, wedged: bool = False) -> list[Effect]:
        """One rank is gone or wrong: the epoch ends, unless that has failed too often, or the rank has no part."""
        index, reason = self._attempt.explained(index, reason)
        effects = [self._emit("rank.lost", index, epoch=self._epoch, reason=reason)]
        if discarded := self._attempt.discard(index, reason):
            return [*effects, *discarded]
        settled = self._state is State.READY and now - self._up_s >= SETTLED_S
        fault = self._attempt.fault_of(now, index, reason, wedged)
        self._failures.failed(fault, settled)
        message, told = f"rank {index} of replica {self._config.replica}: {reason}", self._attempt.fault is not None
        never_served = told and fault is not None and self._config.epoch == 0 and self._up_s == 0
        ends = never_served or self._failures.in_a_row >= START_ATTEMPTS
        if ends and not (self._kept or self._state is State.ADOPTING):
            return effects + self._give_up(InternalError(message))
        again = self._failures.restart(now, fault is not None)
        effects += [self._emit(kind, rank, wait_s=again.wait_s, reason=again.reason) for kind, rank in again.told()]
        return effects + self._fence(now, message, index, again)

    def _give_up(self, error: ConfigError | InternalError) -> list[Effect]:
        """Nothing of it is left; another layout may still be tried."""
        self._state, self._attempt = State.FAILED, self._new_attempt(0.0, 0.0)
        failed = self._emit("replica.failed", epoch=self._epoch, reason=error.message)
        return [failed, events.Kill(self._epoch, None), events.GiveUp(error)]

    def _emit(self, kind: str, rank: int | None = None, **detail: object) -> Effect:
        subject = f"replica/{self._config.replica}" if rank is None else f"rank/{self._config.replica}/{rank}"
        return events.Emit(kind, subject, detail)
