"""RayWatch: a Ray that is away is told of once, waited for if the cluster has served, and told of once more."""

from __future__ import annotations

import asyncio

import pytest

from coordinator import ray_watch
from coordinator.ray_watch import PATIENCE_S, SILENCE_S, RayWatch
from echelon.errors import InternalError


class Ears:
    """What is told, and a Ray that refuses so often."""

    def __init__(self, served: bool, refusals: int = 0) -> None:
        self.events: list[str] = []
        self.told: list[dict[str, object]] = []
        self.refusals = refusals
        self.now = 0.0
        self.watch = RayWatch(
            "h:6379",
            served,
            lambda kind, subject, detail: self.events.append(kind),
            lambda **message: self.told.append(message),
            lambda: self.now,
        )

    async def connect(self) -> None:
        if self.refusals:
            self.refusals -= 1
            self.now += PATIENCE_S / 2
            raise InternalError("Ray is away")

    def join(self) -> None:
        asyncio.run(asyncio.wait_for(self.watch.join(self.connect), 10.0))


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_watch, "RETRY_S", 0.001)


def test_a_first_start_fails_with_its_ray() -> None:
    ears = Ears(served=False, refusals=1)
    with pytest.raises(InternalError, match="Ray is away"):
        ears.join()
    assert (ears.events, ears.told) == ([], [])
    ears.join()
    assert (ears.events, ears.told) == ([], []), "nothing was away"


def test_a_cluster_that_has_served_waits_for_its_ray() -> None:
    ears = Ears(served=True, refusals=3)
    ears.join()
    assert ears.events == ["ray.lost", "ray.joined"]
    assert ears.told == [{"ray_lost": "Ray is away"}, {"ray_back": "h:6379"}]


def test_one_attempt_that_fails_takes_no_ray_away() -> None:
    """A Ray of the supervisor's own would be started anew for it."""
    ears = Ears(served=True, refusals=1)
    ears.join()
    assert ears.told == [{"ray_back": "h:6379"}] and "ray.lost" not in ears.events


def test_what_a_predecessor_has_told_is_taken_back() -> None:
    ears = Ears(served=True)
    ears.join()
    assert ears.told == [{"ray_back": "h:6379"}]


def test_silence_is_told_once_and_its_end_too() -> None:
    ears = Ears(served=False)
    ears.watch.heard(SILENCE_S - 1)
    assert not ears.told
    ears.watch.heard(SILENCE_S)
    ears.watch.heard(SILENCE_S + 5)
    assert ears.told == [{"ray_lost": "Ray at h:6379 has not answered for 30 s"}]
    ears.watch.heard(0.1)
    ears.watch.heard(0.1)
    assert ears.events == ["ray.lost", "ray.joined"]
