"""SamplingParams: how the tokens of an answer are drawn, what ends it, and what form it must have.

Shared by the SDK and the coordinator; checks each field by itself and knows neither models nor messages. What a field
left at None becomes is settled by the coordinator, from the model's generation_config.json and the defaults told here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

from echelon.errors import InvalidRequestError

MAX_LOGPROBS = 20
MAX_CHOICES = 128
MAX_STOPS = 64
MAX_BAD_WORDS = 256
MAX_STOP_IDS = 1024
MAX_TEXT_CHARACTERS = 1000  # of a stop string or a bad word
MAX_BIASES = 1024
MAX_PENALTY = 2.0
MAX_BIAS = 100.0
SEED_RANGE = range(-(2**63), 2**63)
MAX_SHOWN_CHARACTERS = 100


@dataclass(frozen=True, slots=True)
class Constraint:
    """The form that every answer has. kind is the SamplingParams field; texts are its text, or the alternatives."""

    kind: str
    texts: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How tokens are drawn. What is None takes the model's generation_config.json, then the default named here.

    temperature: >= 0, 0 is greedy; default 1.       top_p: in (0, 1]; default 1.
    top_k: >= 0, 0 keeps every token; default 0.     min_p: in [0, 1], of the likeliest token's probability; default 0.
    presence_penalty, frequency_penalty: in [-2, 2], off the logits of generated tokens, once or each time; default 0.
    repetition_penalty: > 0, divides (or multiplies, if negative) logits of tokens of prompt and answer; default 1.
    logit_bias: token id -> what is added to its logit, in [-100, 100].
    bad_words: texts that are never generated.
    max_tokens: >= 1; default 16.                    min_tokens: nothing ends the answer before so many; default 0.
    seed: drawn by the server when None.             n: answers to the one prompt, 1 to 128; default 1.
    stop: the answer ends before any of these texts (include_stop keeps it in).
    stop_token_ids: end the answer, and are part of it. ignore_eos: go on past the model's end tokens.
    logprobs: None for none, k for each token's own and the k likeliest (0 <= k <= 20). prompt_logprobs: of the prompt.
    json_schema (text or mapping), regex, grammar (Lark), json_object, choice (texts): at most one; the answer's form.

    Raises InvalidRequestError naming the field.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None
    bad_words: tuple[str, ...] = ()
    max_tokens: int | None = None
    min_tokens: int | None = None
    seed: int | None = None
    n: int | None = None
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    json_schema: str | Mapping[str, object] | None = None
    regex: str | None = None
    grammar: str | None = None
    json_object: bool = False
    choice: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for each in fields(self):
            name, value = each.name, getattr(self, each.name)
            if value is None:
                object.__setattr__(self, name, each.default)
                continue
            if name in _NORMALIZED:
                value = _NORMALIZED[name](name, value)
                object.__setattr__(self, name, value)
            if name in _RULES:
                allowed, rule = _RULES[name]
                if not allowed(value):
                    raise _invalid(name, f"must be {rule}, got {shown(value)}")
        if self.min_tokens is not None and self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _invalid("min_tokens", f"must be at most max_tokens={self.max_tokens}, got {self.min_tokens}")
        forms = [name for name in CONSTRAINTS if getattr(self, name) not in (None, False)]
        if len(forms) > 1:
            raise _invalid(forms[1], f"cannot be combined with {forms[0]}: an answer has one form")

    @property
    def constraint(self) -> Constraint | None:
        """The form that was asked for, if one was."""
        for kind in CONSTRAINTS:
            value = getattr(self, kind)
            if value not in (None, False):
                return Constraint(kind, value if isinstance(value, tuple) else () if value is True else (value,))
        return None


CONSTRAINTS = ("json_schema", "regex", "grammar", "json_object", "choice")


def shown(value: object) -> str:
    """A value as an error tells it, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"{type(value).__name__} of too many digits"
    return text if len(text) <= MAX_SHOWN_CHARACTERS else text[: MAX_SHOWN_CHARACTERS - 3] + "..."


def check_text(name: str, value: object, field: str) -> str:
    """The value, unless no message can carry it: no string, or half of a surrogate pair, as misread bytes have."""
    if not isinstance(value, str):
        raise InvalidRequestError(f"{name} must be a string, got {shown(value)}", field=field)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        rule = f"must be text, but its character {error.start} is half of a surrogate pair"
        raise InvalidRequestError(f"{name} {rule}", field=field) from None
    return value


def _invalid(name: str, rule: str) -> InvalidRequestError:
    return InvalidRequestError(f"{name} {rule}", field=f"sampling.{name}")


def _texts(name: str, value: object) -> tuple[str, ...]:
    """One text alone is taken for a list of it, as OpenAI's clients do."""
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)):
        raise _invalid(name, f"must be a text or a list of texts, got {shown(value)}")
    return tuple(check_text(f"{name}[{place}]", text, f"sampling.{name}") for place, text in enumerate(texts))


def _text(name: str, value: object) -> str:
    return check_text(name, value, f"sampling.{name}")


def _json_text(name: str, value: object) -> str:
    if not isinstance(value, Mapping):
        return _text(name, value)
    try:
        return json.dumps(dict(value), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise _invalid(name, f"must be JSON: {error}") from None


def _ids(name: str, value: object) -> object:
    return tuple(value) if isinstance(value, (list, set, frozenset, range)) else value


def _biases(name: str, value: object) -> object:
    return dict(value) if isinstance(value, Mapping) else value


_NORMALIZED: Mapping[str, Callable[[str, object], object]] = {
    "stop": _texts,
    "bad_words": _texts,
    "choice": _texts,
    "regex": _text,
    "grammar": _text,
    "json_schema": _json_text,
    "stop_token_ids": _ids,
    "logit_bias": _biases,
}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(low: float, high: float) -> Callable[[object], bool]:
    return lambda value: _is_number(value) and low <= value <= high  # type: ignore[operator]


def _integer(low: int, high: int = 2**31 - 1) -> Callable[[object], bool]:
    return lambda value: _is_integer(value) and low <= value <= high  # type: ignore[operator]


def _is_id(value: object) -> bool:
    return _is_integer(value) and 0 <= value < 2**31  # type: ignore[operator]


def _is_bias(value: object) -> bool:
    in_range = _number(-MAX_BIAS, MAX_BIAS)
    return (
        isinstance(value, Mapping)
        and len(value) <= MAX_BIASES
        and all(_is_id(token_id) and in_range(bias) for token_id, bias in value.items())
    )


def _list_of_texts(most: int) -> Callable[[object], bool]:
    return lambda value: (
        isinstance(value, tuple) and len(value) <= most and all(1 <= len(text) <= MAX_TEXT_CHARACTERS for text in value)
    )


_PENALTY = (_number(-MAX_PENALTY, MAX_PENALTY), f"a number from {-MAX_PENALTY:g} to {MAX_PENALTY:g}")
_LOGPROBS = (_integer(0, MAX_LOGPROBS), f"an integer from 0 to {MAX_LOGPROBS}")
_NOT_EMPTY = (bool, "a text that is not empty")
_TEXTS = f"texts of 1 to {MAX_TEXT_CHARACTERS} characters"
_FLAG = (lambda value: isinstance(value, bool), "true or false")
_RULES: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "temperature": (_number(0, sys.float_info.max), "a finite number >= 0"),
    "top_p": (lambda value: _is_number(value) and 0 < value <= 1, "in (0, 1]"),  # type: ignore[operator]
    "top_k": (_integer(0), "an integer >= 0"),
    "min_p": (_number(0, 1), "in [0, 1]"),
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "repetition_penalty": (lambda value: _is_number(value) and value > 0, "a finite number > 0"),  # type: ignore[operator]
    "logit_bias": (
        _is_bias,
        f"at most {MAX_BIASES} token ids, each with a number from {-MAX_BIAS:g} to {MAX_BIAS:g}",
    ),
    "bad_words": (_list_of_texts(MAX_BAD_WORDS), f"at most {MAX_BAD_WORDS} {_TEXTS}"),
    "max_tokens": (_integer(1), "an integer >= 1"),
    "min_tokens": (_integer(0), "an integer >= 0"),
    "seed": (lambda value: _is_integer(value) and value in SEED_RANGE, "a 64-bit signed integer"),
    "n": (_integer(1, MAX_CHOICES), f"an integer from 1 to {MAX_CHOICES}"),
    "stop": (_list_of_texts(MAX_STOPS), f"at most {MAX_STOPS} {_TEXTS}"),
    "include_stop": _FLAG,
    "stop_token_ids": (
        lambda value: isinstance(value, tuple) and len(value) <= MAX_STOP_IDS and all(map(_is_id, value)),
        f"at most {MAX_STOP_IDS} token ids, integers >= 0",
    ),
    "ignore_eos": _FLAG,
    "logprobs": _LOGPROBS,
    "prompt_logprobs": _LOGPROBS,
    "json_schema": _NOT_EMPTY,
    "regex": _NOT_EMPTY,
    "grammar": _NOT_EMPTY,
    "json_object": _FLAG,
    "choice": (
        lambda value: isinstance(value, tuple) and bool(value) and all(value),
        "one or more texts, none of them empty",
    ),
}
