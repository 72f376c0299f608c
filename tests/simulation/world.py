"""What all simulated processes share."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

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

    def connect(self) -> Connection:
        return Connection(self.clock, self.random, self.latency_s)
