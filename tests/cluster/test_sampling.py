"""Every sampling rule through gRPC on real ranks: the ids are those of a plain reference on transformers' logits.

In company, cut in chunks of seven, preempted, from the cache, as one choice of several: always the same ids.
"""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from echelon import Completion, SamplingParams
from tests.cluster.conftest import Case
from tests.cluster.rules import PLAIN, RULES, Q, Z, assert_drawn, said

pytestmark = pytest.mark.cluster

PROMPT = "Cyclists ride so in a crosswind, and a pipeline of micro-batches draws the same staircase in time."
BLOCK_TOKENS = 16


def counted(case: Case, before: Counter[str]) -> Counter[str]:
    """What has happened since, in the same epoch."""
    after = case.counters()
    return Counter({name: count - before[name] for name, count in after.items()})


def asked_at_once(case: Case, asked: dict[str, SamplingParams], name: str, salt: str) -> dict[str, Completion]:
    """The answers to all of them, under request ids that begin with `name`."""
    client = case.cluster.client()
    ids = {rule: f"{name}-{case.name}-{rule}" for rule in asked}
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = pool.map(
            lambda rule: client.generate(PROMPT, sampling=asked[rule], request_id=ids[rule], cache_salt=salt), asked
        )
        completions = dict(zip(asked, answers, strict=True))
    assert {rule: completion.request_id for rule, completion in completions.items()} == ids
    return completions


def token_ids(completions: dict[str, Completion]) -> dict[str, list[tuple[int, ...]]]:
    return {rule: [choice.token_ids for choice in one.choices] for rule, one in completions.items()}


def test_the_letters_are_these(pair: Case) -> None:
    assert (pair.reference.plain_ids("z"), pair.reference.plain_ids("q")) == ((Z,), (Q,))


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_alone(pair: Case, rule: str) -> None:
    """Nothing in the cache, a prompt in one chunk; log-probabilities are the model's own, whatever the rule."""
    asked = replace(RULES[rule], logprobs=3)
    completion = pair.cluster.client().generate(PROMPT, sampling=asked, cache_salt=f"alone {rule}")
    assert completion.usage.cached_tokens == 0
    assert len(completion.token_ids) > 32
    assert_drawn(pair.reference, pair.reference.ids(PROMPT), asked, completion)


def test_every_rule_changes_the_answer(pair: Case) -> None:
    """Same prompt, same noise: rules that did nothing would give what others give."""
    found = token_ids(asked_at_once(pair, RULES, "bites", "bites"))
    assert len({answers[0] for answers in found.values()}) == len(RULES)


def test_company_chunks_preemption_and_the_cache_change_nothing(tight: Case) -> None:
    """All rules at once, two choices each, in a cache that is too small for them; then again, from what is cached."""
    asked = {rule: replace(sampling, n=2, max_tokens=64, logprobs=1) for rule, sampling in RULES.items()}
    prompt = tight.reference.ids(PROMPT)
    start = tight.counters()
    first = asked_at_once(tight, asked, "first", "company")
    for rule, completion in first.items():
        assert_drawn(tight.reference, prompt, asked[rule], completion)
        assert len({choice.token_ids for choice in completion.choices}) == (1 if asked[rule].temperature == 0 else 2)
    happened = counted(tight, start)
    for name in ("chunked_prompts", "preemptions", "recomputed_tokens", "cache_hits", "shared_prefix_tokens"):
        assert happened[name] >= 1, (name, happened)
    assert happened["decode_rows"] > happened["steps"], "no step ran more than one request"
    again = asked_at_once(tight, asked, "again", "company")
    assert token_ids(again) == token_ids(first)
    assert any(completion.usage.cached_tokens for completion in again.values())


def test_each_of_three_choices_is_what_it_would_be_among_any_number(pair: Case) -> None:
    """The noise of a choice is keyed by its index: choice 0 is the answer to n=1, and all share one prefill."""
    start = pair.counters()
    asked = replace(RULES["cut"], n=3, presence_penalty=1.0, logprobs=2)
    three = pair.cluster.client().generate(PROMPT, sampling=asked, cache_salt="three")
    prompt = pair.reference.ids(PROMPT)
    assert_drawn(pair.reference, prompt, asked, three)
    assert len({choice.token_ids for choice in three.choices}) == 3
    happened = counted(pair, start)
    assert happened["shared_prefix_tokens"] == 2 * ((len(prompt) - 1) // BLOCK_TOKENS * BLOCK_TOKENS)
    assert three.usage.cached_tokens == 0, "what the choices share is no hit"
    two = pair.cluster.client().generate(PROMPT, sampling=replace(asked, n=2), cache_salt="two")
    one = pair.cluster.client().generate(PROMPT, sampling=replace(asked, n=1), cache_salt="one")
    assert said(two) == said(three)[:2]
    assert said(one) == said(three)[:1]


@pytest.mark.parametrize("top", [0, 5])
def test_log_probabilities_of_a_prompt(tight: Case, pair: Case, top: int) -> None:
    """Whole or in chunks of seven, and the same again when the cache has it all."""
    for case in (pair, tight):
        asked = replace(PLAIN, max_tokens=4, prompt_logprobs=top, n=2)
        for _ in range(2):
            completion = case.cluster.client().generate(PROMPT, sampling=asked, cache_salt=f"scored {top}")
            assert_drawn(case.reference, case.reference.ids(PROMPT), asked, completion)


def test_what_was_answered_to_a_prompt_is_found_when_it_becomes_one(pair: Case) -> None:
    """The next turn of a conversation finds prompt and answer; the last of its tokens is computed in any case."""
    client, prompt = pair.cluster.client(), pair.reference.ids(PROMPT)
    first = client.generate(token_ids=prompt, sampling=PLAIN, cache_salt="turns")
    assert first.usage.cached_tokens == 0
    turn = (*prompt, *first.token_ids)
    for salt, cached in (("turns", (len(turn) - 1) // BLOCK_TOKENS * BLOCK_TOKENS), ("others", 0)):
        start = pair.counters()
        second = client.generate(token_ids=turn, sampling=PLAIN, cache_salt=salt)
        assert second.usage.cached_tokens == cached
        happened = counted(pair, start)
        assert (happened["cache_hits"], happened["cached_tokens"]) == (int(cached > 0), cached)
        assert_drawn(pair.reference, turn, PLAIN, second)


@pytest.mark.parametrize("requests", [24, pytest.param(120, marks=[pytest.mark.long, pytest.mark.timeout(900)])])
def test_contexts_of_many_times_the_cache(tight: Case, requests: int) -> None:
    """They do not fit together, so they preempt one another; all end, and none is answered wrongly."""
    prompts = [tuple((7 * place + number) % 300 + 2 for place in range(9 + number % 16)) for number in range(requests)]
    asked = replace(PLAIN, repetition_penalty=1.2, max_tokens=100)
    held_tokens = 16 * tight.cluster.status().replicas[0].kv_blocks_total
    assert sum(map(len, prompts)) + requests * 100 > 6 * held_tokens
    start = tight.counters()
    inputs = [{"token_ids": prompt, "seed": number} for number, prompt in enumerate(prompts)]
    answers = list(tight.cluster.client().map(inputs, concurrency=requests, sampling=asked))
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        assert_drawn(tight.reference, prompt, replace(asked, seed=number), answer)
    happened = counted(tight, start)
    assert happened["preemptions"] >= requests // 8, happened
    status = tight.cluster.status()
    assert (status.running, status.queued, status.replicas[0].kv_blocks_referenced) == (0, 0, 0)
