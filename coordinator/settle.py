"""Settles a request's sampling: what the client set, else generation_config.json, else the documented default.

In the coordinator's front end; pure. From here on nothing is left open, so a replay in another process, of another
version's defaults, draws the same tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from coordinator.grammars import Grammars
from coordinator.model_facts import ModelFacts, check_vocabulary
from coordinator.tokenizer import Tokenizer
from echelon.errors import InvalidRequestError
from echelon.internal.link import Sampling
from echelon.sampling import SamplingParams

DEFAULT_MAX_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Served:
    """The served model, and what reads texts for it."""

    facts: ModelFacts
    tokenizer: Tokenizer
    grammars: Grammars


def settle_sampling(sent: SamplingParams, served: Served, drawn_seed: int) -> Sampling:
    """Raises InvalidRequestError naming the field."""
    facts = served.facts
    defaults = facts.default_sampling
    max_tokens = DEFAULT_MAX_TOKENS if sent.max_tokens is None else sent.max_tokens
    min_tokens = sent.min_tokens or 0
    if min_tokens > max_tokens:
        raise InvalidRequestError(
            f"min_tokens={min_tokens} is over max_tokens={max_tokens}; raise max_tokens, which is "
            f"{DEFAULT_MAX_TOKENS} unless set",
            field="sampling.min_tokens",
        )
    check_vocabulary(sent.stop_token_ids, facts, "sampling.stop_token_ids")
    _check_biased(sent.logit_bias or {}, facts)
    end_ids = () if sent.ignore_eos else facts.end_ids
    return Sampling(
        temperature=_first(sent.temperature, defaults.temperature, 1.0),
        top_p=_first(sent.top_p, defaults.top_p, 1.0),
        top_k=int(_first(sent.top_k, defaults.top_k, 0)),
        max_tokens=max_tokens,
        seed=drawn_seed if sent.seed is None else sent.seed,
        stop_token_ids=tuple(dict.fromkeys((*sent.stop_token_ids, *end_ids))),
        logprobs=sent.logprobs,
        min_p=_first(sent.min_p, defaults.min_p, 0.0),
        presence_penalty=_first(sent.presence_penalty, 0.0),
        frequency_penalty=_first(sent.frequency_penalty, 0.0),
        repetition_penalty=_first(sent.repetition_penalty, defaults.repetition_penalty, 1.0),
        min_tokens=min_tokens,
        stop=sent.stop,
        include_stop=sent.include_stop,
        n=sent.n or 1,
        prompt_logprobs=sent.prompt_logprobs,
        logit_bias=tuple(sorted((token_id, float(bias)) for token_id, bias in (sent.logit_bias or {}).items())),
        bad_words=_bad_words(sent.bad_words, served.tokenizer),
        grammar=_grammar(sent, served.grammars),
    )


def _check_biased(logit_bias: Mapping[int, float], facts: ModelFacts) -> None:
    for token_id in logit_bias:
        if token_id >= facts.vocab_size:
            raise InvalidRequestError(
                f"logit_bias names token {token_id}; {facts.name!r} has {facts.vocab_size} ids, "
                f"from 0 to {facts.vocab_size - 1}",
                field="sampling.logit_bias",
            )


def _first(*values: float | None) -> float:
    return float(next(value for value in values if value is not None))


def _bad_words(words: tuple[str, ...], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Each word as it is spelt at the beginning of a text, and behind a space."""
    spellings = (tokenizer.encode_plain(text) for word in words for text in (word, f" {word.lstrip()}"))
    return tuple(dict.fromkeys(ids for ids in spellings if ids))


def _grammar(sent: SamplingParams, grammars: Grammars) -> str:
    if sent.constraint is None:
        return ""
    if sent.ignore_eos:
        raise InvalidRequestError(
            f"ignore_eos cannot go with {sent.constraint.kind}: an end token tells that the form is complete",
            field="sampling.ignore_eos",
        )
    if sent.min_tokens:
        raise InvalidRequestError(
            f"min_tokens cannot go with {sent.constraint.kind}: the answer ends where its form is complete",
            field="sampling.min_tokens",
        )
    return grammars.settle(sent.constraint)
