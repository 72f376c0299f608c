"""All replicas of a coordinator: who of them serves, when the start is over, one loading bar over all their ranks.

On the coordinator's loop, between its process and one ReplicaService each, which lives and recovers by itself. While
one replica serves, the cluster does; it is ready once all have served. Knows no Ray and no gRPC.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from coordinator.replica.events import Acquitted, Died, Started, StartEnded
from coordinator.replica.service import Callbacks, ReplicaService
from coordinator.service import Service
from echelon.types import Rank, Replica


@dataclass(frozen=True, kw_only=True, slots=True)
class Edges:
    """What the coordinator's process does about its replicas. serving: how many do; ready: all do, the first time."""

    persist_epoch: Callable[[int, int], None]
    loading: Callable[[int, int], None]
    serving: Callable[[int], None]
    ready: Callable[[], None]
    fail: Callable[[Exception], None]


class Replicas:
    """`make` builds the service of one replica, by its index, around these callbacks."""

    def __init__(
        self, count: int, make: Callable[[int, Callbacks], ReplicaService], service: Service, edges: Edges
    ) -> None:
        self._service = service
        self._edges = edges
        self._ready = False
        self._all_since_s: float | None = None  # monotonic
        self._loading: dict[int, tuple[int, int]] = {}  # loaded and total bytes, of those that load or have just done
        self._services = {index: make(index, self._callbacks(index)) for index in range(count)}
        service.metrics.replicas.set(count)
        service.on_quarantined(lambda replica: self._services[replica].post(Acquitted()))

    @property
    def services(self) -> Mapping[int, ReplicaService]:
        """By index, for what ranks and leaders dial."""
        return self._services

    @property
    def serving(self) -> int:
        """How many serve now."""
        return sum(each.serving is not None for each in self._services.values())

    @property
    def all_serving_s(self) -> float | None:
        """For how long all of them have served, None while one does not."""
        return None if self._all_since_s is None else time.monotonic() - self._all_since_s

    async def run(self) -> None:
        """Keep them going. What serves is adopted at once."""
        await asyncio.gather(*(each.run() for each in self._services.values()))

    def joined(self, survivors: Sequence[frozenset[tuple[int, str]]]) -> None:
        """Ray can be used: start each, with what lives of it."""
        for index, each in self._services.items():
            each.post(Started(survivors[index]))

    def died(self, replica: int, rank: int, incarnation: str) -> None:
        """A node's agent saw a process end."""
        if service := self._services.get(replica):
            service.post(Died(rank, incarnation))

    def close(self) -> None:
        """They take no more events."""
        for each in self._services.values():
            each.close()

    def describe(self) -> tuple[Replica, ...]:
        """Each of them, at this moment."""
        return tuple(self._describe(index, each) for index, each in self._services.items())

    def ranks(self) -> tuple[Rank, ...]:
        """The processes that have attached."""
        return tuple(rank for each in self._services.values() for rank in each.core.ranks())

    def _describe(self, index: int, replica: ReplicaService) -> Replica:
        core, engine = replica.core, self._service.engine(index)
        return Replica(
            index=index,
            epoch=core.fence.epoch,
            state=core.state.value,
            reason=core.reason,
            kv_blocks_total=engine.kv_blocks or core.kv_blocks,
            kv_blocks_referenced=engine.stats.blocks_referenced,
            step=engine.stats.step,
            counters={**engine.stats.counters, "affinity_hits": self._service.core.affinity_hits(index)},
        )

    def _callbacks(self, index: int) -> Callbacks:
        return Callbacks(
            persist_epoch=lambda epoch: self._edges.persist_epoch(index, epoch),
            loading=lambda loaded, total: self._on_loading(index, loaded, total),
            serving=lambda serving: self._on_serving(index, serving),
            fail=self._edges.fail,
        )

    def _on_loading(self, index: int, loaded_bytes: int, total_bytes: int) -> None:
        """One bar, once the size of all that do not serve is known."""
        self._loading[index] = loaded_bytes, total_bytes
        if all(each.serving or other in self._loading for other, each in self._services.items()):
            loaded, total = zip(*self._loading.values(), strict=True)
            self._edges.loading(sum(loaded), sum(total))

    def _on_serving(self, index: int, serving: bool) -> None:
        count, of = self.serving, len(self._services)
        self._service.metrics.replicas_serving.set(count)
        self._service.events.emit("replicas.serving", "coordinator", {"serving": count, "of": of})
        self._edges.serving(count)
        if not serving:
            self._loading.pop(index, None)
        if serving and (count == of or self._services[index].core.adopted):
            self._end_start()
        self._all_since_s = time.monotonic() if count == of else None
        if count == of:
            self._loading.clear()
            if not self._ready:
                self._ready = True
                self._edges.ready()

    def _end_start(self) -> None:
        """All have come up, or one serves on from an earlier coordinator: no failure of another may end it now."""
        for each in self._services.values():
            each.post(StartEnded())
