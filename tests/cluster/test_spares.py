"""Ranks that were spares: they take over under the streams, are refilled, and are never waited for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from echelon.testing import LocalCluster
from tests.cluster.conftest import Case
from tests.cluster.layouts import LAYOUTS
from tests.cluster.reference import Reference
from tests.cluster.streams import alive, assert_undisturbed, stream_through

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def case(ray_address: str, checkpoints: dict[str, Path]) -> Iterator[Case]:
    """Two ranks with a spare each."""
    directory = checkpoints[LAYOUTS["llama-2"].checkpoint]
    with LocalCluster(directory, tensor=2, spares=2, dtype="float64", ray_address=ray_address) as cluster:
        yield Case("spares", cluster, Reference(directory))


def test_spares_take_over_and_are_refilled(case: Case) -> None:
    cluster = case.cluster
    waiting = {spare.pid for spare in cluster.wait_spares(2)}
    before = cluster.ranks()
    assert_undisturbed(case, stream_through(cluster.client(), lambda: cluster.kill(1)))
    after = cluster.wait_epoch(0, before[0].epoch + 1).ranks
    assert {rank.pid for rank in after} == waiting, "nobody started cold"
    assert not any(alive(rank.pid) for rank in before)
    refilled = {spare.pid for spare in cluster.wait_spares(2)}
    assert not refilled & waiting
    kinds = [event.kind for event in cluster.events()]
    lost, ready = kinds.index("rank.lost"), kinds.index("replica.ready", kinds.index("rank.lost"))
    assert kinds[lost:ready].count("spare.started") == 2
    assert "spare.warming" not in kinds[lost:ready], "whoever was interrupted comes first"


@pytest.mark.long
def test_a_stopped_spare_is_not_waited_for(case: Case) -> None:
    cluster = case.cluster
    stopped, other = cluster.wait_spares(2)
    cluster.stop(stopped)
    assert_undisturbed(case, stream_through(cluster.client(), lambda: cluster.kill(0)))
    assert other.pid in {rank.pid for rank in cluster.ranks()}
    assert not alive(stopped.pid)


@pytest.mark.long
def test_a_killed_spare_is_replaced_and_nobody_notices(case: Case) -> None:
    cluster = case.cluster
    cluster.wait_spares(2)
    before = cluster.ranks()
    killed = cluster.kill(cluster.spares()[1])
    cluster.wait(lambda now: killed not in {spare.pid for spare in now.spares}, "the death to be told")
    assert killed not in {spare.pid for spare in cluster.wait_spares(2)}
    assert cluster.ranks() == before


@pytest.mark.long
def test_a_second_kill_while_spares_take_over(case: Case) -> None:
    """The second epoch has no spare, and starts cold."""
    cluster = case.cluster
    cluster.wait_spares(2)
    epoch = cluster.status().replicas[0].epoch

    def twice() -> None:
        cluster.kill(0)
        cluster.wait(lambda now: now.replicas[0].epoch > epoch and len(now.ranks) > 0, "the next epoch to begin")
        cluster.kill(1)

    assert_undisturbed(case, stream_through(cluster.client(), twice))
    assert cluster.status().replicas[0].epoch >= epoch + 2


@pytest.mark.long
def test_a_new_coordinator_keeps_them(case: Case) -> None:
    cluster = case.cluster
    waiting = {spare.pid for spare in cluster.wait_spares(2)}
    assert_undisturbed(case, stream_through(cluster.client(), lambda: cluster.kill("coordinator")))
    assert {spare.pid for spare in cluster.wait_spares(2)} == waiting
    assert_undisturbed(case, stream_through(cluster.client(), lambda: cluster.kill(1)))
    assert {rank.pid for rank in cluster.ranks()} == waiting
    cluster.close()
    assert not any(alive(pid) for pid in waiting)
