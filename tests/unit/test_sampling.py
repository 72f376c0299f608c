"""SamplingParams, rule by rule: what may stand in a field, and the error that names it otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from types import MappingProxyType
from typing import Any

import pytest

from echelon.errors import InvalidRequestError
from echelon.sampling import CONSTRAINTS, Constraint, SamplingParams

LONE_SURROGATE = "caf\udce9"
HUGE = 10**5000  # no float, and too long to be written
NAN, INFINITY = float("nan"), float("inf")

GOOD: dict[str, tuple[Any, ...]] = {
    "temperature": (0, 0.0, 0.7, 100),
    "top_p": (1e-9, 0.5, 1, 1.0),
    "top_k": (0, 1, 2**31 - 1),
    "min_p": (0, 0.05, 1),
    "presence_penalty": (-2, 0, 2.0),
    "frequency_penalty": (-2.0, 0, 2),
    "repetition_penalty": (1e-9, 1, 1.5, 100),
    "logit_bias": ({}, {0: 100}, {2**31 - 1: -100.0}, dict.fromkeys(range(1024), 1.5)),
    "bad_words": ((), ("x" * 1000,), ("x",) * 256),
    "max_tokens": (1, 2**31 - 1),
    "min_tokens": (0, 2**31 - 1),
    "seed": (-(2**63), 0, 2**63 - 1),
    "n": (1, 128),
    "stop": ((), ("x" * 1000,), ("x",) * 64),
    "include_stop": (True, False),
    "stop_token_ids": ((), (0, 2**31 - 1), tuple(range(1024))),
    "ignore_eos": (True, False),
    "logprobs": (0, 20),
    "prompt_logprobs": (0, 20),
    "json_schema": ("{}", {"type": "object"}),
    "regex": ("a+",),
    "grammar": ('start: "a"',),
    "json_object": (True, False),
    "choice": (("yes", "no"),),
}
BAD: dict[str, tuple[Any, ...]] = {
    "temperature": (-0.1, NAN, INFINITY, HUGE, True, "1", [1]),
    "top_p": (0, -0.5, 1.01, NAN, INFINITY, True, "1"),
    "top_k": (-1, 2**31, 1.0, True, "1"),
    "min_p": (-0.01, 1.01, NAN, True, "0"),
    "presence_penalty": (-2.01, 2.01, NAN, HUGE, True, "1"),
    "frequency_penalty": (-2.01, 2.01, INFINITY, -HUGE, True, "1"),
    "repetition_penalty": (0, -1, NAN, INFINITY, HUGE, True, "1"),
    "logit_bias": (
        {"5": 1.0},
        {True: 1.0},
        {-1: 1.0},
        {2**31: 1.0},
        {5: 100.1},
        {5: NAN},
        {5: "1"},
        {5: None},
        [5],
        5,
        dict.fromkeys(range(1025), 1),
    ),
    "bad_words": (("",), ("x" * 1001,), (5,), 5, ("x",) * 257, (LONE_SURROGATE,), {"x"}),
    "max_tokens": (0, -1, 2**31, 1.0, True, "1"),
    "min_tokens": (-1, 2**31, 1.0, True, "1"),
    "seed": (-(2**63) - 1, 2**63, 1.0, True, "1"),
    "n": (0, 129, 1.0, True, "1"),
    "stop": (("",), ("x" * 1001,), (5,), 5, ("x",) * 65, (LONE_SURROGATE,), "", {"x": 1}),
    "include_stop": (0, 1, "true"),
    "stop_token_ids": ((-1,), (2**31,), (1.0,), (True,), ("1",), 5, "5", (0,) * 1025),
    "ignore_eos": (0, 1, "true"),
    "logprobs": (-1, 21, 1.0, True, "1"),
    "prompt_logprobs": (-1, 21, 1.0, True, "1"),
    "json_schema": ("", 5, ["x"], {"a": object()}, {"a": NAN}, LONE_SURROGATE),
    "regex": ("", 5, ["x"], LONE_SURROGATE),
    "grammar": ("", 5, ["x"], LONE_SURROGATE),
    "json_object": (0, 1, "true"),
    "choice": ((), ("",), (5,), 5, [], "", (LONE_SURROGATE,)),
}


def names() -> list[str]:
    return [field.name for field in fields(SamplingParams)]


def cases(table: Mapping[str, tuple[Any, ...]]) -> list[Any]:
    return [
        pytest.param(name, value, id=f"{name}-{place}")
        for name, values in table.items()
        for place, value in enumerate(values)
    ]


def test_every_field_is_tried() -> None:
    assert list(GOOD) == list(BAD) == names()


@pytest.mark.parametrize(("name", "value"), cases(GOOD))
def test_what_may_stand_in_a_field(name: str, value: Any) -> None:
    kept = getattr(SamplingParams(**{name: value}), name)
    assert kept == ('{"type": "object"}' if value == {"type": "object"} else value)


@pytest.mark.parametrize(("name", "value"), cases(BAD))
def test_what_may_not_is_told_by_field(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{name: value})
    assert caught.value.field == f"sampling.{name}"
    assert caught.value.message.startswith(name)
    assert caught.value.reason == "INVALID_FIELD"
    assert len(caught.value.message) < 300, "a long value is cut"


@pytest.mark.parametrize("name", names())
def test_none_is_what_a_field_is_that_nobody_gave(name: str) -> None:
    assert SamplingParams(**{name: None}) == SamplingParams()  # type: ignore[arg-type]


def test_a_text_alone_and_any_list_are_taken() -> None:
    assert SamplingParams(stop=".", bad_words="x", choice="yes") == SamplingParams(  # type: ignore[arg-type]
        stop=(".",), bad_words=("x",), choice=("yes",)
    )
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]
    assert SamplingParams(stop_token_ids=[3, 1]).stop_token_ids == (3, 1)  # type: ignore[arg-type]
    assert SamplingParams(stop_token_ids=range(3)).stop_token_ids == (0, 1, 2)  # type: ignore[arg-type]
    assert SamplingParams(json_schema={"type": "object"}).json_schema == '{"type": "object"}'


def test_what_was_given_can_change_without_the_params() -> None:
    bias = {5: 1.0}
    sampling = SamplingParams(logit_bias=bias)
    bias[6] = 2.0
    assert sampling.logit_bias == {5: 1.0}
    assert SamplingParams(logit_bias=MappingProxyType(bias)).logit_bias == {5: 1.0, 6: 2.0}


def test_min_tokens_may_not_exceed_max_tokens() -> None:
    assert SamplingParams(min_tokens=4, max_tokens=4)
    assert SamplingParams(min_tokens=99), "max_tokens is not settled yet"
    with pytest.raises(InvalidRequestError, match="min_tokens must be at most max_tokens=4, got 5") as caught:
        SamplingParams(min_tokens=5, max_tokens=4)
    assert caught.value.field == "sampling.min_tokens"


@pytest.mark.parametrize("first", CONSTRAINTS)
@pytest.mark.parametrize("second", CONSTRAINTS)
def test_an_answer_has_one_form(first: str, second: str) -> None:
    if first == second:
        return
    with pytest.raises(InvalidRequestError, match="an answer has one form") as caught:
        SamplingParams(**{first: GOOD[first][0], second: GOOD[second][0]})
    assert caught.value.field in (f"sampling.{first}", f"sampling.{second}")


@pytest.mark.parametrize(
    ("sampling", "constraint"),
    [
        (SamplingParams(), None),
        (SamplingParams(json_object=False), None),
        (SamplingParams(json_object=True), Constraint("json_object")),
        (SamplingParams(json_schema="{}"), Constraint("json_schema", ("{}",))),
        (SamplingParams(regex="a"), Constraint("regex", ("a",))),
        (SamplingParams(grammar="g"), Constraint("grammar", ("g",))),
        (SamplingParams(choice=("a", "b")), Constraint("choice", ("a", "b"))),
    ],
)
def test_the_constraint_is_the_one_that_was_asked_for(sampling: SamplingParams, constraint: Constraint | None) -> None:
    assert sampling.constraint == constraint


def test_a_changed_copy_is_checked_too() -> None:
    with pytest.raises(InvalidRequestError):
        replace(SamplingParams(max_tokens=4), min_tokens=5)
