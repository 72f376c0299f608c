"""When the cluster says that it serves: once a replica that serves has drawn a token in its epoch.

On the coordinator's loop, between the replicas, the core that hears of tokens, and health. Knows no gRPC.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from coordinator.replica.service import ReplicaService

READY_ANYWAY_S = 10.0  # a cluster that has started and draws no token is to be looked at, not waited for


class Serving:
    """tell: whether any replica serves and has shown it, as often as that changes. ready: all have, the first time."""

    def __init__(
        self,
        replicas: Callable[[], Mapping[int, ReplicaService]],
        tell: Callable[[bool], None],
        ready: Callable[[], None],
    ) -> None:
        self._replicas = replicas
        self._tell = tell
        self._ready = ready
        self._proven: dict[int, int] = {}  # by replica, the epoch in which it has drawn a token
        self._told = False
        self._closed = False
        self._started: asyncio.TimerHandle | None = None

    def proven(self, replica: int, epoch: int, yes: bool) -> None:
        """A replica has drawn a token in this epoch, or could not any more."""
        if yes:
            self._proven[replica] = epoch
        else:
            self._proven.pop(replica, None)
        self.look()

    def started(self) -> None:
        """All replicas have come up, the first time."""
        self._started = asyncio.get_running_loop().call_later(READY_ANYWAY_S, self._end_start)
        self.look()

    def close(self) -> None:
        """From now on it does not serve, whatever happens."""
        self._closed = True
        self.look()

    def look(self) -> None:
        """Tell what has changed."""
        fences = {index: replica.serving for index, replica in self._replicas().items()}
        shown = [index for index, fence in fences.items() if fence and self._proven.get(index) == fence.epoch]
        serves = bool(shown) and not self._closed
        if serves != self._told:
            self._told = serves
            self._tell(serves)
        if len(shown) == len(fences):
            self._end_start()

    def _end_start(self) -> None:
        if self._started is not None:
            self._started.cancel()
            self._started = None
            self._ready()
