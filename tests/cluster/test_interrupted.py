"""Answers under every kind of sampling, in whose middle a rank or the coordinator is killed, or the client leaves.

Whatever looks back at what was generated (penalties, forms, stop strings, the least number of tokens) must see the
tokens from before the fault: each answer is the one that an undisturbed run gives.
"""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import grpc
import pytest

from echelon import Client, Completion, SamplingParams
from echelon.convert import sampling_to_proto
from echelon.types import FinishReason
from echelon.v1 import generation_pb2, generation_pb2_grpc
from tests.cluster.conftest import Case
from tests.cluster.rules import MANY_STOPS, PLAIN, RULES, across_tokens, assert_drawn, said
from tests.cluster.stubs import TIMEOUT_S

pytestmark = pytest.mark.cluster

PROMPT = "Geese fly so; the one ahead breaks the air for those behind."
LONG = 120
STRIKE_AT = 10
FREE = replace(PLAIN, max_tokens=LONG, temperature=0.9)
LETTERS = "[a-z ]{90,110}[0-9]"
TEXTS = {"type": "array", "items": {"type": "string", "minLength": 12, "maxLength": 20}, "minItems": 5, "maxItems": 6}

DRAWN = {
    "penalties": replace(
        PLAIN,
        max_tokens=LONG,
        presence_penalty=0.9,
        frequency_penalty=0.5,
        repetition_penalty=1.15,
        logprobs=2,
        prompt_logprobs=1,
    ),
    "greedy": replace(RULES["penalties"], max_tokens=LONG),
    "words": replace(RULES["bad-words"], max_tokens=LONG, top_p=0.95),
    "least": replace(PLAIN, max_tokens=LONG, stop_token_ids=MANY_STOPS, min_tokens=LONG - 20),
    "choices": replace(RULES["cut"], max_tokens=LONG, n=3, repetition_penalty=1.1, logprobs=0),
}
BOUND = {
    "regex": SamplingParams(max_tokens=LONG, seed=5, regex=LETTERS, logprobs=1),
    "schema": SamplingParams(max_tokens=400, seed=6, json_schema=TEXTS, n=2, frequency_penalty=0.3),
}


@dataclass
class Streams:
    """Streams that run side by side, and a fault when each has brought some tokens."""

    client: Client
    brought: dict[str, int] = field(default_factory=dict)
    moved: threading.Condition = field(default_factory=threading.Condition)
    struck: list[str] = field(default_factory=list)  # who had not ended, as far as its client knows

    def run(self, asked: dict[str, SamplingParams], fault: Callable[[], object]) -> dict[str, Completion]:
        self.brought = dict.fromkeys(asked, 0)
        with ThreadPoolExecutor(len(asked)) as pool:
            streams = {name: pool.submit(self._read, name, sampling) for name, sampling in asked.items()}
            with self.moved:
                assert self.moved.wait_for(lambda: min(self.brought.values()) >= STRIKE_AT, timeout=60.0)
            fault()
            self.struck = [name for name, stream in streams.items() if not stream.done()]
            return {name: stream.result() for name, stream in streams.items()}

    def _read(self, name: str, sampling: SamplingParams) -> Completion:
        """To the end; no token lost, doubled or reordered, no text taken back."""
        ids: dict[int, list[int]] = {choice: [] for choice in range(sampling.n or 1)}
        texts = dict.fromkeys(ids, "")
        stream = self.client.stream(PROMPT, sampling=sampling, timeout_s=120.0)
        for event in stream:
            assert event.sequence == len(ids[event.index])
            ids[event.index] += event.token_ids
            texts[event.index] += event.text
            with self.moved:
                self.brought[name] = min(map(len, ids.values()))
                self.moved.notify()
        completion = stream.completion
        assert completion is not None
        for choice in completion.choices:
            assert choice.token_ids == tuple(ids[choice.index])
            held_back = choice.text.removeprefix(texts[choice.index])
            assert texts[choice.index] + held_back == choice.text
        return completion


@dataclass(frozen=True, slots=True)
class Expected:
    """What undisturbed runs give where no reference says it, and a stop string far into FREE's answer."""

    bound: dict[str, Completion]
    free: Completion
    stop: str
    stopped_tokens: int


@pytest.fixture(scope="module")
def expected(pair: Case) -> Expected:
    client = pair.cluster.client()
    bound = {name: client.generate(PROMPT, sampling=sampling) for name, sampling in BOUND.items()}
    assert re.fullmatch(LETTERS, bound["regex"].text)
    for choice in bound["schema"].choices:
        assert all(12 <= len(text) <= 20 for text in json.loads(choice.text))
    free = client.generate(PROMPT, sampling=FREE)
    stop, count = across_tokens(pair.reference, free.token_ids)[-1]
    assert count > LONG // 2
    return Expected(bound, free, stop, count)


@pytest.mark.parametrize(
    "victim",
    [
        pytest.param(0, id="leader"),
        pytest.param(1, id="follower", marks=pytest.mark.long),
        pytest.param("coordinator", id="coordinator"),
    ],
)
def test_every_kind_of_answer_survives(pair: Case, expected: Expected, victim: int | str) -> None:
    cluster = pair.cluster
    before = cluster.status()
    pid = before.coordinator_pid if victim == "coordinator" else before.ranks[int(victim)].pid
    asked = {**DRAWN, **BOUND, "stop": replace(FREE, stop=(expected.stop,))}
    streams = Streams(cluster.client())
    answers = streams.run(asked, lambda: os.kill(pid, signal.SIGKILL))
    assert len(streams.struck) > len(asked) // 2, "a few may have ended, on a machine that stood still meanwhile"
    for name, sampling in DRAWN.items():
        assert_drawn(pair.reference, pair.reference.ids(PROMPT), sampling, answers[name])
    for name, undisturbed in expected.bound.items():
        assert said(answers[name]) == said(undisturbed)
        assert all(choice.finish_reason is FinishReason.STOP for choice in answers[name].choices)
    stopped = answers["stop"]
    assert stopped.token_ids == expected.free.token_ids[: expected.stopped_tokens]
    assert stopped.text == pair.reference.text(expected.free.token_ids).partition(expected.stop)[0]
    assert stopped.choices[0].matched_stop == expected.stop
    if victim == "coordinator":
        after = cluster.wait(lambda now: now.term > before.term, "the next coordinator")
        assert after.term == before.term + 1 and after.replicas[0].epoch == before.replicas[0].epoch
    else:
        after = cluster.wait_epoch(0, before.replicas[0].epoch + 1)
        assert after.replicas[0].epoch == before.replicas[0].epoch + 1
        recomputed = [tokens for answer in answers.values() if (tokens := answer.usage.recomputed_tokens)]
        assert len(recomputed) > len(asked) // 2 and min(recomputed) >= STRIKE_AT
    cluster.wait(lambda now: now.replicas[0].kv_blocks_referenced == 0, "no referenced block")


# The client goes, and comes back.


@dataclass(frozen=True, slots=True)
class Call:
    """A request over bare gRPC, past the SDK's own resuming."""

    target: str
    sampling: SamplingParams
    request_id: str
    prompt: str = PROMPT

    def tokens(self, received: list[list[int]], limit: int | None = None) -> Iterator[generation_pb2.TokenDelta]:
        """Deltas after `received`, at most `limit`; then the call is dropped."""
        resume = generation_pb2.Resume(received=[generation_pb2.TokenIds(ids=ids) for ids in received])
        request = generation_pb2.GenerateRequest(
            text=self.prompt,
            request_id=self.request_id,
            sampling=sampling_to_proto(self.sampling),
            resume=resume if received else None,
        )
        with grpc.insecure_channel(self.target) as channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            deltas = 0
            for message in stub.StreamGenerate(request, timeout=TIMEOUT_S):
                if message.WhichOneof("event") == "delta":
                    yield message.delta
                    deltas += 1
                if deltas == limit:
                    return

    def gather(self, received: list[list[int]], limit: int | None = None) -> list[list[int]]:
        """All ids by choice, the received ones included; nothing is told twice and nothing left out."""
        ids = [list(choice) for choice in received] or [[] for _ in range(self.sampling.n or 1)]
        for delta in self.tokens(received, limit):
            assert delta.sequence == len(ids[delta.index])
            ids[delta.index] += delta.token_ids
        return ids


@pytest.mark.parametrize("name", ["penalties", "choices", "schema", "regex"])
def test_a_client_resumes_from_the_ids_it_holds(pair: Case, expected: Expected, name: str) -> None:
    """Under its request id, from fewer ids than it was sent; under one that nobody knows, as after a lost disk."""
    asked = (DRAWN | BOUND)[name]
    target = pair.cluster.target
    held = Call(target, asked, f"resumed-{name}").gather([], 40)
    assert all(held)
    fewer = [ids[: len(ids) - 3 * place] for place, ids in enumerate(held)]
    whole = Call(target, asked, f"resumed-{name}").gather(fewer)
    unknown = Call(target, asked, f"unknown-{name}").gather(held)
    assert unknown == whole
    if name in expected.bound:
        assert [tuple(ids) for ids in whole] == [choice.token_ids for choice in expected.bound[name].choices]
    else:
        answer = pair.cluster.client().generate(PROMPT, sampling=asked)
        assert_drawn(pair.reference, pair.reference.ids(PROMPT), asked, answer)
        assert [tuple(ids) for ids in whole] == [choice.token_ids for choice in answer.choices]
