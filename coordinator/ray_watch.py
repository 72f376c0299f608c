"""RayWatch: whether Ray can be reached, told once when that ends and once when it is so again.

In the coordinator. Streams of ranks that live need no Ray, but nothing can be started without it: the supervisor
replaces a Ray of its own, and warns of another's, for which a coordinator waits. Knows Ray as something to connect to.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from coordinator.nodes import Tell
from echelon.errors import InternalError

SILENCE_S = 30.0
PATIENCE_S = 10.0  # a Ray that has just started refuses some first attempts
RETRY_S = 1.0


class RayWatch:
    """emit takes events, tell messages for the supervisor. served: the cluster has, and is not given up for a Ray."""

    def __init__(
        self,
        address: str,
        served: bool,
        emit: Tell,
        tell: Callable[..., object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._address = address
        self._served = served
        self._emit = emit
        self._tell = tell
        self._clock = clock
        self._away = False

    async def join(self, connect: Callable[[], Awaitable[None]]) -> None:
        """Connect. Raises InternalError if that fails at a first start; later it is tried until it succeeds."""
        began_s = self._clock()
        while True:
            try:
                await connect()
                break
            except InternalError as error:
                if not self._served:
                    raise
                if self._clock() - began_s >= PATIENCE_S:
                    self._lost(error.message)
            await asyncio.sleep(RETRY_S)
        self._away |= self._served  # a predecessor may have told that it is
        self._back()

    def heard(self, silent_s: float) -> None:
        """For how long Ray has answered nothing, though asked every few seconds."""
        if silent_s >= SILENCE_S:
            self._lost(f"Ray at {self._address} has not answered for {silent_s:.0f} s")
        else:
            self._back()

    def _lost(self, reason: str) -> None:
        if not self._away:
            self._away = True
            self._emit("ray.lost", "ray", {"address": self._address, "reason": reason})
            self._tell(ray_lost=reason)

    def _back(self) -> None:
        if self._away:
            self._away = False
            self._emit("ray.joined", "ray", {"address": self._address})
            self._tell(ray_back=self._address)
