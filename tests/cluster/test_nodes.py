"""Nodes that die like machines, and Ray itself: streams go on elsewhere, or wait for room, and lose nothing."""

from __future__ import annotations

import os
import random
import re
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from coordinator.supervisor.ray_head import RayHead
from echelon.chaos import victims
from echelon.internal.local_nodes import Node
from echelon.internal.processes import descendants, kill_all, session_members
from echelon.testing import LocalCluster
from echelon.types import ClusterEvent
from tests.cluster.conftest import Case, start_ray
from tests.cluster.reference import Reference
from tests.cluster.streams import alive, assert_undisturbed, stream_through
from tests.tiny import make_checkpoint

pytestmark = [pytest.mark.cluster, pytest.mark.long]

SLOW_S = 120.0  # for what takes ten on a machine with nothing else to do


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("nodes") / "model")


@contextmanager
def serving(model: Path, **flags: object) -> Iterator[Case]:
    with start(model, flags) as cluster:
        yield Case("nodes", cluster, Reference(model))


def start(model: Path, flags: Mapping[str, Any], tries: int = 3) -> LocalCluster:
    """On a machine that is busy with other things Ray may not be up in time at the first try."""
    try:
        return LocalCluster(model, pipeline=2, dtype="float64", **flags)
    except RuntimeError as error:
        if tries == 1 or "Ray does not start" not in str(error):
            raise
        return start(model, flags, tries - 1)


@pytest.fixture(scope="module")
def case(model: Path) -> Iterator[Case]:
    """Two stages, and two nodes beside Ray's head that have room for both."""
    with serving(model, nodes=(0, 2, 2)) as case:
        yield case


def node_of(cluster: LocalCluster, rank: int) -> Node:
    node_id = cluster.ranks()[rank].node_id
    return next(node for node in cluster.nodes() if node.node_id == node_id)


def head_of(cluster: LocalCluster) -> Node:
    return next(node for node in cluster.nodes() if node.head and node.state == "alive")


def running_on(node: Node) -> set[int]:
    """The pids of all that runs there, the raylet's too."""
    return {node.raylet_pid, *(process.pid for process in descendants(node.raylet_pid))}


def of_kind(cluster: LocalCluster, kind: str) -> list[ClusterEvent]:
    return [event for event in cluster.events() if event.kind == kind]


def gcs_of(cluster: LocalCluster) -> int:
    return victims.find("gcs", cluster.status(), random.Random(0)).pids[0]


def until(condition: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + SLOW_S
    while not condition():
        assert time.monotonic() < deadline_s, f"waited for {what}"
        time.sleep(0.1)


def two_can_be_placed(cluster: LocalCluster) -> bool:
    joined = {event.subject for event in of_kind(cluster, "node.joined")}
    return sum(f"node/{node.node_id}" in joined for node in cluster.nodes() if node.state == "alive") >= 3


def test_an_agent_that_dies_alone_takes_its_ranks_along_and_another_comes(case: Case) -> None:
    cluster, before = case.cluster, case.cluster.status()
    until(lambda: two_can_be_placed(cluster), "both nodes")
    victim = node_of(cluster, 0)
    assert_undisturbed(case, stream_through(cluster.client(), lambda: os.kill(victim.agent_pid, signal.SIGKILL)))
    after = cluster.status()
    assert after.ranks[0].epoch > before.ranks[0].epoch
    assert not any(alive(rank.pid) for rank in before.ranks)
    assert alive(victim.raylet_pid)
    node = f"node/{victim.node_id}"
    until(lambda: [event.subject for event in of_kind(cluster, "node.joined")].count(node) == 2, "its next agent")
    assert [event.subject for event in of_kind(cluster, "node.lost")] == [node]


def test_the_node_of_the_leader_dies(case: Case) -> None:
    cluster, before = case.cluster, case.cluster.status()
    until(lambda: two_can_be_placed(cluster), "both nodes")
    victim = node_of(cluster, 0)
    assert not victim.head and victim.agent_pid, "the head has no room for ranks"
    pids = running_on(victim)
    assert {before.ranks[0].pid, victim.agent_pid} < pids
    assert_undisturbed(case, stream_through(cluster.client(), lambda: cluster.kill(victim)))
    after = cluster.status()
    assert not any(map(alive, pids))
    assert (after.term, after.coordinator_pid) == (before.term, before.coordinator_pid)
    assert {rank.epoch for rank in after.ranks} == {before.ranks[0].epoch + 1}
    assert victim.node_id not in {rank.node_id for rank in after.ranks}
    assert of_kind(cluster, "node.lost")[-1].subject == f"node/{victim.node_id}"
    assert {node.node_id: node.state for node in cluster.nodes()}[victim.node_id] == "dead"


def test_without_a_node_that_has_room_streams_wait_for_one(case: Case) -> None:
    cluster, before = case.cluster, case.cluster.status()
    last = {node.node_id: node for node in cluster.nodes()}
    struck = [last[node_id] for node_id in {rank.node_id for rank in before.ranks}]
    others = [node for node in cluster.nodes() if node.state == "alive" and not node.head and node not in struck]

    def fault() -> None:
        for victim in (*others, *struck):
            cluster.kill(victim)
        cluster.wait(lambda now: "no room" in now.replicas[0].reason, "the replica to say that it waits", SLOW_S)
        (told,) = [event for event in of_kind(cluster, "rank.no_room") if event.subject == "rank/0/0"]
        assert "it needs 1 CPU" in str(told.detail["reason"])
        cluster.add_node(2)

    assert_undisturbed(case, stream_through(cluster.client(), fault))
    after = cluster.status()
    assert after.ranks[0].epoch > before.ranks[0].epoch
    assert not any(alive(rank.pid) for rank in before.ranks)
    assert not {rank.node_id for rank in after.ranks} & {victim.node_id for victim in struck}


def assert_ray_is_replaced(case: Case, fault: Callable[[], object]) -> None:
    cluster, before = case.cluster, case.cluster.status()
    gcs_pid, everyone = gcs_of(cluster), running_on(head_of(cluster))
    assert_undisturbed(case, stream_through(cluster.client(), fault))
    after = cluster.wait_epoch(0, before.ranks[0].epoch + 1, SLOW_S)  # ranks may have gone on until Ray was back
    assert after.term == before.term + 1, cluster.log_tail()
    assert not any(alive(pid) for pid in (*everyone, gcs_pid, *(rank.pid for rank in before.ranks)))
    assert gcs_of(cluster) != gcs_pid


def test_the_raylet_of_the_head_dies(case: Case) -> None:
    """Its end takes the rest of Ray along, so which of them is named depends on when it is looked at."""
    cluster = case.cluster
    assert_ray_is_replaced(case, lambda: os.kill(head_of(cluster).raylet_pid, signal.SIGKILL))
    assert re.search("Ray('s [a-z_]+)? has ended", cluster.log_path.read_text())


def test_the_gcs_dies(case: Case) -> None:
    assert_ray_is_replaced(case, lambda: case.cluster.kill("gcs"))
    assert "Ray's gcs_server has ended" in case.cluster.log_path.read_text()


def test_the_node_of_one_stage_dies_and_a_third_takes_its_place(model: Path) -> None:
    with serving(model, nodes=(1, 1, 1)) as case:
        cluster, before = case.cluster, case.cluster.status()
        until(lambda: two_can_be_placed(cluster), "all nodes")
        places = [node_of(cluster, rank) for rank in (0, 1)]
        assert places[0] != places[1]
        victim = next(node for node in places if not node.head)
        assert_undisturbed(case, stream_through(cluster.client(), lambda: cluster.kill(victim)))
        after = cluster.status()
        (kept,) = {node.node_id for node in places} - {victim.node_id}
        assert kept in {rank.node_id for rank in after.ranks}, "a slot on a good node stays where it is"
        assert victim.node_id not in {rank.node_id for rank in after.ranks}
        assert not any(alive(rank.pid) for rank in before.ranks), "an epoch begins anew as a whole"


def test_a_node_that_cannot_be_reached_is_fenced_by_its_lease(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray gives it up while its raylet is stopped; agent and ranks live, and nobody can tell them anything."""
    monkeypatch.setenv("RAY_health_check_timeout_ms", "2000")  # by default 10 s, five times
    with serving(model, nodes=(0, 2, 2), lease_s=10) as case:
        cluster, before = case.cluster, case.cluster.status()
        until(lambda: two_can_be_placed(cluster), "both nodes")
        victim = node_of(cluster, 0)
        there = [rank for rank in before.ranks if rank.node_id == victim.node_id]
        raylet_pid = cluster.stop(victim)
        try:
            until(lambda: bool(of_kind(cluster, "node.lost")), "the node to be lost")
            until(lambda: not any(alive(rank.pid) for rank in there), "the lease to end its ranks")
            assert "\nState:\tT" in Path(f"/proc/{raylet_pid}/status").read_text(), "Ray has not ended them"
            cluster.wait_epoch(0, before.ranks[0].epoch + 1, SLOW_S)
            assert victim.node_id not in {rank.node_id for rank in cluster.ranks()}
            assert_undisturbed(case, stream_through(cluster.client(), lambda: None))
        finally:
            cluster.resume(raylet_pid)


@pytest.fixture
def short_path() -> Iterator[Path]:
    """Ray makes UNIX sockets far below it."""
    with tempfile.TemporaryDirectory(prefix="echelon-ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def test_a_ray_of_another_that_dies_is_waited_for(model: Path, short_path: Path) -> None:
    """Requests and journal are kept meanwhile; what is wrong is told once, and that it is over."""
    head, address = start_ray(short_path)
    try:
        with serving(model, ray_address=address) as case:
            cluster, before = case.cluster, case.cluster.status()

            def warnings() -> list[str]:
                lines = cluster.log_path.read_text().splitlines()
                return [line for line in lines if line.startswith(f"echelon: Ray at {address}")]

            def fault() -> None:
                _kill(head)
                until(lambda: bool(warnings()), "a warning")
                head.start(dict(os.environ))
                until(head.is_up, "Ray")

            assert_undisturbed(case, stream_through(cluster.client(), fault))
            assert not any(alive(rank.pid) for rank in before.ranks)
            assert len(warnings()) == 2 and warnings()[1].endswith("is back")
            assert of_kind(cluster, "ray.joined")
    finally:
        head.stop()


def _kill(head: RayHead) -> None:
    kill_all(session_members(head.pid))
    head.stop()
