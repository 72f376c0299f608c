"""Streams survive the death of a rank and of the coordinator: transformers' tokens, in order, each once."""

from __future__ import annotations

import pytest

from echelon import Client, ConflictError, StreamTakenOverError
from tests.cluster.conftest import Case
from tests.cluster.streams import GREEDY, PROMPT, STEPS, alive, assert_undisturbed, stream_through

pytestmark = pytest.mark.cluster


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.long)], ids=["leader", "follower"])
def test_a_stream_survives_a_killed_rank(pair: Case, victim: int) -> None:
    cluster = pair.cluster
    before = cluster.ranks()
    events = stream_through(cluster.client(), lambda: cluster.kill(victim))
    assert_undisturbed(pair, events)
    after = cluster.wait_epoch(0, before[0].epoch + 1).ranks
    assert {rank.epoch for rank in after} == {before[0].epoch + 1}
    assert not {rank.pid for rank in after} & {rank.pid for rank in before}, "every rank of the replica was replaced"
    assert not any(alive(rank.pid) for rank in before)
    kinds = [event.kind for event in cluster.events()]
    assert "rank.lost" in kinds and "request.replayed" in kinds


def test_a_stream_survives_a_killed_coordinator(pair: Case) -> None:
    cluster = pair.cluster
    before = cluster.status()
    events = stream_through(cluster.client(), lambda: cluster.kill("coordinator"))
    assert_undisturbed(pair, events)
    after = cluster.wait(lambda now: now.term > before.term, "the next coordinator")
    assert after.term == before.term + 1
    assert after.coordinator_pid != before.coordinator_pid
    assert [rank.pid for rank in after.ranks] == [rank.pid for rank in before.ranks], "the ranks were adopted"
    assert after.replicas[0].epoch == before.replicas[0].epoch
    assert after.replicas[0].counters["steps"] > before.replicas[0].counters["steps"], "the engine went on"
    assert "replica.adopted" in [event.kind for event in cluster.events()]


def test_a_vanished_client_is_parked_and_resumes(pair: Case) -> None:
    """A client that is killed says nothing; its request waits, holds no block, and goes on when it is asked for."""
    cluster = pair.cluster
    request_id = "vanished-1"
    vanishing = Client(cluster.target)
    stream = vanishing.stream(PROMPT, sampling=GREEDY, request_id=request_id)
    held = [next(stream) for _ in range(10)]
    vanishing.close()
    parked = cluster.wait(lambda now: now.parked == 1 and now.replicas[0].kv_blocks_referenced == 0, "a parked request")
    assert parked.running == 0
    answer = cluster.client().generate(PROMPT, sampling=GREEDY, request_id=request_id)
    assert answer.token_ids == pair.reference.greedy(PROMPT, STEPS).ids
    assert answer.token_ids[: len(held)] == tuple(event.token_ids[0] for event in held)


def test_one_request_has_one_stream(pair: Case) -> None:
    """The same id and content takes the stream over; other content under the id is refused."""
    client = pair.cluster.client()
    request_id = "taken-over"
    first = client.stream(PROMPT, sampling=GREEDY, request_id=request_id)
    next(first)
    second = client.generate(PROMPT, sampling=GREEDY, request_id=request_id)
    with pytest.raises(StreamTakenOverError):
        list(first)
    assert second.token_ids == pair.reference.greedy(PROMPT, STEPS).ids
    with pytest.raises(ConflictError, match="taken-over"):
        client.generate("something else", sampling=GREEDY, request_id=request_id)
