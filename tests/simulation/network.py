"""Virtual time, and connections between simulated processes.

A connection keeps order and loses nothing until it is cut, like a gRPC stream; after a cut each end learns of it in
its own time, and what was under way may still arrive at either end, or not. A network that stalls delivers later.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from random import Random
from typing import Any

LONGEST_S = 1.0  # on its way: what takes longer is a fault, which ends as they all do; in peace no rank falls silent
MAX_ACTIONS = 20_000  # of one life: ten times what the busiest takes


class Clock:
    """Runs actions in order of time; equal times in order of their making."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._actions: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._count = itertools.count()

    def after(self, delay_s: float, action: Callable[..., object], *arguments: Any) -> None:
        self.at(self.now + delay_s, action, *arguments)

    def at(self, time: float, action: Callable[..., object], *arguments: Any) -> None:
        count = next(self._count)
        assert count < MAX_ACTIONS, "it never comes to rest"
        heapq.heappush(self._actions, (time, count, action, arguments))

    def run(self, until: float, done: Callable[[], bool] = lambda: False) -> None:
        """Until that time, or until `done`."""
        while self._actions and self._actions[0][0] <= until and not done():
            self.now, _, action, arguments = heapq.heappop(self._actions)
            action(*arguments)


class End:
    """One end of a connection. Whoever holds it sets what happens on a message and on the cut."""

    def __init__(self) -> None:
        self.on_message: Callable[[Any], None] = lambda message: None
        self.on_cut: Callable[[], None] = lambda: None
        self.last_arrival = 0.0


class Connection:
    """Two ends, messages both ways."""

    def __init__(self, clock: Clock, random: Random, latency_s: float) -> None:
        self.ends = [End(), End()]
        self.open = True
        self._clock = clock
        self._random = random
        self._latency_s = latency_s
        self._stragglers = [True, True]
        self._stalls = 0  # that go on
        self._held: list[tuple[int, Any]] = []

    def stall(self, seconds: float) -> None:
        """Nothing arrives for so long; then all of it, in order."""
        self._stalls += 1
        self._clock.after(seconds, self._go_on)

    def _go_on(self) -> None:
        self._stalls -= 1
        if not self._stalls:
            held, self._held = self._held, []
            for to, message in held:
                self._arrive(to, message)

    def send(self, to: int, message: Any) -> None:
        if self.open:
            end = self.ends[to]
            delay_s = min(self._random.expovariate(1 / self._latency_s), LONGEST_S)
            end.last_arrival = max(end.last_arrival, self._clock.now + delay_s)
            self._clock.at(end.last_arrival, self._arrive, to, message)

    def cut(self) -> None:
        if self.open:
            self.open = False
            self._stragglers = [self._random.random() < 0.3 for _ in self.ends]
            for end in self.ends:
                notice_s = self._random.random() * self._random.choice((0.01, 0.3))
                self._clock.after(notice_s, lambda end=end: end.on_cut())

    def _arrive(self, to: int, message: Any) -> None:
        if self._stalls:
            self._held.append((to, message))
        elif self.open or self._stragglers[to]:
            self.ends[to].on_message(message)
