"""Early: what ranks say to a coordinator that has not joined Ray yet, which takes it seconds.

Ranks that outlive a coordinator dial its successor at once. When every rank of the layout says that it serves the
epoch that is on disk, they are adopted on their word; once Ray has been joined it turns out whether each has a node
agent, which is what could end it. Part of `coordinator/replica/core.py`; pure.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from coordinator.replica.events import Attached, Beat, Detached, Died, RankEvent

Processes = frozenset[tuple[int, str]]  # rank and incarnation


class Early:
    """Events in their order, until they are taken; heartbeats are not kept, for the next ones come soon."""

    def __init__(self) -> None:
        self._events: list[RankEvent] = []

    def add(self, event: RankEvent) -> None:
        """Keep one."""
        if not isinstance(event, Beat):
            self._events.append(event)

    def take(self) -> list[RankEvent]:
        """All of them, once."""
        taken, self._events = self._events, []
        return taken

    def all_serve(self, epoch: int, layout: str, ranks: Collection[int]) -> Processes | None:
        """The processes that are attached, if one for each rank of the layout serves the epoch; else None."""
        attached: dict[tuple[int, str], Attached] = {}
        for event in self._events:
            match event:
                case Attached():
                    attached[event.rank, event.incarnation] = event
                case Detached() | Died():
                    attached.pop((event.rank, event.incarnation), None)
        serving = [
            hello.rank
            for hello in attached.values()
            if hello.resident is not None and (hello.epoch, hello.layout) == (epoch, layout)
        ]
        return frozenset(attached) if sorted(serving) == sorted(ranks) else None


def without_agent(ranks: Mapping[int, str], agents: Processes) -> int | None:
    """A rank whose incarnation no node agent has charge of."""
    return next((rank for rank, incarnation in sorted(ranks.items()) if (rank, incarnation) not in agents), None)
