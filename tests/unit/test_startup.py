"""What `echelon serve` says of its start: how long each part of it took."""

from __future__ import annotations

import pytest

from coordinator.startup import startup_phases
from coordinator.supervisor.core import SupervisorCore
from coordinator.supervisor.events import Begin, PrepareSuccessor, RayUp, ShowReady, Told
from echelon.cli.serve import Terminal
from echelon.types import ClusterEvent

PARTS = {"config_s": 0.1, "groups_s": 0.9, "model_s": 0.5, "weights_s": 4.5, "largest_step_s": 2.0, "graphs_s": 1.0}


def event(unix_s: float, kind: str, **detail: object) -> ClusterEvent:
    return ClusterEvent(1, unix_s, kind, "x", detail)


START = [
    event(100.0, "coordinator.started"),
    event(104.0, "rank.attached"),
    event(106.0, "rank.attached"),
    event(114.0, "rank.formed", epoch=1, **PARTS | {"weights_s": 3.0}),
    event(115.5, "rank.formed", epoch=1, **PARTS, cache_s=0.3),
    event(115.7, "replica.ready"),
]


def test_parts_follow_each_other_and_the_slowest_rank_counts() -> None:
    found = startup_phases(START, 116.0)
    assert found == pytest.approx(
        {
            "processes": 6.0,
            "groups": 1.0,
            "weights": 5.0,
            "kernels": 2.0,
            "graphs": 1.0,
            "rest": 0.7,
            "first token": 0.3,
        }
    )
    assert tuple(found) == ("processes", "groups", "weights", "kernels", "graphs", "rest", "first token")
    assert sum(found.values()) == pytest.approx(16.0)


def test_who_adopts_ranks_has_started_none() -> None:
    assert startup_phases([START[0], event(101.0, "replica.adopted")], 102.0) == {}


@pytest.mark.parametrize("kind", ["coordinator.started", "rank.attached", "replica.ready"])
def test_a_start_so_long_that_the_log_has_lost_its_begin_is_ready_all_the_same(kind: str) -> None:
    """The log is bounded, and ranks that stay are not attached again."""
    assert startup_phases([event for event in START if event.kind != kind], 116.0) == {}


def test_what_came_before_the_coordinator_is_the_rest_of_all(capsys: pytest.CaptureFixture[str]) -> None:
    core = SupervisorCore(owns_ray=True, drain_timeout_s=30.0)
    core.step(1000.0, Begin())
    core.step(1003.0, RayUp())
    shown, prepare = core.step(1020.0, Told({"ready": "h:1", "phases": startup_phases(START, 116.0)}))
    assert isinstance(shown, ShowReady) and prepare == PrepareSuccessor()
    assert shown.took_s["Ray and coordinator"] == pytest.approx(4.0)
    Terminal().ready(shown.address, dict(shown.took_s) | {"graphs": 0.01})
    told = capsys.readouterr()
    assert told.out == "echelon: ready h:1\n"
    assert told.err == (
        "echelon: started in 19.0 s: Ray and coordinator 4.0 s, processes 6.0 s, groups 1.0 s, weights 5.0 s, "
        "kernels 2.0 s, rest 0.7 s, first token 0.3 s\n"
    )


@pytest.mark.parametrize("phases", [None, {}])
def test_a_start_of_which_nothing_is_told_is_ready_all_the_same(
    phases: object, capsys: pytest.CaptureFixture[str]
) -> None:
    core = SupervisorCore(owns_ray=False, drain_timeout_s=30.0)
    core.step(0.0, Begin())
    (shown, _) = core.step(1.0, Told({"ready": "h:1", "phases": phases}))
    assert shown == ShowReady("h:1")
    Terminal().ready("h:1", {})
    assert capsys.readouterr() == ("echelon: ready h:1\n", "")
