"""Simulated users: the SDK's session machine on connections that break, with habits of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.requests.events import Cancel
from coordinator.requests.nouns import Received, Request, Shown
from echelon import session
from echelon.errors import (
    CancelledError,
    ConflictError,
    DeadlineError,
    EchelonError,
    InvalidRequestError,
    StreamTakenOverError,
    UnavailableError,
)
from echelon.generation_session import GenerationSession, Message
from echelon.internal.link import Sampling
from echelon.retry import RetryPolicy
from echelon.types import Completion, StreamEvent
from tests.simulation.checker import require
from tests.simulation.model import BREAKS
from tests.simulation.network import Connection
from tests.simulation.supervisor import Supervisor
from tests.simulation.world import PEER, World


@dataclass(frozen=True, slots=True)
class Order:
    """What one user asks for. A time is None for what this user never does."""

    request_id: str
    prompt: tuple[int, ...]
    sampling: Sampling
    timeout_s: float
    starts_s: float
    cancels_s: float | None = None  # takes it back
    vanishes_s: float | None = None  # is never heard of again
    twin_s: float | None = None  # asks for the same a second time, on another stream, holding nothing
    nap_s: float = 0.0  # waits longer than the policy says before trying again
    priority: int = 0
    cache_salt: str = ""


class User:
    """One session from start to end."""

    def __init__(self, world: World, supervisor: Supervisor, order: Order) -> None:
        self.order = order
        self.completion: Completion | None = None
        self.error: EchelonError | None = None
        self.gone = False
        self._world = world
        self._supervisor = supervisor
        self._unreachable_until = 0.0
        self._session = GenerationSession(order.request_id, order.timeout_s, RetryPolicy())
        self._connection: Connection | None = None
        choices = range(order.sampling.n)
        self._ids: list[list[int]] = [[] for _ in choices]
        self._texts = ["" for _ in choices]
        self._deadline = world.clock.now + order.timeout_s
        self._step(session.Start())

    @property
    def ended(self) -> bool:
        return self.gone or self.completion is not None or self.error is not None

    def check(self) -> None:
        """How it may end, once every fault is over."""
        order = self.order
        require(self.ended, "{} never ended", order.request_id)
        if self.error is None:
            return
        excuses: list[type[EchelonError]] = []
        if order.cancels_s is not None:
            excuses.append(CancelledError)
        if order.twin_s is not None:
            excuses += (
                StreamTakenOverError,
                ConflictError,
            )  # the twin may get another answer once the first is forgotten
        if order.sampling.grammar == BREAKS:
            excuses.append(InvalidRequestError)
        if order.timeout_s < 10:
            excuses.append(DeadlineError)
        require(isinstance(self.error, tuple(excuses)), "{} ended in {}", order, self.error)

    def cancel(self) -> None:
        self._step(session.Cancel())

    def vanish(self) -> None:
        self.gone = True
        self.break_stream()

    @property
    def reading(self) -> bool:
        """A stream of its is open."""
        return not self.ended and self._connection is not None and self._connection.open

    def delay(self, seconds: float) -> None:
        """What is under way to it and from it comes later."""
        if self._connection:
            self._connection.stall(seconds)

    def part(self, seconds: float, notice_s: float) -> None:
        """Nothing reaches it and nothing comes from it; either end gives up what is open if it takes too long."""
        self._unreachable_until = self._world.clock.now + seconds
        self.delay(seconds)
        if self._connection and seconds > notice_s:
            self._world.clock.after(notice_s, self._connection.cut)

    def break_stream(self) -> None:
        if self._connection:
            self._connection.cut()

    def _step(self, event: session.Event[Message]) -> None:
        if self.gone or self.ended:
            return
        clock = self._world.clock
        for effect in self._session.step(clock.now, event):
            require(not self.ended, "{}: {} after the end", self.order.request_id, effect)
            match effect:
                case session.Open(resume, timeout_s):
                    assert timeout_s is not None
                    self._open(resume, timeout_s)
                case session.Sleep(seconds):
                    self._drop()
                    clock.after(seconds + self._world.random.random() * self.order.nap_s, self._step, session.Timer())
                case session.Yield(value):
                    self._take(value)
                case session.CancelRemote(request_id):
                    clock.after(0.01, self._cancel, Cancel((request_id,)))
                case session.Finish(result):
                    self._finish(result)
                case session.Raise(error):
                    self.error = error
                    self._drop()
                    late = clock.now - self._deadline
                    require(
                        late <= 1.0 + self.order.nap_s, "{} ended {} s after its deadline", self.order.request_id, late
                    )

    def _cancel(self, cancel: Cancel) -> None:
        self._supervisor.call(lambda coordinator: coordinator.post(cancel))

    def _open(self, resume: Received, timeout_s: float) -> None:
        self._drop()
        clock = self._world.clock
        if not self._supervisor.up or clock.now < self._unreachable_until:
            clock.after(0.01, self._step, session.Broken(UnavailableError("nobody listens")))
            return
        connection = self._connection = self._world.connect()
        connection.ends[PEER].on_message = lambda event: self._receive(connection, event)
        connection.ends[PEER].on_cut = lambda: self._broken(connection, UnavailableError("the connection broke"))
        clock.after(timeout_s, self._broken, connection, DeadlineError("the transport's deadline passed"))
        clock.after(0.005, self._submit, connection, resume, timeout_s)

    def _submit(self, connection: Connection, resume: Received, timeout_s: float) -> None:
        order, now = self.order, self._world.clock.now
        if not connection.open or not self._supervisor.up:
            connection.cut()
            return
        request = Request(
            request_id=order.request_id,
            digest=order.request_id.encode(),
            model="m",
            prompt=order.prompt,
            sampling=order.sampling,
            deadline_unix_s=now + timeout_s,
            opened_unix_s=now,
            priority=order.priority,
            cache_salt=order.cache_salt,
        )
        self._supervisor.call(lambda coordinator: coordinator.serve_user(connection, request, resume or None))

    def _receive(self, connection: Connection, event: Shown) -> None:
        if self._connection is connection:
            self._step(session.Broken(event) if isinstance(event, EchelonError) else session.Received(event))

    def _broken(self, connection: Connection, error: EchelonError) -> None:
        if self._connection is connection:
            self._step(session.Broken(error))

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection:
            connection.cut()

    def _take(self, event: StreamEvent) -> None:
        ids = self._ids[event.index]
        require(event.sequence == len(ids), "{}: {} after {} tokens", self.order.request_id, event, len(ids))
        ids.extend(event.token_ids)
        self._texts[event.index] += event.text

    def _finish(self, completion: Completion) -> None:
        self._drop()
        self.completion = completion
        ids = [list(choice.token_ids) for choice in completion.choices]
        texts = [choice.text for choice in completion.choices]
        require((ids, texts) == (self._ids, self._texts), "{} is not what was yielded: {}", completion, self._ids)


def answered(users: Sequence[User]) -> int:
    return sum(user.completion is not None for user in users)
