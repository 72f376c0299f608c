"""Cluster.connect to a Ray that takes connections and answers nothing: an error in time, and no other attempt."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

import pytest
import ray

from coordinator import cluster as cluster_module
from coordinator.cluster import Cluster
from echelon.errors import InternalError


class SlowRay:
    """Joined once `joins` is set, with an error if there is one; tells its nodes once `tells` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.joins, self.tells = threading.Event(), threading.Event()
        self.error: Exception | None = None
        self.calls: list[str] = []
        self._joined = False
        monkeypatch.setattr(cluster_module, "JOIN_TIMEOUT_S", 0.05)
        monkeypatch.setattr(cluster_module, "reach_ray", lambda address: "10.0.0.1")
        for name in ("init", "nodes", "shutdown"):
            monkeypatch.setattr(ray, name, getattr(self, name))
        monkeypatch.setattr(ray, "is_initialized", lambda: self._joined)

    def init(self, **settings: object) -> None:
        self.calls.append("init")
        assert self.joins.wait(30.0)
        if self.error:
            raise self.error
        self._joined = True

    def nodes(self) -> list[dict[str, object]]:
        self.calls.append("nodes")
        assert self.tells.wait(30.0)
        return []

    def shutdown(self) -> None:
        self.calls.append("shutdown")
        self._joined = False


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 20.0))


def test_a_ray_that_hangs_is_told_in_time_and_joined_once_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = SlowRay(monkeypatch)

    async def work() -> None:
        cluster = Cluster(("c", 1), "h:1", 30.0)
        for _ in range(2):
            with pytest.raises(InternalError, match="Ray at h:1 does not answer within"):
                await cluster.connect()
        assert slow.calls == ["init"], "one attempt hangs, and no other is begun beside it"
        slow.joins.set()
        with pytest.raises(InternalError, match="does not answer within"):
            while True:
                await cluster.connect()
        slow.tells.set()
        monkeypatch.setattr(cluster_module, "JOIN_TIMEOUT_S", 10.0)
        await cluster.connect()
        assert slow.calls.count("init") == 1 and "shutdown" not in slow.calls
        await cluster.disconnect()

    run(work())


def test_an_attempt_that_fails_late_is_followed_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = SlowRay(monkeypatch)
    slow.tells.set()

    async def work() -> None:
        cluster = Cluster(("c", 1), "h:1", 30.0)
        with pytest.raises(InternalError, match="does not answer"):
            await cluster.connect()
        slow.error = ConnectionError("nobody there")
        slow.joins.set()
        monkeypatch.setattr(cluster_module, "JOIN_TIMEOUT_S", 10.0)
        with pytest.raises(InternalError, match="Ray at h:1 cannot be used: nobody there"):
            await cluster.connect()
        slow.error = None
        await cluster.connect()
        assert slow.calls == ["init", "shutdown", "init", "nodes"]
        await cluster.disconnect()

    run(work())
