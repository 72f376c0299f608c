"""Who waits for a replica, in order: lower priority first, then who came first.

Part of the coordinator's core; pure. A request that a fault sends back takes its old place, ahead of all that came
after it.
"""

from __future__ import annotations

import heapq

from coordinator.requests.life import Life

SLACK = 64


class Waiting:
    """A queue from whose middle requests may leave. prompt_tokens: of all that wait."""

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self._lives: dict[str, Life] = {}
        self._heap: list[tuple[int, int, str]] = []  # those that left are found out when they come up

    def __len__(self) -> int:
        """Places held, those of requests that left included."""
        return len(self._heap)

    @property
    def first(self) -> Life | None:
        while self._heap:
            life = self._lives.get(self._heap[0][2])
            if life and _place(life) == self._heap[0]:
                return life
            heapq.heappop(self._heap)
        return None

    def add(self, life: Life) -> None:
        assert life.request_id not in self._lives, f"{life.request_id} waits already"
        self._lives[life.request_id] = life
        self.prompt_tokens += len(life.entry.request.prompt)
        heapq.heappush(self._heap, _place(life))
        if len(self._heap) > 2 * len(self._lives) + SLACK:  # behind one that waits long, many may come and leave
            self._heap = [_place(each) for each in self._lives.values()]
            heapq.heapify(self._heap)

    def discard(self, life: Life) -> None:
        if self._lives.pop(life.request_id, None):
            self.prompt_tokens -= len(life.entry.request.prompt)


def _place(life: Life) -> tuple[int, int, str]:
    return life.entry.request.priority, life.arrival, life.request_id
