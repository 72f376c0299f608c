"""The SDK's one state machine: when to open a call, what to hand to the user, when to try again, when to give up.

Sans-IO: the transports and the simulator feed events with the time of any steady clock and carry out the effects in
order. A step's effects end the session (Finish, Raise), or hold one Sleep, answered by Timer, or else mean: read the
call that was opened last. Knows no protobuf type, no clock and no randomness.
    CallSession (one answer), FeedSession (items by rising position); a generation's is in `generation_session.py`
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

from echelon.errors import CancelledError, EchelonError
from echelon.retry import RetryPolicy, decide_retry

P = TypeVar("P")  # what a call is opened with to go on where the last one broke
M = TypeVar("M")  # what the call answers
Y = TypeVar("Y")  # what the user is handed on the way
R = TypeVar("R")  # and at the end
T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, slots=True)
class Start:
    """Begin."""


@dataclass(frozen=True, slots=True)
class Received(Generic[T_co]):
    """The open call gave a message."""

    message: T_co


@dataclass(frozen=True, slots=True)
class Ended:
    """The open call ended with OK."""


@dataclass(frozen=True, slots=True)
class Broken:
    """The open call failed."""

    error: EchelonError


@dataclass(frozen=True, slots=True)
class Timer:
    """The Sleep is over."""


@dataclass(frozen=True, slots=True)
class Cancel:
    """The user wants no more of it."""


Event = Start | Received[M] | Ended | Broken | Timer | Cancel


@dataclass(frozen=True, slots=True)
class Open(Generic[T_co]):
    """Open a call that goes on after `resume`. timeout_s None: no deadline."""

    resume: T_co
    timeout_s: float | None


@dataclass(frozen=True, slots=True)
class Sleep:
    """Drop the call that is open and wait."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Yield(Generic[T_co]):
    """Hand this to the user."""

    value: T_co


@dataclass(frozen=True, slots=True)
class Finish(Generic[T_co]):
    """The end, in success."""

    result: T_co


@dataclass(frozen=True, slots=True)
class Raise:
    """The end, in failure."""

    error: EchelonError


@dataclass(frozen=True, slots=True)
class CancelRemote:
    """Tell the server to end this request: a dropped call alone only parks it."""

    request_id: str


Effect = Open[P] | Sleep | Yield[Y] | Finish[R] | Raise | CancelRemote


class Session(ABC, Generic[P, M, Y, R]):
    """What all three share: opening, back-off, deadline, cancel; and that nothing follows the end."""

    def __init__(self, key: str, timeout_s: float | None, policy: RetryPolicy) -> None:
        self.key = key
        self.ended = False
        self._timeout_s = timeout_s
        self._policy = policy
        self._deadline: float | None = None
        self._retries = 0

    def step(self, now: float, event: Event[M]) -> list[Effect[P, Y, R]]:
        """The effects of one event, to be carried out in order."""
        if self.ended:
            return []
        effects = self._effects(now, event)
        self.ended = any(isinstance(effect, Finish | Raise) for effect in effects)
        return effects

    def _effects(self, now: float, event: Event[M]) -> list[Effect[P, Y, R]]:
        match event:
            case Start():
                self._deadline = None if self._timeout_s is None else now + self._timeout_s
                return [self._open(now)]
            case Timer():
                return [self._open(now)]
            case Received(message):
                return self._receive(now, message)
            case Ended():
                return self._end(now)
            case Broken(error):
                return [self._retry(now, error)]
            case Cancel():
                return self._cancel()

    def _open(self, now: float) -> Open[P]:
        return Open(self._resume(), None if self._deadline is None else max(self._deadline - now, 0.0))

    def _retry(self, now: float, error: EchelonError) -> Sleep | Raise:
        deadline = self._give_up_at(now)
        decision = decide_retry(now, error, self._retries, deadline, self._policy, self.key)
        self._retries += 1
        return Raise(decision) if isinstance(decision, EchelonError) else Sleep(decision)

    def _give_up_at(self, now: float) -> float | None:
        return self._deadline

    def _progress(self) -> None:
        self._retries = 0

    def _cancel(self) -> list[Effect[P, Y, R]]:
        return [Raise(CancelledError("cancelled by the caller"))]

    @abstractmethod
    def _resume(self) -> P: ...

    @abstractmethod
    def _receive(self, now: float, message: M) -> list[Effect[P, Y, R]]: ...

    @abstractmethod
    def _end(self, now: float) -> list[Effect[P, Y, R]]: ...


class CallSession(Session[None, M, M, M]):
    """A call with one answer, safe to send again: its request carries an id wherever it changes something."""

    def _resume(self) -> None:
        return None

    def _receive(self, now: float, message: M) -> list[Effect[None, M, M]]:
        return [Finish(message)]

    def _end(self, now: float) -> list[Effect[None, M, M]]:
        raise AssertionError("a call that ends with OK has answered")


# A call that stood this long had reached its server: keepalive ends those that have not.
REACHED_S = 20.0


class FeedSession(Session[int, tuple[int, M], M, None]):
    """Items (position, item) by rising position, re-opened after the last one; position 0 is always handed on.

    away_timeout_s limits each time without the server. The whole may have no limit: a job may take days.
    """

    def __init__(
        self, key: str, after: int, timeout_s: float | None, away_timeout_s: float, policy: RetryPolicy
    ) -> None:
        super().__init__(key, timeout_s, policy)
        self._after = after
        self._away_timeout_s = away_timeout_s
        self._away_since: float | None = None
        self._opened_at = 0.0

    def _resume(self) -> int:
        return self._after

    def _receive(self, now: float, message: tuple[int, M]) -> list[Effect[int, M, None]]:
        self._progress()
        position, item = message
        if 0 < position <= self._after:
            return []
        self._after = position or self._after
        return [Yield(item)]

    def _end(self, now: float) -> list[Effect[int, M, None]]:
        return [Finish(None)]

    def _open(self, now: float) -> Open[int]:
        self._opened_at = now
        return super()._open(now)

    def _progress(self) -> None:
        super()._progress()
        self._away_since = None

    def _give_up_at(self, now: float) -> float | None:
        if now - self._opened_at >= REACHED_S:
            self._progress()
        self._away_since = now if self._away_since is None else self._away_since
        return min(self._away_since + self._away_timeout_s, self._deadline or math.inf)
