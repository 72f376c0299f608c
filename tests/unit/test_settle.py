"""Settling: client, then generation_config.json, then the documented default; and what only the model can judge."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest

from coordinator.grammars import Grammars
from coordinator.model_facts import ModelFacts
from coordinator.settle import Served, settle_sampling
from coordinator.tokenizer import Tokenizer
from echelon.errors import InvalidRequestError
from echelon.internal.link import Sampling
from echelon.sampling import SamplingParams
from models.config import DefaultSampling
from tests.tiny import make_checkpoint

FACTS = ModelFacts(name="tiny", vocab_size=320, max_context=64, end_ids=(1, 7))
WHOLE = SamplingParams(
    temperature=0.5,
    top_p=0.75,
    top_k=9,
    min_p=0.125,
    presence_penalty=-1.0,
    frequency_penalty=1.0,
    repetition_penalty=1.25,
    logit_bias={9: -1.0, 5: 2},
    bad_words=("x",),
    max_tokens=30,
    min_tokens=4,
    seed=-3,
    n=3,
    stop=("</s>", "x"),
    include_stop=True,
    stop_token_ids=(9, 1),
    logprobs=2,
    prompt_logprobs=0,
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    directory = make_checkpoint(tmp_path_factory.mktemp("model"))
    return serve(directory, FACTS)


def serve(directory: Path, facts: ModelFacts) -> Served:
    return Served(facts, Tokenizer.from_directory(directory), Grammars(directory, facts))


def settle(served: Served, sent: SamplingParams) -> Sampling:
    return settle_sampling(sent, served, drawn_seed=99)


def test_what_nobody_says_is_the_documented_default(served: Served) -> None:
    settled = settle(served, SamplingParams())
    assert settled == Sampling(
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_tokens=16,
        seed=99,
        stop_token_ids=(1, 7),
        logprobs=None,
        min_p=0.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        repetition_penalty=1.0,
        min_tokens=0,
        stop=(),
        include_stop=False,
        n=1,
        prompt_logprobs=None,
        logit_bias=(),
        bad_words=(),
        grammar="",
    )


def test_what_the_client_says_is_settled_as_it_was_said(served: Served) -> None:
    defaults = DefaultSampling(temperature=0.6, top_p=0.9, top_k=20, min_p=0.05, repetition_penalty=1.1)
    settled = settle(replace(served, facts=replace(FACTS, default_sampling=defaults)), WHOLE)
    assert settled == Sampling(
        temperature=0.5,
        top_p=0.75,
        top_k=9,
        max_tokens=30,
        seed=-3,
        stop_token_ids=(9, 1, 7),
        logprobs=2,
        min_p=0.125,
        presence_penalty=-1.0,
        frequency_penalty=1.0,
        repetition_penalty=1.25,
        min_tokens=4,
        stop=("</s>", "x"),
        include_stop=True,
        n=3,
        prompt_logprobs=0,
        logit_bias=((5, 2.0), (9, -1.0)),
        bad_words=settled.bad_words,
        grammar="",
    )
    assert settled.bad_words
    plain = settle(served, SamplingParams())
    same = {field.name for field in fields(Sampling) if getattr(settled, field.name) == getattr(plain, field.name)}
    assert same == {"grammar"}, "this test tells every other field from its default"


@pytest.mark.parametrize(
    ("defaults", "sent", "name", "value"),
    [
        (DefaultSampling(temperature=0.6), None, "temperature", 0.6),
        (DefaultSampling(temperature=0.6), 0.0, "temperature", 0.0),
        (DefaultSampling(top_p=0.9), None, "top_p", 0.9),
        (DefaultSampling(top_p=0.9), 1.0, "top_p", 1.0),
        (DefaultSampling(top_k=20), None, "top_k", 20),
        (DefaultSampling(top_k=20), 0, "top_k", 0),
        (DefaultSampling(min_p=0.05), None, "min_p", 0.05),
        (DefaultSampling(min_p=0.05), 0.0, "min_p", 0.0),
        (DefaultSampling(repetition_penalty=1.1), None, "repetition_penalty", 1.1),
        (DefaultSampling(repetition_penalty=1.1), 1.0, "repetition_penalty", 1.0),
    ],
)
def test_generation_config_stands_between(
    served: Served, defaults: DefaultSampling, sent: float | None, name: str, value: float
) -> None:
    facts = replace(FACTS, default_sampling=defaults)
    settled = settle(replace(served, facts=facts), SamplingParams(**{name: sent}))  # type: ignore[arg-type]
    assert settled == replace(settle(served, SamplingParams()), **{name: value})  # type: ignore[arg-type]


def test_end_ids_end_an_answer_unless_they_are_ignored(served: Served) -> None:
    assert settle(served, SamplingParams(stop_token_ids=(9, 7))).stop_token_ids == (9, 7, 1)
    assert settle(served, SamplingParams(stop_token_ids=(9, 7), ignore_eos=True)).stop_token_ids == (9, 7)
    assert settle(served, SamplingParams(ignore_eos=True)).stop_token_ids == ()


def test_numbers_of_either_kind_settle_alike(served: Served) -> None:
    whole = settle(served, SamplingParams(temperature=1, logit_bias={5: 1}, presence_penalty=1))
    fraction = settle(served, SamplingParams(temperature=1.0, logit_bias={5: 1.0}, presence_penalty=1.0))
    assert repr(whole) == repr(fraction), "what a replay reads from the journal is what was settled"


@pytest.mark.parametrize(
    ("sent", "field", "message"),
    [
        (
            SamplingParams(min_tokens=17),
            "sampling.min_tokens",
            "min_tokens=17 is over max_tokens=16; raise max_tokens, which is 16 unless set",
        ),
        (
            SamplingParams(logit_bias={5: 1.0, 320: 1.0}),
            "sampling.logit_bias",
            "logit_bias names token 320; 'tiny' has 320",
        ),
        (SamplingParams(stop_token_ids=(5, 320)), "sampling.stop_token_ids", r"stop_token_ids\[1\] = 320 is outside"),
    ],
)
def test_what_only_the_model_can_judge_names_its_field(
    served: Served, sent: SamplingParams, field: str, message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        settle(served, sent)
    assert caught.value.field == field
    settle(served, SamplingParams(min_tokens=16))
    settle(served, SamplingParams(logit_bias={319: 1.0}, stop_token_ids=(319,)))


def holds(text: tuple[int, ...], word: tuple[int, ...]) -> bool:
    return any(text[start : start + len(word)] == word for start in range(len(text)))


@pytest.mark.parametrize("word", ["fox", " fox"])
def test_a_bad_word_is_known_with_and_without_a_space_before_it(served: Served, word: str) -> None:
    spellings = settle(served, SamplingParams(bad_words=(word,))).bad_words
    encode = served.tokenizer.encode
    assert any(holds(encode("The quick brown fox jumps"), spelling) for spelling in spellings)
    assert any(holds(encode("fox jumps"), spelling) for spelling in spellings) == (word == "fox")
    assert {served.tokenizer.decode(spelling) for spelling in spellings} == {word, " fox"}
    begin = served.tokenizer.encode("")[0]
    assert all(begin not in spelling for spelling in spellings), "a word is no beginning of a text"


def test_bad_words_that_are_spelt_alike_are_told_once(served: Served) -> None:
    spellings = settle(served, SamplingParams(bad_words=("fox", " fox", "fox"))).bad_words
    assert len(spellings) == len(set(spellings)) == 2
