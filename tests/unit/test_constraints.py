"""Constraints before any model: what a user may ask for, what llguidance makes of it, and what is refused in words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from llguidance import LLMatcher, LLTokenizer

from echelon.errors import ConfigError
from models.constraints import check, compile_constraint, constraint_tokenizer
from tests.tiny import make_checkpoint

VOCABULARY, END = 352, 1  # the tokenizer has 320


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), vocab_size=VOCABULARY)


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> LLTokenizer:
    return constraint_tokenizer(directory, VOCABULARY, (END,))


def accepts(tokenizer: LLTokenizer, grammar: str, text: str) -> bool:
    """Whether the text is a whole answer."""
    assert check(tokenizer, grammar) is None
    matcher = LLMatcher(tokenizer, grammar, log_level=0)
    ids = tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def allowed(matcher: LLMatcher) -> set[int]:
    bits = matcher.compute_bitmask()
    return {token for token in range(8 * len(bits)) if bits[token // 8] >> token % 8 & 1}


def test_ids_that_the_tokenizer_does_not_know_are_never_allowed(tokenizer: LLTokenizer) -> None:
    assert tokenizer.vocab_size == VOCABULARY
    anything = allowed(LLMatcher(tokenizer, compile_constraint("regex", "(?s:.*)")))
    assert {END, 2, 319} <= anything
    assert not anything & {0, *range(320, VOCABULARY)}, "neither the begin token nor the padding"


def test_a_tokenizer_may_know_more_ids_than_the_model(directory: Path) -> None:
    assert constraint_tokenizer(directory, 300, (END,)).vocab_size == 320


def test_a_finished_answer_may_only_end(tokenizer: LLTokenizer, directory: Path) -> None:
    matcher = LLMatcher(tokenizer, compile_constraint("choice", ["a"]))
    assert matcher.consume_tokens(tokenizer.tokenize_str("a"))
    assert allowed(matcher) == {END}
    two_ends = constraint_tokenizer(directory, VOCABULARY, (END, 5))
    matcher = LLMatcher(two_ends, compile_constraint("choice", ["a"]))
    assert matcher.consume_tokens(tokenizer.tokenize_str("a"))
    assert allowed(matcher) == {END, 5}


@pytest.mark.parametrize(
    ("layout", "fits"),
    [
        ('{"a":[1,2]}', True),
        ('{"a": [1, 2]}', True),
        ('{\n  "a": [\n    1,\n    2\n  ]\n}', True),
        ('{\n\n"a":[1,2]}', False),
        ('{"a":' + " " * 33 + "[1,2]}", False),  # an answer of blanks alone must come to its end
    ],
)
def test_json_may_be_laid_out_but_not_without_end(tokenizer: LLTokenizer, layout: str, fits: bool) -> None:
    schema = {"properties": {"a": {"type": "array", "items": {"type": "integer"}}}, "required": ["a"]}
    assert (
        accepts(tokenizer, compile_constraint("json_schema", json.dumps({"type": "object", **schema})), layout) == fits
    )
    assert accepts(tokenizer, compile_constraint("json_object", True), layout) == fits


def test_any_object_is_a_json_object_and_nothing_else(tokenizer: LLTokenizer) -> None:
    grammar = compile_constraint("json_object", True)
    assert accepts(tokenizer, grammar, '{"x": {"y": [null, true, 1.5e3, "é"]}}')
    assert not accepts(tokenizer, grammar, "[1]")
    assert not accepts(tokenizer, grammar, '{"x": }')


@pytest.mark.parametrize("pattern", ["[0-9]{3}", "a/b", "x\ny", "é+|日", "^abc$"])
def test_regular_expressions_match_the_whole_answer(tokenizer: LLTokenizer, pattern: str) -> None:
    grammar = compile_constraint("regex", pattern)
    texts = {"[0-9]{3}": "042", "é+|日": "日", "^abc$": "abc"}
    text = texts.get(pattern, pattern)
    assert accepts(tokenizer, grammar, text)
    assert not accepts(tokenizer, grammar, text + "?")


TEXTS = ["yes", "no", "yes, but", 'quo"te', "back\\slash", "line\nbreak", "日本", "", "x" * 300, "a | b", "\x7f\u2028"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_choice_is_one_of_its_texts_whatever_they_hold(tokenizer: LLTokenizer, text: str) -> None:
    grammar = compile_constraint("choice", TEXTS)
    assert accepts(tokenizer, grammar, text)
    assert not accepts(tokenizer, grammar, text + "!")


def test_a_lark_grammar_is_taken_as_it_is(tokenizer: LLTokenizer) -> None:
    grammar = compile_constraint("grammar", 'start: pair ("," pair)*\npair: /[a-z]+/ "=" /[0-9]+/')
    assert accepts(tokenizer, grammar, "a=1,bc=23")
    assert not accepts(tokenizer, grammar, "a=1,")


@pytest.mark.parametrize(
    ("kind", "value", "says"),
    [
        ("json_schema", '{"type": "object", "not": {}}', 'Unimplemented keys: ["not"]'),
        ("json_schema", '{"type": "strin"}', "Invalid type: strin"),
        ("json_schema", '{"type": "string", "pattern": "("}', "unclosed group"),
        ("json_schema", '{"enum": []}', "Unsatisfiable schema"),
        ("regex", "[0-9]+(", 'invalid regex "[0-9]+(" (in regex): unclosed group'),
        ("regex", "(?=a)b", "look-around"),
        ("grammar", 'start: "a" b', 'at 1(8): unknown name: "b"'),
        ("grammar", "start: (((", "1(11): Expected token ')'"),
        ("grammar", "begin: /a/", "no start rule"),
        ("grammar", "start: loop\nloop: loop", "no text follows it"),
    ],
)
def test_what_cannot_be_followed_is_refused_with_the_reason(
    tokenizer: LLTokenizer, kind: str, value: str, says: str
) -> None:
    reason = check(tokenizer, compile_constraint(kind, value))  # type: ignore[arg-type]
    assert reason is not None and says in reason
    assert "<state>" not in reason


@pytest.mark.parametrize(
    ("kind", "value", "says"),
    [
        ("json_schema", "", "not JSON"),
        ("json_schema", '{"a": }', "line 1 column 7"),
        ("json_schema", '{"a": 1}]}', "Extra data"),
        ("json_schema", "[" * 100_000, "nested too deeply"),
        ("json_schema", "true", "must be a JSON object"),
        ("json_schema", "[1]", "must be a JSON object"),
        ("grammar", " \n", "must not be empty"),
        ("choice", [], "must not be empty"),
    ],
)
def test_what_is_not_even_of_its_kind_raises_value_error(kind: str, value: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        compile_constraint(kind, value)  # type: ignore[arg-type]


def test_a_directory_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=str(tmp_path / "tokenizer.json")):
        constraint_tokenizer(tmp_path, 10, (1,))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be used for constraints"):
        constraint_tokenizer(tmp_path, 10, (1,))
