"""SamplingParams as options of a command: one flag a field, the same for every command that generates.

Runs in the user's terminal. What a value may be is SamplingParams' to say; here texts become values, no more.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from echelon.errors import InvalidRequestError
from echelon.sampling import SamplingParams

_PENALTY = "Off the logits of tokens that the answer has, from -2 to 2"
_FORM = "The answer has the form of this"
_AT_FILE = "; @FILE reads it"

OPTIONS: Mapping[str, object] = {
    "max_tokens": Annotated[int | None, typer.Option(help="At most this many new tokens; default 16.")],
    "min_tokens": Annotated[int | None, typer.Option(help="Nothing ends the answer before so many.")],
    "temperature": Annotated[float | None, typer.Option(help="0 is greedy.")],
    "top_p": Annotated[float | None, typer.Option(help="Keep the likeliest tokens up to this mass.")],
    "top_k": Annotated[int | None, typer.Option(help="Keep this many likeliest tokens; 0 keeps all.")],
    "min_p": Annotated[float | None, typer.Option(help="Keep tokens of this part of the likeliest one's probability.")],
    "seed": Annotated[int | None, typer.Option(help="The same seed gives the same tokens.")],
    "n": Annotated[int | None, typer.Option("--n", help="Answers to the one prompt.")],
    "presence_penalty": Annotated[float | None, typer.Option(help=f"{_PENALTY}, once.")],
    "frequency_penalty": Annotated[float | None, typer.Option(help=f"{_PENALTY}, each time.")],
    "repetition_penalty": Annotated[
        float | None, typer.Option(help="Above 1 makes tokens of prompt and answer rarer.")
    ],
    "logit_bias": Annotated[list[str] | None, typer.Option(help="ID=BIAS, added to a token's logit; may be repeated.")],
    "bad_words": Annotated[list[str] | None, typer.Option("--bad-word", help="Never generated; may be repeated.")],
    "stop": Annotated[list[str] | None, typer.Option(help="The answer ends before this text; may be repeated.")],
    "include_stop": Annotated[bool, typer.Option("--include-stop", help="Keep the stop text in the answer.")],
    "stop_token_ids": Annotated[list[int] | None, typer.Option("--stop-token-id", help="Ends it; may be repeated.")],
    "ignore_eos": Annotated[bool, typer.Option("--ignore-eos", help="Go on past the model's end tokens.")],
    "logprobs": Annotated[int | None, typer.Option(help="With --json: log-probabilities, and this many others.")],
    "prompt_logprobs": Annotated[int | None, typer.Option(help="With --json: the same of the prompt's tokens.")],
    "json_schema": Annotated[str | None, typer.Option(help=f"{_FORM} JSON schema{_AT_FILE}.")],
    "json_object": Annotated[bool, typer.Option("--json-object", help="The answer is a JSON object.")],
    "regex": Annotated[str | None, typer.Option(help=f"{_FORM} regular expression.")],
    "grammar": Annotated[str | None, typer.Option(help=f"{_FORM} Lark grammar{_AT_FILE}.")],
    "choice": Annotated[list[str] | None, typer.Option(help="The answer is one of these; repeat it for each.")],
}
FLAGS = ("include_stop", "ignore_eos", "json_object")


def with_sampling(command: Callable[..., None], **help_of: str) -> Callable[..., None]:
    """The command with the options in place of its parameter `sampling`. help_of: what it says of some otherwise."""
    signature = inspect.signature(command, eval_str=True)
    parameters: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        if name == "sampling":
            parameters += [_parameter(name, help_of.get(name)) for name in OPTIONS]
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    def wrapped(**values: Any) -> None:
        sampling = sampling_of({name: values.pop(name) for name in OPTIONS})
        command(**values, sampling=sampling)

    wrapped.__doc__ = command.__doc__
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapped


def sampling_of(values: Mapping[str, Any]) -> SamplingParams:
    """Options as they were given. Raises InvalidRequestError naming the field."""
    given = {name: value for name, value in values.items() if value not in (None, [])}
    for name in ("json_schema", "grammar"):
        if name in given:
            given[name] = _text_of(name, given[name])
    if "logit_bias" in given:
        given["logit_bias"] = dict(_bias(entry) for entry in given["logit_bias"])
    return SamplingParams(**given)


def _parameter(name: str, help_text: str | None) -> inspect.Parameter:
    annotation: Any = OPTIONS[name]
    if help_text is not None:
        annotation = Annotated[annotation.__origin__, typer.Option(help=help_text)]
    default = False if name in FLAGS else None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _text_of(name: str, value: str) -> str:
    if not value.startswith("@"):
        return value
    try:
        return Path(value[1:]).read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidRequestError(
            f"{name} {value} cannot be read: {error.strerror}", field=f"sampling.{name}"
        ) from None
    except UnicodeDecodeError as error:
        raise InvalidRequestError(
            f"{name} {value} is not UTF-8 at byte {error.start}", field=f"sampling.{name}"
        ) from None


def _bias(entry: str) -> tuple[int, float]:
    token_id, _, bias = entry.partition("=")
    try:
        return int(token_id), float(bias)
    except ValueError:
        message = f"logit_bias must be ID=BIAS, a token id and a number, got {entry!r}"
        raise InvalidRequestError(message, field="sampling.logit_bias") from None
