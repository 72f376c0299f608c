"""The whole system against transformers in float64, through the gRPC client, for each layout."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from echelon import CancelledError, Client, Completion, SamplingParams
from echelon.types import Cluster
from tests.cluster.conftest import Case
from tests.cluster.layouts import LAYOUTS
from tests.cluster.rules import RULES, assert_drawn

pytestmark = pytest.mark.cluster

STEPS = 64
DRAWN = SamplingParams(max_tokens=32, temperature=1.0, top_p=0.9, top_k=50, seed=1234, ignore_eos=True)
PROMPTS = [
    "The quick brown fox jumps over the lazy dog.",
    "Geese fly so.",
    "敏捷的棕色狐狸",
    "a",
    "An echelon is a formation in which each unit stands a little behind and to the side of the one ahead. " * 2,
]


@pytest.fixture(scope="module")
def sampled() -> dict[str, tuple[int, ...]]:
    """What each checkpoint's first layout drew; the others must draw the same."""
    return {}


def greedy(client: Client, text: str, steps: int = STEPS, cache_salt: str = "") -> Completion:
    return client.generate(text, max_tokens=steps, temperature=0.0, logprobs=0, ignore_eos=True, cache_salt=cache_salt)


def assert_equals_transformers(case: Case, text: str, completion: Completion) -> None:
    expected = case.reference.greedy(text, len(completion.token_ids))
    assert completion.token_ids == expected.ids
    logprobs = [logprob.logprob for logprob in completion.logprobs]
    assert logprobs == pytest.approx(expected.logprobs, abs=1e-6, rel=0)
    assert completion.text == case.reference.tokenizer.decode(expected.ids, skip_special_tokens=True)


@pytest.mark.parametrize("text", PROMPTS, ids=range(len(PROMPTS)))
def test_greedy_equals_transformers(case: Case, text: str) -> None:
    completion = greedy(case.cluster.client(), text)
    assert len(completion.token_ids) == STEPS
    assert_equals_transformers(case, text, completion)


def test_thirty_two_requests_at_once(case: Case) -> None:
    texts = [f"{PROMPTS[i % len(PROMPTS)]} {i}" for i in range(32)]
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda text: greedy(case.cluster.client(), text, 24), texts))
    for text, answer in zip(texts, answers, strict=True):
        assert_equals_transformers(case, text, answer)
    counters = case.cluster.status().replicas[0].counters
    assert counters["decode_rows"] > counters["steps"], "no step ran more than one request"


def test_chunks_of_seven_tokens(case: Case) -> None:
    before = case.cluster.status().replicas[0].counters
    text = PROMPTS[-1]
    assert_equals_transformers(case, text, greedy(case.cluster.client(), text, 8, cache_salt="not seen before"))
    after = case.cluster.status().replicas[0].counters
    prompt_tokens = len(case.reference.tokenizer(text)["input_ids"])
    chunks = after["prefill_chunks"] - before["prefill_chunks"]
    if case.name.endswith("chunked"):
        assert after["chunked_prompts"] - before["chunked_prompts"] == 1
        assert chunks >= -(-prompt_tokens // 7)
    elif LAYOUTS[case.name].degrees.pipeline > 1:  # chunks are as long as a stage's other slots
        assert 1 <= chunks <= prompt_tokens
    else:
        assert chunks == 1


def test_first_event_long_before_the_last(case: Case) -> None:
    """In one of five streams at least: on a busy machine the reader may be late itself."""

    def arrivals_s() -> list[float]:
        stream = case.cluster.client().stream(PROMPTS[0], max_tokens=300, temperature=0.0, ignore_eos=True)
        started_s = time.monotonic()
        return [time.monotonic() - started_s for _ in stream]

    assert any(arrived_s[0] < arrived_s[-1] / 2 for arrived_s in (arrivals_s() for _ in range(5)))


def test_resident_bytes_equal_the_plan(case: Case) -> None:
    for rank in case.cluster.ranks():
        assert rank.parameter_bytes == rank.planned_parameter_bytes > 0
        assert rank.kv_bytes == rank.planned_kv_bytes > 0


def test_cancelling_sixty_four_streams_releases_every_block(case: Case) -> None:
    """Some may have ended, and some not begun, when the first are cancelled: a busy machine takes its time."""
    client = case.cluster.client()
    ids = [f"cancel-{case.name}-{i}" for i in range(64)]

    def read(request_id: str) -> bool:
        try:
            client.generate(request_id, request_id=request_id, max_tokens=400, temperature=0.0, ignore_eos=True)
        except CancelledError:
            return True
        return False

    with ThreadPoolExecutor(64) as pool:
        reads = {request_id: pool.submit(read, request_id) for request_id in ids}
        case.cluster.wait(lambda now: now.running + now.queued >= 32, "32 requests at once")
        cancelled = set(client.cancel(*ids))
        assert len(cancelled) >= 16
        while not all(one.done() for one in reads.values()):
            cancelled.update(client.cancel(*ids))
            time.sleep(0.05)
    assert cancelled == {request_id for request_id, one in reads.items() if one.result()}
    cluster = settled(case)
    assert cluster.running == cluster.queued == 0
    # What was in flight when the blocks were released, and the next request's own steps, are all that ran since.
    client.generate("one", max_tokens=1, temperature=0.0)
    assert settled(case).replicas[0].step - cluster.replicas[0].step <= 2 + 2


def settled(case: Case) -> Cluster:
    """Once no block is referenced, and the engine has had time for what it had not heard of yet."""
    steps: list[int] = []

    def stands(now: Cluster) -> bool:
        time.sleep(0.1)
        steps.append(now.replicas[0].step)
        return now.replicas[0].kv_blocks_referenced == 0 and steps[-5:] == [steps[-1]] * 5

    return case.cluster.wait(stands, "no referenced block and no step")


def test_same_seed_same_tokens_in_any_company(case: Case, sampled: dict[str, tuple[int, ...]]) -> None:
    """Alone, under another id, and among others; across layouts of one checkpoint, too."""
    client = case.cluster.client()

    def draw(request_id: str) -> tuple[int, ...]:
        return client.generate(PROMPTS[0], request_id=request_id, sampling=DRAWN).token_ids

    alone = draw(f"alone-{case.name}")
    with ThreadPoolExecutor(8) as pool:
        noise = [pool.submit(client.generate, f"company {i}", max_tokens=40, seed=i) for i in range(7)]
        together = pool.submit(draw, f"together-{case.name}").result()
        for other in noise:
            other.result()
    assert alone == together
    assert sampled.setdefault(LAYOUTS[case.name].checkpoint, alone) == alone
    assert client.generate(PROMPTS[0], max_tokens=32, seed=4321, ignore_eos=True).token_ids != alone


@pytest.mark.long
def test_every_rule_on_every_layout(case: Case) -> None:
    """All at once, two choices each: what each must be, transformers' logits say."""
    text, rules = PROMPTS[-1], list(RULES.values())
    inputs = [{"prompt": text, "sampling": replace(sampling, n=2)} for sampling in rules]
    for sampling, answer in zip(rules, case.cluster.client().map(inputs, concurrency=len(inputs)), strict=True):
        assert_drawn(case.reference, case.reference.ids(text), replace(sampling, n=2), answer)
