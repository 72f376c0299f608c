"""What all simulated processes share, and what each of them is: something that can be stopped, woken and ended."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

from tests.simulation.checker import Checker
from tests.simulation.network import Clock, Connection

TICK_S = 0.5
SERVER, PEER = 0, 1  # ends of a connection


@dataclass(frozen=True, slots=True)
class World:
    """One simulation's time, chance and judge."""

    clock: Clock
    random: Random
    checker: Checker
    latency_s: float
    watchers: list[Callable[[], None]] = field(default_factory=list)  # told of what a coordinator has done
    streams: Iterator[int] = field(default_factory=lambda: itertools.count(1))  # numbers of all coordinators' streams

    def stepped(self) -> None:
        """A coordinator has done something."""
        for watch in self.watchers:
            watch()

    def connect(self) -> Connection:
        return Connection(self.clock, self.random, self.latency_s)


class Process:
    """Runs until it ends. While it is stopped nothing happens in it; what came meanwhile happens when it wakes."""

    def __init__(self) -> None:
        self.ended = self.stopped = False
        self._held: list[tuple[Callable[..., None], tuple[Any, ...]]] = []

    @property
    def running(self) -> bool:
        return not (self.ended or self.stopped)

    def here(self, action: Callable[..., None], *arguments: Any) -> Callable[..., None]:
        """The action as this process's own."""

        def act(*more: Any) -> None:
            if self.stopped:
                self._held.append((act, more))
            elif not self.ended:
                self.perform(action, *arguments, *more)

        return act

    def perform(self, action: Callable[..., None], *arguments: Any) -> None:
        action(*arguments)

    def stop(self) -> None:
        """SIGSTOP."""
        self.stopped = not self.ended

    def wake(self) -> None:
        """SIGCONT."""
        self.stopped = False
        held, self._held = self._held, []
        for act, more in held:
            act(*more)

    def end(self) -> None:
        """SIGKILL, which a stopped process heeds too."""
        self.ended, self.stopped, self._held = True, False, []
