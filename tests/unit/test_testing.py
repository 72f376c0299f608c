"""LocalCluster's victims: ranks by number, counted as the mesh does, and a node with all that runs under it."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from echelon import testing
from echelon.internal.local_nodes import Node
from echelon.testing import LocalCluster, rank_of
from echelon.types import Rank
from parallel.degrees import Degrees, Place

DEGREES = Degrees(replicas=2, pipeline=3, data=2, tensor=2)


def rank(replica: int, place: Place) -> Rank:
    return Rank(
        replica=replica,
        pipeline=place.pipeline_rank,
        data=place.data_rank,
        tensor=place.tensor_rank,
        expert=place.expert_rank,
        leader=place.rank == 0,
        pid=1000 * replica + place.rank,
        node_id="node",
        epoch=1,
        state="ready",
    )


RANKS = [
    rank(replica, DEGREES.place(number))
    for replica in range(DEGREES.replicas)
    for number in range(DEGREES.replica_ranks)
]


def test_a_victim_s_number_is_its_number_in_the_mesh() -> None:
    shown = random.Random(0).sample(RANKS, len(RANKS))
    for number in range(DEGREES.replica_ranks):
        assert rank_of(shown, number).pid == number
        assert rank_of(shown, number, replica=1).pid == 1000 + number


@pytest.mark.parametrize("number", [-1, 12])
def test_a_number_that_no_rank_has_is_refused(number: int) -> None:
    with pytest.raises(IndexError, match=f"replica 0 has no rank {number}: its ranks are 0 to 11"):
        rank_of(RANKS, number)


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    started = [subprocess.Popen(["sleep", "60"]) for _ in range(3)]
    yield started
    for process in started:
        process.kill()
        process.wait()


def test_what_has_ended_with_its_node_is_not_missed(
    processes: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon's workers end when it does, before they can be struck; a victim that is gone itself is told."""
    cluster = LocalCluster.__new__(LocalCluster)
    pids = tuple(process.pid for process in processes)
    monkeypatch.setattr(LocalCluster, "status", lambda self: None)
    monkeypatch.setattr(LocalCluster, "_pids_of", lambda self, victim, look: pids)
    processes[1].kill()
    processes[1].wait()
    assert cluster.kill("node") == pids[0]
    assert [process.wait() for process in processes] == [-9] * 3
    with pytest.raises(ProcessLookupError):
        cluster.kill("node")


def test_a_node_that_is_to_die_at_a_moment_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[object] = []
    node = Node("id", "127.0.0.2", "alive", False, 7, 8)
    cluster = LocalCluster.__new__(LocalCluster)
    monkeypatch.setattr(cluster, "_nodes", SimpleNamespace(kill=done.append), raising=False)
    monkeypatch.setattr(LocalCluster, "status", lambda self: None)
    monkeypatch.setattr(testing, "wait_for", lambda when, *_: done.append(when))
    assert cluster.kill(node, when="replay") == 7
    assert cluster.kill(node) == 7
    assert done == ["replay", node, node]
