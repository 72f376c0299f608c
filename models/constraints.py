"""Constraints on the text of an answer, by llguidance: from a request's form to a grammar, and to the tokens it allows.

Read by the coordinator, which settles and checks a constraint before a request is admitted, and by every rank, which
follows the same grammar over the same vocabulary. It knows no torch, no request and no slot.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, get_args

from llguidance import LLMatcher, LLTokenizer

from echelon.errors import ConfigError

Kind = Literal["json_schema", "json_object", "regex", "grammar", "choice"]

# Between the parts of a JSON text: enough to lay it out readably, not so much that an answer need never end.
_WHITESPACE = r"\n?[ \t]{0,32}"


def constraint_tokenizer(directory: Path, vocab_size: int, end_ids: Sequence[int]) -> LLTokenizer:
    """The vocabulary of a model directory as matchers read it: ids that its tokenizer does not know are never allowed.

    vocab_size and end_ids are the model's. Takes a second for 130,000 tokens, with the interpreter's lock held.
    Raises ConfigError naming the file.
    """
    file = directory / "tokenizer.json"
    try:
        source = file.read_text(encoding="utf-8")
        try:
            return LLTokenizer(source, n_vocab=vocab_size, eos_token=list(end_ids))
        except ValueError:  # a tokenizer may know more ids than its model
            return LLTokenizer(source, eos_token=list(end_ids))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be used for constraints: {error}", field="model") from error


def compile_constraint(kind: Kind, value: str | bool | Iterable[str]) -> str:
    """The grammar of a constraint in llguidance's own form, never empty; whether it can be followed is `check`'s.

    value: a JSON Schema, a regular expression or a Lark grammar as text; True for json_object; texts for choice.
    Raises ValueError where the value is not even that.
    """
    assert kind in get_args(Kind), kind
    match kind, value:
        case "json_schema", str():
            return _json_grammar(_parsed_schema(value))
        case "json_object", True:
            return _json_grammar({"type": "object"})
        case "regex", str():
            return str(LLMatcher.grammar_from_regex(value))
        case "grammar", str() if value.strip():
            return str(LLMatcher.grammar_from_lark(value))
        case "choice", Iterable() if not isinstance(value, str) and (texts := tuple(value)):
            # One terminal, which is one automaton; rules would be followed side by side.
            return "start: CHOICE\nCHOICE: " + " | ".join(json.dumps(text) for text in texts)
    raise ValueError(f"{kind} must not be empty")


def check(tokenizer: LLTokenizer, grammar: str) -> str | None:
    """Why no answer can follow a grammar, with the place where that is known; None if some can begin to."""
    refused, messages = LLMatcher.validate_grammar_with_warnings(grammar, tokenizer)
    if refused:
        return _without_picture(str(messages[0]).strip())
    matcher = LLMatcher(tokenizer, grammar, log_level=0)
    matcher.compute_bitmask()
    return f"no text follows it: {error_of(matcher)}" if matcher.is_error() else None


def error_of(matcher: LLMatcher) -> str:
    """What a matcher that has failed says, without the dump of its state."""
    return str(matcher.get_error()).partition("\n<state>")[0].strip()


def _without_picture(message: str) -> str:
    """In one line what llguidance says of a regex that does not parse, which it draws; other messages as they are."""
    found = re.search(r"regex parse error:.*?^error: ([^\n]+)", message, re.DOTALL | re.MULTILINE)
    return message[: found.start()] + found[1] if found else message


def _json_grammar(schema: dict[str, object]) -> str:
    return str(LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults={"whitespace_pattern": _WHITESPACE}))


def _parsed_schema(text: str) -> dict[str, object]:
    try:
        schema = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"it is not JSON: {error}") from None
    if not isinstance(schema, dict):
        raise ValueError("it must be a JSON object")
    return schema
