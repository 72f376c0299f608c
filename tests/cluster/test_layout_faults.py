"""A rank of a layout is killed or stopped under many streams: all of them wait for it, and none is disturbed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from echelon import Client, StreamEvent
from echelon.testing import LocalCluster
from parallel.degrees import Degrees
from tests.cluster.conftest import Case, Checkpoints, Walker
from tests.cluster.layouts import DEEPSEEK_LITE, LLAMA3, SHAPES, WITH_EXPERTS, Layout
from tests.cluster.reference import Reference
from tests.cluster.streams import GREEDY, PROMPT, STEPS, STRIKE_AT, alive, assert_undisturbed, stream_through

pytestmark = pytest.mark.cluster

PROMPTS = [f"{PROMPT} {number}" for number in range(8)]
SHOWN_STALLED_S = 2.0  # nothing came for so long; a stream that went on would have ended meanwhile, or be seen to
ASLEEP = Layout("llama", Degrees(pipeline=2, data=2), LLAMA3)


@dataclass(frozen=True, slots=True)
class Victim:
    """A rank of a layout, by its number."""

    layout: Layout
    number: int

    def __str__(self) -> str:
        return f"{self.layout}-rank-{self.number}"


# Mixtures of experts lose a rank in every kind of layout, now one, now another.
MIXTURES = [
    Degrees(tensor=2, expert=2),
    Degrees(pipeline=2),
    Degrees(tensor=2),
    Degrees(data=2),
    Degrees(data=2, expert=2),
    Degrees(pipeline=2, tensor=2, expert=2),
    Degrees(pipeline=2, data=2, expert=2),
    Degrees(data=2, tensor=2, expert=4),
]
VICTIMS = [
    Victim(Layout("llama", Degrees(pipeline=2), LLAMA3), 1),
    Victim(Layout("llama", Degrees(pipeline=2), LLAMA3), 0),
    Victim(Layout("llama", Degrees(tensor=2), LLAMA3), 1),
    Victim(Layout("llama", Degrees(data=2), LLAMA3), 1),
    Victim(Layout("deepseek-v2-lite", Degrees(data=2, expert=2), DEEPSEEK_LITE), 0),
    *(
        Victim(Layout(family, degrees, SHAPES[family]), (turn + number) % degrees.replica_ranks)
        for turn, family in enumerate(WITH_EXPERTS)
        for number, degrees in enumerate(MIXTURES)
    ),
]
PARAMETERS = [
    pytest.param(victim, id=str(victim), marks=[pytest.mark.long] if number else [])
    for number, victim in enumerate(VICTIMS)
]


@pytest.mark.parametrize("victim", PARAMETERS)
def test_many_streams_survive_a_killed_rank(
    victim: Victim, walker: Walker, checkpoints: Checkpoints, reference_of: Callable[[Path], Reference]
) -> None:
    directory = checkpoints[victim.layout.checkpoint]
    cluster = walker.serve(directory, victim.layout)
    case = Case(str(victim), cluster, reference_of(directory))
    before = cluster.ranks()
    reached = threading.Barrier(len(PROMPTS) + 1)
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        client = cluster.client()
        streams = [pool.submit(stream_through, client, lambda: reached.wait(60), prompt) for prompt in PROMPTS]
        reached.wait(60)
        killed = cluster.kill(victim.number)
        for prompt, events in zip(PROMPTS, streams, strict=True):
            assert_undisturbed(case, events.result(), prompt)
    (hit,) = [rank for rank in before if rank.pid == killed]
    place = victim.layout.degrees.place(victim.number)
    assert (hit.pipeline, hit.data, hit.tensor) == (place.pipeline_rank, place.data_rank, place.tensor_rank)
    after = cluster.wait_epoch(0, hit.epoch + 1).ranks
    assert not {rank.pid for rank in after} & {rank.pid for rank in before}, "every rank of the replica was replaced"
    assert not any(alive(rank.pid) for rank in before)


class Reader:
    """Reads a stream in a thread of its own."""

    def __init__(self, client: Client, prompt: str) -> None:
        self.prompt = prompt
        self.events: list[StreamEvent] = []
        self._stream = client.stream(prompt, sampling=GREEDY)
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        for event in self._stream:
            self.events.append(event)


@pytest.fixture(scope="module")
def patient(ray_address: str, checkpoints: Checkpoints, reference_of: Callable[[Path], Reference]) -> Iterator[Case]:
    """A cluster that takes half a minute of silence for none."""
    directory = checkpoints[ASLEEP.checkpoint]
    flags = ASLEEP.all_flags | {"heartbeat_s": 5.0, "lease_s": 30.0}
    with LocalCluster(directory, dtype="float64", ray_address=ray_address, **flags) as cluster:
        yield Case(str(ASLEEP), cluster, reference_of(directory))


@pytest.mark.long
@pytest.mark.parametrize("number", range(ASLEEP.degrees.replica_ranks))
def test_a_stopped_rank_stalls_every_stream_until_it_goes_on(patient: Case, number: int) -> None:
    """No rank is there for show: without any single one nothing is answered, and with it all goes on as if never."""
    cluster, before = patient.cluster, patient.cluster.ranks()
    readers = [Reader(cluster.client(), prompt) for prompt in PROMPTS]
    await_that(lambda: all(len(reader.events) >= STRIKE_AT for reader in readers))
    pid = cluster.stop(number)
    try:
        seen, since_s = -1, time.monotonic()
        while time.monotonic() - since_s < SHOWN_STALLED_S:
            if (now := sum(len(reader.events) for reader in readers)) != seen:
                seen, since_s = now, time.monotonic()
            time.sleep(0.05)
        assert all(len(reader.events) < STEPS and reader.thread.is_alive() for reader in readers)
    finally:
        cluster.resume(pid)
    for reader in readers:
        reader.thread.join(60)
        assert_undisturbed(patient, reader.events, reader.prompt)
    assert [(rank.pid, rank.epoch) for rank in cluster.ranks()] == [(rank.pid, rank.epoch) for rank in before]


def await_that(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
