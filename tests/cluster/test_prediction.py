"""Speculation by the model's layer for multi-token prediction, in a cluster: every answer is the one without."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pytest

from echelon import Completion
from echelon.testing import LocalCluster
from tests.cluster.rules import PLAIN
from tests.cluster.test_speculation import ask, assert_same, stream_through
from tests.predicting import make_circle

pytestmark = [pytest.mark.cluster, pytest.mark.long]

TOKENS, LONG = 60, 300
GREEDY = replace(PLAIN, max_tokens=TOKENS, temperature=0.0, logprobs=1)
ASKED = {
    "greedy": GREEDY,
    "sampled": replace(GREEDY, temperature=0.5),
    "choices": replace(GREEDY, temperature=0.9, top_k=20, n=3),
    "penalties": replace(GREEDY, temperature=0.4, repetition_penalty=1.1),
    "long greedy": replace(GREEDY, max_tokens=LONG),
    "long sampled": replace(GREEDY, max_tokens=LONG, temperature=0.5),
}
LAYOUTS: list[dict[str, Any]] = [{"tensor": 2, "expert": 2}, {"pipeline": 2}]


@dataclass(frozen=True, slots=True)
class Predicting:
    """A cluster that speculates, and what it answered before it did."""

    cluster: LocalCluster
    expected: dict[str, Completion]

    def counters(self) -> Counter[str]:
        """Of the epoch that serves, once nothing runs."""
        status = self.cluster.wait(lambda now: now.replicas[0].kv_blocks_referenced == 0, "no referenced block")
        return Counter(status.replicas[0].counters)


@pytest.fixture(scope="module", params=LAYOUTS, ids=str)
def predicting(
    request: pytest.FixtureRequest, ray_address: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Predicting]:
    directory = make_circle(tmp_path_factory.mktemp("mtp") / "model")
    with LocalCluster(directory, dtype="float64", ray_address=ray_address, **request.param) as cluster:
        expected = {name: ask(cluster.client(), sampling) for name, sampling in ASKED.items()}
        cluster.reconfigure(speculation="mtp")
        yield Predicting(cluster, expected)


def answer_all(predicting: Predicting) -> None:
    with ThreadPoolExecutor(len(ASKED)) as pool:
        answers = {name: pool.submit(ask, predicting.cluster.client(), ASKED[name]) for name in ASKED}
        for name, answer in answers.items():
            assert_same(answer.result(), predicting.expected[name])


def test_answers_are_those_without_in_fewer_steps_and_bytes_are_as_planned(predicting: Predicting) -> None:
    answer_all(predicting)
    before = predicting.counters()
    assert before["accepted_tokens"] > 0, "beside others one guess at a time may not pay for long"
    assert_same(ask(predicting.cluster.client(), GREEDY), predicting.expected["greedy"])
    gained = predicting.counters() - before
    assert gained["decode_rows"] + gained["accepted_tokens"] == TOKENS - 1 and gained["accepted_tokens"] > TOKENS / 4
    for rank in predicting.cluster.ranks():
        assert rank.parameter_bytes == rank.planned_parameter_bytes and rank.kv_bytes == rank.planned_kv_bytes


@pytest.mark.parametrize("number", [1, 0], ids=["last", "leader"])
def test_a_rank_killed_in_the_middle_disturbs_no_answer(predicting: Predicting, number: int) -> None:
    cluster = predicting.cluster
    epoch = cluster.status().replicas[0].epoch
    with ThreadPoolExecutor(1) as pool:
        others = pool.submit(answer_all, predicting)
        struck = stream_through(cluster.client(), ASKED["long sampled"], lambda: cluster.kill(number))
        others.result()
    assert_same(struck, predicting.expected["long sampled"])
    assert cluster.wait_epoch(0, epoch + 1).replicas[0].epoch == epoch + 1
    counters = predicting.counters()
    assert counters["replayed_requests"] > 0 and counters["accepted_tokens"] > 0
