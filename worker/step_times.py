"""StepTimes: of which kind the steps are that a rank runs, and how long one of that kind has taken of late.

In every rank process; what its heartbeats say, from which the coordinator judges how long a step may stand still. A
kind is the mode and the bucket of tokens, the same on every rank of a data rank. Knows no device: a step takes from
its plan, or from the end of the step before it, until its result is there.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from worker.plan import PlanTables

# Of the slowest of a kind, so much is left after each step: an outlier counts for about a hundred steps more, as it
# would in their 99th percentile.
KEPT = 0.99


class StepTimes:
    """begin and end are called from the threads that run steps, `current` from the loop. clock: seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._running: deque[tuple[str, float]] = deque()  # kind, when its plan came
        self._ended_s = 0.0
        self._slowest: dict[str, float] = {}

    def begin(self, tables: PlanTables) -> None:
        """The plan of the next step has come."""
        with self._lock:
            self._running.append((kind_of(tables), self._clock()))

    def end(self) -> None:
        """The oldest step has its result. The first of a kind only warms up: it says nothing of those to come."""
        with self._lock:
            kind, begun_s = self._running.popleft()
            now = self._clock()
            took_s, self._ended_s = now - max(begun_s, self._ended_s), now
            if kind in self._slowest:
                self._slowest[kind] = max(took_s, KEPT * self._slowest[kind])
            elif kind:
                self._slowest[kind] = 0.0

    def current(self) -> tuple[str, float]:
        """Kind of the oldest step that runs, and the slowest of that kind in seconds, 0 if none has been measured."""
        with self._lock:
            kind = self._running[0][0] if self._running else ""
            return kind, self._slowest.get(kind, 0.0)


def kind_of(tables: PlanTables) -> str:
    """Mode, and the tokens of the busiest data rank rounded up to a power of two.

    Empty for a step like no other, which begins with a grammar to compile.
    """
    if any(rules.grammar for rules in tables.rules):
        return ""
    decodes = bool((tables.rows[:, 3] < 0).all()) and all(lane.decodes for lane in tables.lanes)
    tokens = max((int(tables.rows[:, 2].sum()), *(lane.tokens for lane in tables.lanes)))
    bucket = 1 << max(tokens - 1, 0).bit_length()
    moves = ", experts move" if tables.rebalances else ""
    captures = ", a graph is captured" if tables.captures else ""
    return f"{'decode' if decodes else 'prefill'} of {bucket} tokens{moves}{captures}"
