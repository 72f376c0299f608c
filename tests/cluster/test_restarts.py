"""What is killed, stopped, full or replaced in the middle of work: nothing is lost, doubled, stuck or left behind."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from echelon import Client, DeadlineError, OverloadedError
from echelon.jobs import Job
from echelon.retry import RetryPolicy
from echelon.testing import LocalCluster
from echelon.types import JobState
from tests.cluster.conftest import Case, free_ports
from tests.cluster.reference import Reference
from tests.cluster.streams import GREEDY, PROMPT, alive, assert_undisturbed, no_writing, stream_through
from tests.tiny import make_checkpoint

pytestmark = pytest.mark.cluster

ITEMS = 60


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("restarts") / "model")


@pytest.fixture(scope="module")
def case(model: Path, ray_address: str) -> Iterator[Case]:
    with LocalCluster(model, tensor=2, dtype="float64", ray_address=ray_address) as cluster:
        yield Case("restarts", cluster, Reference(model))


def kinds(cluster: LocalCluster) -> list[str]:
    return [event.kind for event in cluster.events()]


def journal_health(cluster: LocalCluster) -> int:
    """What a load balancer is told."""
    with grpc.insecure_channel(cluster.target) as channel:
        request = health_pb2.HealthCheckRequest(service="journal")
        return int(health_pb2_grpc.HealthStub(channel).Check(request, timeout=10).status)


# Quick ones first: they share one start.


def test_a_stopped_rank_is_replaced_in_mid_stream(case: Case) -> None:
    """It neither ends nor says anything, and whoever waits for it in a collective does not either."""
    cluster, before = case.cluster, case.cluster.ranks()
    assert_undisturbed(case, stream_through(cluster.client(), lambda: cluster.stop(1)))
    after = cluster.wait_epoch(0, before[0].epoch + 1).ranks
    assert {rank.epoch for rank in after} == {before[0].epoch + 1}
    assert not any(alive(rank.pid) for rank in before), "a stopped rank is killed, not waited for"
    lost = [event for event in cluster.events() if event.kind == "rank.lost"]
    assert "silent" in str(lost[-1].detail["reason"])


def test_a_deadline_ends_a_stream_while_no_replica_is_up(case: Case) -> None:
    cluster = case.cluster
    epoch = cluster.ranks()[0].epoch
    cluster.kill(0)
    with pytest.raises(DeadlineError):
        list(cluster.client().stream(PROMPT, sampling=GREEDY, timeout_s=2.0))
    status = cluster.status()
    assert status.replicas[0].state != "ready", "no replica was up all the time"
    status = cluster.wait_epoch(0, epoch + 1)
    assert status.queued + status.running + status.parked == 0, "the request has ended, not only its call"


def test_a_full_disk_stops_no_stream_and_lets_none_begin(case: Case) -> None:
    cluster = case.cluster
    with Client(cluster.target, retry=RetryPolicy(max_retries=0)) as impatient:
        with no_writing(cluster.coordinator_pid):

            def refused() -> None:
                cluster.wait(lambda _: "journal.failed" in kinds(cluster), "the journal to fail")
                with pytest.raises(OverloadedError) as raised:
                    impatient.generate("not now", max_tokens=1)
                assert raised.value.reason == "JOURNAL_UNAVAILABLE"
                assert cluster.status().journal.startswith("not durable: ")
                assert journal_health(cluster) == health_pb2.HealthCheckResponse.NOT_SERVING

            assert_undisturbed(case, stream_through(impatient, refused))
        cluster.wait(lambda _: "journal.recovered" in kinds(cluster), "the journal to recover")
        assert cluster.status().journal == "durable"
        assert journal_health(cluster) == health_pb2.HealthCheckResponse.SERVING
        assert impatient.generate("now", max_tokens=1).token_ids


# Long ones.


@pytest.mark.long
def test_a_rank_killed_while_it_replays(case: Case) -> None:
    cluster, first = case.cluster, case.cluster.ranks()[0].epoch

    def twice() -> None:
        cluster.kill(1)
        cluster.wait_epoch(0, first + 1)
        cluster.kill(1)

    assert_undisturbed(case, stream_through(cluster.client(), twice))
    assert cluster.ranks()[0].epoch == first + 2


@pytest.mark.long
def test_the_leader_dies_while_the_coordinator_is_down(case: Case) -> None:
    cluster, before = case.cluster, case.cluster.status()
    pids = {rank.tensor: rank.pid for rank in before.ranks}

    def both() -> None:
        os.kill(before.coordinator_pid, signal.SIGKILL)
        os.kill(pids[0], signal.SIGKILL)

    assert_undisturbed(case, stream_through(cluster.client(), both))
    after = cluster.status()
    assert after.term == before.term + 1
    assert after.ranks[0].epoch > before.ranks[0].epoch
    assert not any(map(alive, pids.values()))


@pytest.mark.long
def test_a_stopped_coordinator_is_replaced_and_can_change_nothing_more(case: Case) -> None:
    cluster, before = case.cluster, case.cluster.status()
    assert_undisturbed(case, stream_through(cluster.client(), lambda: cluster.stop("coordinator")))
    cluster.resume(before.coordinator_pid)
    after = cluster.status()
    assert not alive(before.coordinator_pid)
    assert after.term == before.term + 1
    assert [rank.pid for rank in after.ranks] == [rank.pid for rank in before.ranks], "found before their lease ended"


@pytest.mark.long
def test_a_hand_over_in_mid_stream(case: Case) -> None:
    cluster, before = case.cluster, case.cluster.status()
    assert_undisturbed(case, stream_through(cluster.client(), cluster.hand_over))
    after = cluster.status()
    assert after.term == before.term + 1 and after.coordinator_pid != before.coordinator_pid
    assert [rank.pid for rank in after.ranks] == [rank.pid for rank in before.ranks]


@pytest.mark.long
def test_a_rank_that_dies_on_a_full_disk_is_replaced_once_there_is_room(case: Case) -> None:
    """The next epoch must be on disk before it begins; until then streams wait."""
    cluster, before = case.cluster, case.cluster.status()

    def fault() -> None:
        with no_writing(before.coordinator_pid):
            cluster.kill(1)
            cluster.wait(lambda _: "replica.not_persisted" in kinds(cluster), "the epoch to be refused by the disk")

    assert_undisturbed(case, stream_through(cluster.client(), fault))
    after = cluster.status()
    assert after.coordinator_pid == before.coordinator_pid
    assert after.ranks[0].epoch == before.ranks[0].epoch + 1


@pytest.mark.long
def test_a_rank_killed_during_the_first_start(model: Path, ray_address: str) -> None:
    (port,) = free_ports(1)
    killed: list[int] = []

    def strike() -> None:
        with Client(f"127.0.0.1:{port}", timeout_s=60.0) as client:
            while len(client.ranks()) < 2:
                time.sleep(0.01)
            victim = client.ranks()[1]
            os.kill(victim.pid, signal.SIGSTOP)  # from here on it cannot become ready
            assert client.cluster().replicas[0].state != "ready"
            os.kill(victim.pid, signal.SIGKILL)
            killed.append(victim.pid)

    striker = threading.Thread(target=strike)
    striker.start()
    with LocalCluster(
        model, tensor=2, dtype="float64", ray_address=ray_address, address=f"127.0.0.1:{port}"
    ) as cluster:
        striker.join()
        assert killed and not alive(killed[0])
        assert {rank.epoch for rank in cluster.ranks()} == {2}
        answer = cluster.client().generate(PROMPT, sampling=GREEDY)
    assert answer.token_ids == Reference(model).after_each(PROMPT, answer.token_ids).ids


# Batch jobs.


def item_tokens(index: int) -> int:
    """They all run at once, and end one after the other."""
    return 20 + 5 * index


def submit(client: Client, job_id: str) -> Job:
    sampling = {"temperature": 0, "ignore_eos": True}
    items = [
        {"custom_id": f"item {n}", "prompt": f"{PROMPT} {n}", "max_tokens": item_tokens(n)} | sampling
        for n in range(ITEMS)
    ]
    return client.jobs.submit(items, job_id=job_id)


def some_done(job: Job, least: int = ITEMS // 6) -> None:
    """Until the job is well begun and far from its end."""
    for status in job.watch(timeout_s=60.0):
        if status.counts.succeeded >= least:
            break
    assert status.counts.succeeded < ITEMS // 2


def assert_finished_undisturbed(job: Job, reference: Reference) -> None:
    status = job.wait(timeout_s=120.0)
    assert status.state is JobState.SUCCEEDED
    assert (status.counts.succeeded, status.counts.failed) == (ITEMS, 0)
    results = list(job.results())
    assert [result.cursor for result in results] == list(range(1, ITEMS + 1))
    assert sorted(result.index for result in results) == list(range(ITEMS)), "each item once"
    for result in results:
        assert result.custom_id == f"item {result.index}"
        assert result.completion is not None
        ids = result.completion.token_ids
        assert len(ids) == item_tokens(result.index)
        assert ids == reference.after_each(f"{PROMPT} {result.index}", ids).ids


@pytest.mark.long
def test_a_job_survives_a_killed_coordinator(case: Case) -> None:
    cluster, term = case.cluster, case.cluster.status().term
    job = submit(cluster.client(), "coordinator-killed")
    some_done(job)
    cluster.kill("coordinator")
    assert_finished_undisturbed(job, case.reference)
    assert cluster.status().term == term + 1


@pytest.mark.long
def test_a_job_survives_stopping_and_starting_the_cluster(model: Path, ray_address: str, tmp_path: Path) -> None:
    flags = {"state_dir": tmp_path / "state", "ray_address": ray_address, "drain_timeout_s": 0}
    with LocalCluster(model, tensor=2, dtype="float64", **flags) as cluster:  # type: ignore[arg-type]
        some_done(submit(cluster.client(), "cluster-stopped"))
        assert cluster.close() == 0
    with LocalCluster(model, tensor=2, dtype="float64", **flags) as cluster:  # type: ignore[arg-type]
        assert cluster.status().term == 2
        job = submit(cluster.client(), "cluster-stopped")  # the same content under the same id is the same job
        assert_finished_undisturbed(job, Reference(model))
