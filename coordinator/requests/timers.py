"""When to look at which request: a queue of times, from which requests may vanish.

Part of the coordinator's core; pure. Its size is that of what is remembered: a request that has ended in a second must
not lie here until the deadline that it had, a day later. Knows requests by id alone.
"""

from __future__ import annotations

import heapq

SLACK = 64


class Timers:
    """One time a request, its earliest: looking too early does no harm."""

    def __init__(self) -> None:
        self._earliest: dict[str, float] = {}
        self._heap: list[tuple[float, str]] = []  # times that count no more are found out when they come up

    def __len__(self) -> int:
        """Times held, those that count no more included."""
        return len(self._heap)

    def look_at(self, request_id: str, unix_s: float) -> None:
        """At this time, unless an earlier one is set."""
        if unix_s < self._earliest.get(request_id, float("inf")):
            self._earliest[request_id] = unix_s
            heapq.heappush(self._heap, (unix_s, request_id))
            if len(self._heap) > 2 * len(self._earliest) + SLACK:
                self._heap = [(when, each) for each, when in self._earliest.items()]
                heapq.heapify(self._heap)

    def discard(self, request_id: str) -> None:
        """It is forgotten."""
        self._earliest.pop(request_id, None)

    def take_due(self, now: float) -> str | None:
        """A request whose time has come, once."""
        while self._heap and self._heap[0][0] <= now:
            unix_s, request_id = heapq.heappop(self._heap)
            if self._earliest.get(request_id) == unix_s:
                del self._earliest[request_id]
                return request_id
        return None
