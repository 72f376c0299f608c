"""Every sampling rule as a client asks for it, and what transformers' logits and the same noise say to it.

The reference goes over an answer that was given: each of its ids must be what the rules choose after the ones before
it, from logits of one pass over all of them. So it is exact, and costs one pass an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from echelon import SamplingParams
from echelon.internal.link import Sampling
from echelon.types import Choice, Completion, FinishReason, TokenLogprob
from tests.cluster.reference import Reference
from tests.unit.sampling_reference import Scores, choose

TOKENS = 40
ATOL = 1e-6
PLAIN = SamplingParams(max_tokens=TOKENS, temperature=1.0, seed=2**40 + 7, ignore_eos=True)
MANY_STOPS = tuple(range(2, 90))
Z, Q = 91, 82  # ids of the letters

RULES = {
    "plain": PLAIN,
    "greedy": replace(PLAIN, temperature=0.0),
    "cold": replace(PLAIN, temperature=0.6),
    "hot": replace(PLAIN, temperature=1.7),
    "top-k": replace(PLAIN, top_k=4),
    "top-p": replace(PLAIN, top_p=0.5),
    "min-p": replace(PLAIN, min_p=0.3),
    "cut": replace(PLAIN, temperature=1.3, top_k=30, top_p=0.9, min_p=0.02),
    "presence": replace(PLAIN, presence_penalty=2.0, temperature=0.4),
    "frequency": replace(PLAIN, frequency_penalty=-1.5),
    "repetition": replace(PLAIN, repetition_penalty=1.8),
    "penalties": replace(PLAIN, temperature=0.0, presence_penalty=0.8, frequency_penalty=0.6, repetition_penalty=1.1),
    "logit-bias": replace(PLAIN, logit_bias={Z: 4.0, Q: 4.0, 3: -100.0}),
    "bad-words": replace(PLAIN, logit_bias={Z: 4.0, Q: 4.0, 3: -100.0}, bad_words=("zq", "qz", "a", "e")),
    "min-tokens": replace(PLAIN, stop_token_ids=MANY_STOPS, min_tokens=33),
    "end": replace(PLAIN, ignore_eos=False, logit_bias={1: 7.0}, min_tokens=32),
}


def said(completion: Completion) -> list[tuple[object, ...]]:
    """All of the choices but their log-probabilities, whose last bits depend on the batch."""
    return [(one.token_ids, one.text, one.finish_reason, one.matched_stop) for one in completion.choices]


def settled(asked: SamplingParams, reference: Reference) -> Sampling:
    """What is asked for as the documented defaults complete it; bad words are spelt with and without a space."""
    words = [tuple(reference.plain_ids(text)) for word in asked.bad_words for text in (word, f" {word}")]
    stop_ids = set(asked.stop_token_ids) | (set() if asked.ignore_eos else {reference.end_id})
    assert asked.seed is not None and asked.temperature is not None and asked.max_tokens is not None
    return Sampling(
        temperature=asked.temperature,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        top_k=asked.top_k or 0,
        min_p=asked.min_p or 0.0,
        max_tokens=asked.max_tokens,
        min_tokens=asked.min_tokens or 0,
        seed=asked.seed,
        stop_token_ids=tuple(stop_ids),
        presence_penalty=asked.presence_penalty or 0.0,
        frequency_penalty=asked.frequency_penalty or 0.0,
        repetition_penalty=asked.repetition_penalty or 1.0,
        logit_bias=tuple((asked.logit_bias or {}).items()),
        bad_words=tuple(words),
    )


def assert_drawn(reference: Reference, prompt: Sequence[int], asked: SamplingParams, completion: Completion) -> None:
    """Every choice is what the rules choose on the noise of its index, to its very end; log-probabilities are raw."""
    assert [choice.index for choice in completion.choices] == list(range(asked.n or 1))
    assert completion.usage.prompt_tokens == len(prompt)
    assert completion.usage.completion_tokens == sum(len(choice.token_ids) for choice in completion.choices)
    for choice in completion.choices:
        _assert_choice(reference, tuple(prompt), asked, choice)
    if asked.prompt_logprobs is not None:
        scores = reference.logprobs(prompt)[:-1]
        assert_scored(completion.prompt_logprobs, prompt[1:], scores, asked.prompt_logprobs)


def _assert_choice(reference: Reference, prompt: tuple[int, ...], asked: SamplingParams, choice: Choice) -> None:
    sampling, ids = settled(asked, reference), choice.token_ids
    logits = reference.logits((*prompt, *ids))[len(prompt) - 1 : -1]
    for place, token_id in enumerate(ids):
        known = (*prompt, *ids[:place])
        assert token_id == choose(logits[place], known, len(prompt), sampling, choice.index), f"token {place}"
    ends = [place for place, token_id in enumerate(ids) if token_id in sampling.stop_token_ids]
    ends = [place for place in ends if place >= sampling.min_tokens]
    assert ends in ([], [len(ids) - 1]), "nothing follows an end token"
    assert choice.finish_reason is (FinishReason.STOP if ends else FinishReason.LENGTH)
    assert ends or len(ids) == sampling.max_tokens
    assert choice.text == reference.text(ids)
    if asked.logprobs is not None:
        scores = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        assert_scored(choice.logprobs, ids, scores, asked.logprobs)


def assert_scored(told: Sequence[TokenLogprob], ids: Sequence[int], scores: Scores, top: int) -> None:
    """Each id's own log-probability, and the `top` likeliest, each within 1e-6."""
    assert [one.token_id for one in told] == list(ids)
    for one, row in zip(told, scores, strict=True):
        likeliest = np.argsort(-row, kind="stable")[:top]
        assert [token_id for token_id, _ in one.top] == likeliest.tolist()
        expected = [row[one.token_id], *row[likeliest]]
        assert [one.logprob, *(score for _, score in one.top)] == pytest.approx(expected, abs=ATOL, rel=0)


def across_tokens(reference: Reference, ids: tuple[int, ...]) -> list[tuple[str, int]]:
    """Texts of which each token has a part and that did not come before, and how many ids there are with them."""
    found: list[tuple[str, int]] = []
    for count in range(12, len(ids)):
        before, text = reference.text(ids[: count - 3]), reference.text(ids[:count])
        parts = [reference.text((token_id,)) for token_id in ids[count - 3 : count]]
        if all(part.isascii() and part for part in parts) and text == before + "".join(parts):
            stop = parts[0][-1] + parts[1] + parts[2][0]
            if stop not in reference.text(ids[: count - 1]):
                found.append((stop, count))
    return found
