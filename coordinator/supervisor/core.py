"""SupervisorCore: when Ray and the coordinator are started, replaced and ended, as `step(now, event) -> effects`.

Sans-IO, in the supervisor's process (`coordinator/supervisor/process.py` is its shell). A coordinator that dies or
falls silent is replaced while its ranks stay; one that keeps dying, or says that it failed, ends everything. Our own
Ray, should it end or stop answering, is started again, and with it a coordinator; another's is waited for.
"""

from __future__ import annotations

import enum
import signal
from collections.abc import Mapping

from coordinator.supervisor.events import (
    Begin,
    ConfigurationRead,
    ConfigurationRefused,
    CoordinatorEnded,
    Effect,
    Event,
    Exit,
    PrepareSuccessor,
    RayEnded,
    RayFailed,
    RayUp,
    ReadConfiguration,
    SendConfiguration,
    ShowLoading,
    ShowReady,
    SignalCoordinator,
    Signalled,
    StartCoordinator,
    StartRay,
    TakeConfiguration,
    Tick,
    Told,
    Warn,
)

BEAT_TIMEOUT_S = 10.0  # a successor must renew the lease before the ranks are ended
FIRST_BEAT_TIMEOUT_S = 60.0  # a process that is still importing, or reads the model's files and the journal
MAX_DEATHS = 5
MAX_RAY_FAILURES = 3  # in a row, of a Ray that is started again
DEATHS_WINDOW_S = 60.0
CLEAN_UP_S = 30.0  # beyond the drain: to kill ranks and give the slots back
HURRY_S = 10.0


class State(enum.Enum):
    """replacing: the coordinator was killed or told to leave, and another follows. stopping: none follows."""

    IDLE = enum.auto()
    RAY_STARTING = enum.auto()
    RUNNING = enum.auto()
    REPLACING = enum.auto()
    STOPPING = enum.auto()
    ENDED = enum.auto()


class Change(enum.Enum):
    """Of the configuration. begun: the coordinator has taken it, and it does not serve yet."""

    NONE = enum.auto()
    READING = enum.auto()
    SENT = enum.auto()
    BEGUN = enum.auto()


class SupervisorCore:
    """owns_ray: Ray is ours to start; else it is joined. reads: there is a file whose content may have changed."""

    def __init__(self, owns_ray: bool, drain_timeout_s: float, reads: bool = False) -> None:
        self._owns_ray = owns_ray
        self._reads = reads
        self._change = Change.NONE
        self._drain_timeout_s = drain_timeout_s
        self._state = State.IDLE
        self._silent_at_s = 0.0
        self._kill_at_s = 0.0
        self._deaths: list[float] = []
        self._death_reason = ""
        self._ray_lost = False  # ours is to be started again; another's is awaited
        self._ray_failures = 0
        self._shown_ready = False
        self._began_s = 0.0
        self._exit = Exit(0)

    @property
    def state(self) -> State:
        return self._state

    def step(self, now: float, event: Event) -> list[Effect]:
        """Take one event in; the effects are to be executed in order."""
        match event:
            case Begin():
                self._began_s = now
                return self._start_ray() if self._owns_ray else self._start_coordinator(now)
            case RayUp() if self._state is State.RAY_STARTING:
                self._ray_failures = 0
                return self._start_coordinator(now)
            case RayFailed(message) if self._state is State.RAY_STARTING:
                return self._ray_failed(message)
            case RayEnded(reason) if self._state in (State.RUNNING, State.REPLACING):
                return self._lose_ray(reason)
            case Told(message) if self._state in (State.RUNNING, State.STOPPING):
                return self._told(now, message)
            case CoordinatorEnded(code):
                return self._coordinator_ended(now, code)
            case Signalled(number):
                return self._signalled(now, number)
            case ConfigurationRead(changed) if self._change is Change.READING:
                return self._read(now, changed)
            case ConfigurationRefused(message) if self._change is Change.READING:
                return self._unchanged(message)
            case Tick(lag_s):
                return self._tick(now, lag_s)
        return []

    def _start_ray(self) -> list[Effect]:
        self._state, self._ray_lost = State.RAY_STARTING, False
        return [StartRay()]

    def _ray_failed(self, message: str) -> list[Effect]:
        """A first start tells its error and ends. What has served is not given up for one start that fails."""
        self._ray_failures += 1
        if not self._shown_ready or self._ray_failures >= MAX_RAY_FAILURES:
            return self._leave(Exit(1, message))
        return [Warn(f"Ray is started once more: {message}"), *self._start_ray()]

    def _lose_ray(self, reason: str) -> list[Effect]:
        """Ours takes the coordinator along, which has a place in it; its successor replays from the journal."""
        told: list[Effect] = [] if self._ray_lost else [Warn(reason)]
        self._ray_lost = True
        return self._replace(reason) if self._owns_ray else told

    def _start_coordinator(self, now: float) -> list[Effect]:
        self._state, self._death_reason = State.RUNNING, ""
        self._silent_at_s = now + FIRST_BEAT_TIMEOUT_S
        return [StartCoordinator(served=self._shown_ready)]

    def _replace(self, reason: str) -> list[Effect]:
        self._state, self._death_reason = State.REPLACING, reason
        return [SignalCoordinator(signal.SIGKILL)]

    def _leave(self, exit: Exit) -> list[Effect]:
        self._state = State.ENDED
        return [exit]

    def _told(self, now: float, message: Mapping[str, object]) -> list[Effect]:
        if "waiting" not in message:  # said before it begins
            self._silent_at_s = now + BEAT_TIMEOUT_S
        match message:
            case {"failed": str(reason)} if self._state is State.RUNNING:
                self._state, self._exit = State.STOPPING, Exit(1, reason)
                self._kill_at_s = now + CLEAN_UP_S
            case {"ready": str(address)}:
                took_s = _phases(message.get("phases"), now - self._began_s)
                shown: list[Effect] = [] if self._shown_ready else [ShowReady(address, took_s)]
                self._shown_ready = True
                # A change that a coordinator died of may be done by its successor.
                return [*shown, PrepareSuccessor(), *self._changed()]
            case {"ray_lost": str(reason)} if self._state is State.RUNNING:
                return self._lose_ray(reason)
            case {"ray_back": str(address)} if self._ray_lost and not self._owns_ray:
                self._ray_lost = False
                return [Warn(f"Ray at {address} is back")]
            case {"reconfiguring": True} if self._change is Change.SENT:
                self._change = Change.BEGUN
                return [TakeConfiguration(read=True)]
            case {"not_reconfigured": str(reason)} if self._change in (Change.SENT, Change.BEGUN):
                return self._unchanged(reason)
            case {"reconfigured": True}:
                return self._changed()
            case {"loading": {"loaded_bytes": int(loaded), "total_bytes": int(total)}}:
                return [ShowLoading(loaded, total)]
        return []

    def _coordinator_ended(self, now: float, code: int) -> list[Effect]:
        if self._state is State.STOPPING:
            return self._leave(self._exit)
        if self._state is State.REPLACING and not self._death_reason:
            return self._start_coordinator(now)
        if self._change is Change.SENT:
            return self._unchanged("the coordinator ended meanwhile") + self._coordinator_ended(now, code)
        how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        reason = self._death_reason or f"it ended with {how}"
        if self._owns_ray or not self._ray_lost:  # nobody lives long while another's Ray comes and goes
            self._deaths = [death for death in self._deaths if now - death < DEATHS_WINDOW_S] + [now]
        if len(self._deaths) >= MAX_DEATHS:
            times = f"{MAX_DEATHS} times within {DEATHS_WINDOW_S:g} s"
            return self._leave(Exit(1, f"the coordinator had to be replaced {times}, at last because {reason}"))
        ray = self._ray_lost and self._owns_ray
        again = self._start_ray() if ray else self._start_coordinator(now)
        return [Warn(f"the coordinator is replaced: {reason}"), *again]

    def _signalled(self, now: float, number: int) -> list[Effect]:
        if number == signal.SIGHUP:
            if self._state is not State.RUNNING:
                return []
            if self._change is not Change.NONE:
                return [Warn("not reconfigured: the last change is still under way")]
            self._change = Change.READING
            return [ReadConfiguration()] if self._reads else self._read(now, changed=False)
        self._exit = Exit(130) if number == signal.SIGINT else Exit(0)
        if self._state in (State.IDLE, State.RAY_STARTING):
            return self._leave(self._exit)
        if self._state is State.STOPPING:
            self._kill_at_s = min(self._kill_at_s, now + HURRY_S)
        else:
            self._kill_at_s = now + self._drain_timeout_s + CLEAN_UP_S
        self._state = State.STOPPING
        return [SignalCoordinator(signal.SIGTERM)]

    def _read(self, now: float, changed: bool) -> list[Effect]:
        """The same configuration again asks for a new coordinator."""
        self._change = Change.NONE
        if self._state is not State.RUNNING:
            return []
        if changed:
            self._change = Change.SENT
            return [SendConfiguration()]
        self._state, self._kill_at_s = State.REPLACING, now + BEAT_TIMEOUT_S
        return [SignalCoordinator(signal.SIGHUP)]

    def _changed(self) -> list[Effect]:
        if self._change is not Change.BEGUN:
            return []
        self._change = Change.NONE
        return [Warn("reconfigured")]

    def _unchanged(self, reason: str) -> list[Effect]:
        taken: list[Effect] = [TakeConfiguration(read=False)] if self._change is Change.BEGUN else []
        self._change = Change.NONE
        return [*taken, Warn(f"not reconfigured: {reason}")]

    def _tick(self, now: float, lag_s: float) -> list[Effect]:
        self._silent_at_s += lag_s
        if self._state is State.RUNNING and now >= self._silent_at_s:
            return self._replace("it gave no sign of life")
        if self._state in (State.STOPPING, State.REPLACING) and now >= self._kill_at_s:
            return [SignalCoordinator(signal.SIGKILL)]
        return []


def _phases(told: object, total_s: float) -> dict[str, float]:
    """Of a start that took so long in all: before the coordinator, and what that has told; empty if it told nothing."""
    if not isinstance(told, Mapping) or not told:
        return {}
    phases = {str(name): float(took_s) for name, took_s in told.items()}
    return {"Ray and coordinator": max(total_s - sum(phases.values()), 0.0), **phases}
