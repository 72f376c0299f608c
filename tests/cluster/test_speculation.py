"""Speculation in a cluster: every answer is the one without, whatever is guessed, and whoever is killed meanwhile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pytest

from echelon import Client, Completion, SamplingParams
from echelon.testing import LocalCluster
from parallel.degrees import Degrees
from tests.cluster.conftest import Checkpoints, free_ports
from tests.cluster.layouts import LLAMA3, Layout
from tests.cluster.rules import PLAIN, Q, Z, said
from tests.cluster.stubs import read_metrics

pytestmark = [pytest.mark.cluster, pytest.mark.long]

PROMPT = "Geese fly so, geese fly so, geese fly so; cyclists ride so, cyclists ride so in a crosswind"
TOKENS, LONG = 60, 400
STRIKE_AT = 20
DRAFTS = 3

# Two letters that are likelier than all others, and never stand twice in a row, take turns: any guess comes true.
TURNS = replace(
    PLAIN, max_tokens=TOKENS, temperature=0.0, logit_bias={Z: 60.0, Q: 60.0}, bad_words=("zz", "qq"), logprobs=2
)
# Of six that are alike most guesses are wrong, though what was last seen was always seen before.
SHUFFLED = replace(PLAIN, max_tokens=TOKENS, logit_bias=dict.fromkeys((*range(71, 75), Z, Q), 60.0), logprobs=0)
ASKED = {
    "greedy": replace(PLAIN, max_tokens=TOKENS, temperature=0.0, logprobs=0),
    "sampled": replace(PLAIN, max_tokens=TOKENS, temperature=0.3, top_p=0.9, logprobs=0),
    "turns": TURNS,
    "sampled turns": replace(TURNS, temperature=0.8, seed=11),
    "shuffled": SHUFFLED,
    "choices": replace(TURNS, temperature=1.0, n=3, logprobs=0),
    "penalties": replace(TURNS, temperature=0.7, frequency_penalty=0.4, repetition_penalty=1.1),
    "ends in a draft": replace(TURNS, max_tokens=9),
    "stops in a draft": replace(TURNS, stop=("zqzqzqzqz",)),
    "ends by a token": replace(TURNS, stop_token_ids=(Z,), min_tokens=21),
    "form": SamplingParams(max_tokens=TOKENS, seed=5, regex="(zq){20,40}", logprobs=0),
}
LONG_ASKED = {f"long {name}": replace(ASKED[name], max_tokens=LONG) for name in ("greedy", "turns", "sampled turns")}
LAYOUTS = [Layout("llama", Degrees(tensor=2), LLAMA3), Layout("llama", Degrees(pipeline=2), LLAMA3)]


@dataclass(frozen=True, slots=True)
class Speculating:
    """A cluster that speculates, and what it answered before it did."""

    cluster: LocalCluster
    metrics_port: int
    expected: Mapping[str, Completion]

    def counters(self) -> Counter[str]:
        """Of the epoch that serves, once nothing runs."""
        status = self.cluster.wait(lambda now: now.replicas[0].kv_blocks_referenced == 0, "no referenced block")
        return Counter(status.replicas[0].counters)


@pytest.fixture(scope="module", params=LAYOUTS, ids=str)
def speculating(request: pytest.FixtureRequest, ray_address: str, checkpoints: Checkpoints) -> Iterator[Speculating]:
    layout: Layout = request.param
    (port,) = free_ports(1)
    flags = layout.all_flags | {"metrics_address": f"127.0.0.1:{port}", "ray_address": ray_address}
    with LocalCluster(checkpoints[layout.checkpoint], dtype="float64", **flags) as cluster:
        expected = {name: ask(cluster.client(), sampling) for name, sampling in (ASKED | LONG_ASKED).items()}
        assert cluster.status().replicas[0].counters["drafted_tokens"] == 0
        cluster.reconfigure(speculation="ngram", speculation_tokens=DRAFTS)
        yield Speculating(cluster, port, expected)


def ask(client: Client, sampling: SamplingParams) -> Completion:
    return client.generate(PROMPT, sampling=sampling)


def assert_same(found: Completion, expected: Completion) -> None:
    """The same ids, texts and ends; log-probabilities but for the last bits, which depend on the batch."""
    assert said(found) == said(expected)
    for choice, alone in zip(found.choices, expected.choices, strict=True):
        for one, other in zip(choice.logprobs, alone.logprobs, strict=True):
            assert [token_id for token_id, _ in one.top] == [token_id for token_id, _ in other.top]
            scores, wanted = ([each.logprob, *(score for _, score in each.top)] for each in (one, other))
            assert scores == pytest.approx(wanted, abs=1e-6, rel=0)


def test_answers_in_company_are_those_without_speculation(speculating: Speculating) -> None:
    inputs = [{"prompt": PROMPT, "sampling": sampling} for sampling in ASKED.values()]
    before = speculating.counters()
    for _ in range(2):  # the second time behind a cached prompt
        answers = speculating.cluster.client().map(inputs, concurrency=len(inputs))
        for name, answer in zip(ASKED, answers, strict=True):
            assert_same(answer, speculating.expected[name])
    gained = speculating.counters() - before
    assert gained["drafted_tokens"] > gained["accepted_tokens"] > 3 * TOKENS
    assert gained["cached_tokens"] > 0


@pytest.mark.parametrize("name", ["turns", "sampled turns"])
def test_text_that_repeats_takes_fewer_steps_than_it_has_tokens(speculating: Speculating, name: str) -> None:
    before = speculating.counters()
    assert_same(ask(speculating.cluster.client(), ASKED[name]), speculating.expected[name])
    gained = speculating.counters() - before
    assert gained["decode_rows"] + gained["accepted_tokens"] == TOKENS - 1, "the prompt's row draws the first"
    assert gained["decode_rows"] < TOKENS / 2
    port = speculating.metrics_port
    speculating.cluster.wait(lambda _: read_metrics(port)["echelon_tokens_per_step"] > 1.05, "the gauge to say so")


def test_guesses_that_are_mostly_wrong_change_nothing(speculating: Speculating) -> None:
    before = speculating.counters()
    assert_same(ask(speculating.cluster.client(), SHUFFLED), speculating.expected["shuffled"])
    gained = speculating.counters() - before
    assert gained["drafted_tokens"] > max(2 * gained["accepted_tokens"], 2 * DRAFTS), "most were rejected"


@pytest.mark.parametrize("number", [1, 0], ids=["last", "leader"])
def test_a_rank_killed_in_the_middle_disturbs_no_answer(speculating: Speculating, number: int) -> None:
    cluster, asked = speculating.cluster, LONG_ASKED | ASKED
    epoch = cluster.status().replicas[0].epoch
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = {name: pool.submit(ask, cluster.client(), sampling) for name, sampling in asked.items()}
        struck = stream_through(cluster.client(), LONG_ASKED["long turns"], lambda: cluster.kill(number))
    assert_same(struck, speculating.expected["long turns"])
    for name, answer in answers.items():
        assert_same(answer.result(), speculating.expected[name])
    assert cluster.wait_epoch(0, epoch + 1).replicas[0].epoch == epoch + 1
    counters = speculating.counters()
    assert counters["replayed_requests"] > 0 and counters["accepted_tokens"] > 0


def stream_through(client: Client, sampling: SamplingParams, fault: Callable[[], object]) -> Completion:
    """No token lost, doubled or reordered, though the fault strikes in the middle."""
    stream, ids, struck = client.stream(PROMPT, sampling=sampling), list[int](), False
    for event in stream:
        assert event.sequence == len(ids)
        ids += event.token_ids
        if not struck and len(ids) >= STRIKE_AT:
            struck = True
            fault()
    assert struck and stream.completion is not None and list(stream.completion.token_ids) == ids
    return stream.completion
