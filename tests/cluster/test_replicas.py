"""Two replicas behind one coordinator: both answer, one takes over for the other, prefixes find their way back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from echelon.testing import LocalCluster
from echelon.types import Cluster, Completion
from tests.cluster.conftest import Case
from tests.cluster.layouts import LAYOUTS
from tests.cluster.reference import Reference
from tests.cluster.streams import PROMPT, alive, assert_undisturbed, stream_through

pytestmark = pytest.mark.cluster

PROMPTS = [f"{i} {PROMPT}" for i in range(4)]


@pytest.fixture(scope="module")
def twins(ray_address: str, checkpoints: dict[str, Path]) -> Iterator[Case]:
    """Two replicas of one rank each."""
    directory = checkpoints[LAYOUTS["llama-2"].checkpoint]
    with LocalCluster(directory, replicas=2, dtype="float64", ray_address=ray_address) as cluster:
        yield Case("twins", cluster, Reference(directory))


def idle(cluster: LocalCluster) -> Cluster:
    """Once both serve and hold nothing."""
    return cluster.wait(
        lambda now: all(each.state == "ready" and not each.kv_blocks_referenced for each in now.replicas),
        "two idle replicas",
    )


def work_of(cluster: LocalCluster, work: Callable[[], object]) -> list[int]:
    """Rows that each replica decodes meanwhile, on its own epoch."""
    before = idle(cluster)
    work()
    after = idle(cluster)
    return [
        then.counters.get("decode_rows", 0) - (now.counters.get("decode_rows", 0) if then.epoch == now.epoch else 0)
        for now, then in zip(before.replicas, after.replicas, strict=True)
    ]


def streams_through(case: Case, fault: Callable[[], object]) -> None:
    """Four streams, all of them begun when the fault strikes, and none of them disturbed."""
    reached = threading.Barrier(len(PROMPTS), action=fault)  # type: ignore[arg-type]
    client = case.cluster.client()
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        streams = [pool.submit(stream_through, client, lambda: reached.wait(60), prompt, 1) for prompt in PROMPTS]
        for prompt, events in zip(PROMPTS, streams, strict=True):
            assert_undisturbed(case, events.result(), prompt)


def test_both_answer(twins: Case) -> None:
    cluster = twins.cluster
    status = idle(cluster)
    assert [each.index for each in status.replicas] == [0, 1]
    assert sorted((rank.replica, rank.leader) for rank in status.ranks) == [(0, True), (1, True)]
    shares = work_of(cluster, lambda: streams_through(twins, lambda: None))
    assert min(shares) > 0, "two streams each, unless the first has ended before the last began"


def test_a_prefix_is_found_where_it_was_computed(twins: Case) -> None:
    """The first time on the replica that was idle; then there again, though the other is idle, too, and comes first."""
    client, prompt = twins.cluster.client(), ""

    def ask() -> Completion:
        return client.generate(prompt, max_tokens=4, temperature=0.0)

    answers: list[Completion] = []
    for number in range(3):  # a stream may have ended before the prompt came, if all stood still meanwhile
        prompt = f"{number}. A long skein of geese. " * 12
        answers.clear()
        busy = work_of(twins.cluster, lambda: stream_through(client, lambda: answers.append(ask())))
        first = min((0, 1), key=lambda replica: busy[replica])
        if busy[first]:
            break
    assert busy[first] > 0, "the prompt went to the replica beside the one that was busy"
    if first == 0:
        pytest.fail("an idle cluster begins with its first replica, so this test would not tell where the prompt was")
    shares = work_of(twins.cluster, lambda: answers.append(ask()))
    assert (shares[1 - first], shares[first] > 0) == (0, True)
    assert [answer.usage.cached_tokens > 0 for answer in answers] == [False, True]
    assert answers[0].token_ids == answers[1].token_ids
    assert idle(twins.cluster).replicas[first].counters["affinity_hits"] > 0


def test_streams_of_a_killed_replica_go_on_on_the_other(twins: Case) -> None:
    cluster = twins.cluster
    before = idle(cluster)
    victim = next(rank for rank in before.ranks if rank.replica == 1)
    shares = work_of(cluster, lambda: streams_through(twins, lambda: cluster.kill(victim)))
    after = cluster.wait_epoch(1, victim.epoch + 1)
    assert [rank.pid for rank in after.ranks if rank.replica == 0] == [
        rank.pid for rank in before.ranks if rank.replica == 0
    ], "the other has not noticed"
    assert after.replicas[0].epoch == before.replicas[0].epoch
    assert not alive(victim.pid)
    assert shares[1] == 0 < shares[0], "nobody waited for the killed one"
    events = cluster.events()
    replayed = sum(event.kind == "request.replayed" for event in events)
    assert replayed in (1, 2), "two streams each, of which the first may have ended while the last one began"
    assert {"serving": 1, "of": 2} in [dict(event.detail) for event in events if event.kind == "replicas.serving"]
    assert any("replica 1: its process has died" in str(event.detail) for event in events)


@pytest.mark.long
def test_a_new_coordinator_adopts_both(twins: Case) -> None:
    cluster = twins.cluster
    before = idle(cluster)
    streams_through(twins, lambda: cluster.kill("coordinator"))
    after = idle(cluster)
    assert after.term == before.term + 1
    assert [(rank.pid, rank.epoch) for rank in after.ranks] == [(rank.pid, rank.epoch) for rank in before.ranks]
    adopted = [event.subject for event in cluster.events() if event.kind == "replica.adopted"]
    assert sorted(adopted) == ["replica/0", "replica/1"]
