"""Where a simulated coordinator dies within a step: between two effects, before a delivery, in the middle of a write.

A coordinator asks at each such place. Strikes arm one of them, or set how often any of them kills.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random


class Crash(Exception):
    """The coordinator dies here."""


KILLED_BETWEEN_EFFECTS = "coordinator killed between effects"
KILLED_BEFORE_DELIVERY = "coordinator killed between journal and delivery"
KILLED_IN_A_WRITE = "coordinator killed in a write"


class Crashes:
    """Where coordinators die within a step: now and then, and where it is meant to be next.

    told: of each that happens.
    """

    def __init__(self, random: Random) -> None:
        self.rate = 0.0
        self.told: Callable[[str], None] = lambda place: None
        self._random = random
        self._place = ""
        self._places = 0

    def arm(self, place: str) -> None:
        """At one of the next such places."""
        self._place, self._places = place, self._random.choice((1, 1, 1, 3))

    def disarm(self) -> None:
        self.rate, self._place = 0.0, ""

    def at(self, place: str) -> bool:
        """Whether it dies in this place."""
        self._places -= place == self._place
        dies = (place == self._place and self._places <= 0) or self._random.random() < self.rate
        if dies:
            self._place = ""
            self.told(place)
        return dies
