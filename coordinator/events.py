"""The coordinator's event log: every decision and observation, in order, for `echelon events` and the tests.

Lives in the coordinator process; bounded. Sequences rise across restarts because the term is their upper half.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Mapping

import structlog

from echelon.types import ClusterEvent

KEPT_EVENTS = 10_000
TERM_SHIFT = 32

log = structlog.get_logger("event")


class EventLog:
    """Append-only within one term. `emit` also writes a log line, so that the log and the stream agree."""

    def __init__(self, term: int) -> None:
        self._next = (term << TERM_SHIFT) + 1
        self._events: deque[ClusterEvent] = deque(maxlen=KEPT_EVENTS)
        self._grown = asyncio.Event()

    def __iter__(self) -> Iterator[ClusterEvent]:
        return iter(tuple(self._events))

    def __len__(self) -> int:
        return len(self._events)

    def emit(self, kind: str, subject: str, detail: Mapping[str, object] | None = None) -> None:
        """Record one event and wake the watchers."""
        self._events.append(ClusterEvent(self._next, time.time(), kind, subject, dict(detail or {})))
        self._next += 1
        log.info(kind, subject=subject, **dict(detail or {}))
        self._grown.set()
        self._grown = asyncio.Event()

    async def watch(self, after_sequence: int, follow: bool) -> AsyncGenerator[ClusterEvent]:
        """Kept events after the sequence, then, if asked to follow, new ones without end."""
        while True:
            grown = self._grown
            for event in list(self._events):
                if event.sequence > after_sequence:
                    after_sequence = event.sequence
                    yield event
            if not follow:
                return
            await grown.wait()
