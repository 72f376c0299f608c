"""Reconfiguration: what open requests forbid, when a change is done, and what takes it back."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from coordinator import reconfiguration
from coordinator.assembly import Layout
from coordinator.jobs.service import JobService
from coordinator.reconfiguration import Reconfiguration, check_change
from coordinator.replica.events import Relayout
from coordinator.replica.service import ReplicaService
from coordinator.requests.core import Counts
from coordinator.service import Service
from echelon.config import CoordinatorConfig
from echelon.errors import ConfigError, InternalError
from echelon.types import JobState


def config(**values: object) -> CoordinatorConfig:
    settled: dict[str, object] = {
        "model": "/models/a", "served_model_name": "a", "device": "cpu", "dtype": "float32", "max_context": 64,
        "state_dir": "/state", "ray_address": "h:1", "internal_address": "h:2",
    }  # fmt: skip
    return CoordinatorConfig.model_validate(settled | values)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"model": "/models/b"}, "another model than a cannot be served while 2 requests and 1 jobs are open"),
        ({"served_model_name": "b"}, "another model than a"),
        ({"model_digest": "other weights in the same place"}, "another model than a"),
        ({"max_context": 63}, "max-context cannot be lowered"),
        ({"max_running": 63}, "max-running cannot be lowered"),
        ({"kv_cache_tokens": 640}, "kv-cache-tokens cannot be lowered"),
    ],
)
def test_what_open_requests_would_not_survive_is_refused(values: dict[str, object], expected: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_change(config(), config(**values), 2, 1)
    assert expected in refused.value.message
    check_change(config(), config(**values), 0, 0)


def test_other_layouts_and_larger_limits_are_for_open_requests_too() -> None:
    check_change(config(kv_cache_tokens=640), config(tensor=2, dtype="float64", max_context=65, max_running=128), 9, 9)


class World:
    """A coordinator around a Reconfiguration of two replicas."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(reconfiguration, "read_layout", self.read)
        self.told: list[dict[str, object]] = []
        self.relayouts: list[str] = []
        self.served: list[tuple[object, bool]] = []
        self.job_states = [JobState.SUCCEEDED]
        self.counts = Counts(0, 0, 0)
        self.replicas = {
            0: SimpleNamespace(serving=True, post=self.post),
            1: SimpleNamespace(serving=True, post=self.post),
        }
        service = SimpleNamespace(
            core=SimpleNamespace(counts=self.counts), serve=lambda *told: self.served.append(told)
        )
        self.reconfiguration = Reconfiguration(
            self.read(config()),
            cast(Service, service),
            cast(dict[int, ReplicaService], self.replicas),
            lambda **message: self.told.append(message),
        )

    def read(self, wanted: CoordinatorConfig) -> Layout:
        if wanted.model == Path("/damaged"):
            raise ConfigError("damaged")
        settings = SimpleNamespace(layout=f"{wanted.model} over {wanted.tensor}")
        return Layout(wanted, *cast(tuple[Any, Any, Any, Any], (None, None, settings, wanted.served_model_name)))

    def post(self, event: Relayout) -> None:
        self.relayouts.append(event.layout)
        for replica in self.replicas.values():
            replica.serving = False

    def change(self, jobs: bool = True, **values: object) -> None:
        states = self.job_states if jobs else []
        listed = SimpleNamespace(list_jobs=lambda size, token: ([SimpleNamespace(state=state) for state in states], ""))
        work: Coroutine[Any, Any, None] = self.reconfiguration.change(config(**values), cast(JobService, listed))
        asyncio.run(work)


def test_a_change_is_done_when_all_replicas_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    world.change(tensor=2)
    assert world.relayouts == ["/models/a over 2"] * 2
    assert world.served == [("a", False)]
    world.replicas[0].serving = True
    world.reconfiguration.serving()
    assert world.told == [{"reconfiguring": True}]
    world.replicas[1].serving = True
    world.reconfiguration.serving()
    assert world.told[1:] == [{"reconfigured": True}]
    assert world.reconfiguration.layout.config.tensor == 2


def test_a_change_that_cannot_be_started_is_taken_back_once(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    world.change(model="/models/b", served_model_name="b")
    assert not world.reconfiguration.take_back(ZeroDivisionError()), "a defect is none of its business"
    assert world.reconfiguration.take_back(InternalError("no room"))
    assert world.relayouts == ["/models/b over 1"] * 2 + ["/models/a over 1"] * 2
    assert world.served == [("b", True), ("a", True)]
    assert world.told == [{"reconfiguring": True}, {"not_reconfigured": "no room"}]
    assert not world.reconfiguration.take_back(InternalError("no room")), "what served before fails by itself"


def test_what_is_refused_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    world.change(model="/damaged")
    world.job_states = [JobState.CANCELLING, JobState.RUNNING]
    world.change(model="/models/b")
    assert not world.relayouts and not world.served
    assert world.told[0] == {"not_reconfigured": "damaged"}
    assert "0 requests and 2 jobs are open" in str(world.told[1]["not_reconfigured"])
    world.change(tensor=2)
    world.change(tensor=1)
    assert "still starting or changing" in str(world.told[-1]["not_reconfigured"])
