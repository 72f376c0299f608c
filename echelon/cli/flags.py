"""The flags of `echelon serve` as options of a command: each a field of ServeConfig, none written down twice.

In the user's terminal. What a value may be is ServeConfig's to say; here every flag is a text.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any

import typer

from echelon.config import ServeConfig, flag_of


def flag_parameters(
    without: Collection[str] = (), defaults: Mapping[str, object] | None = None
) -> list[inspect.Parameter]:
    """One for each field. defaults: what is said of those that are others here."""
    parameters = []
    for name, field in ServeConfig.model_fields.items():
        if name in without:
            continue
        text, default = field.description or "", (defaults or {}).get(name, field.default)
        if default not in (None, "auto") and not field.is_required():
            text += f" Default: {default}."
        metavar = name.rsplit("_", 1)[-1].upper()
        option = typer.Option(f"--{flag_of(name)}", help=text, show_default=False, metavar=metavar)
        flag = Annotated[str | None, option]
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=flag))
    return parameters


def with_flags(
    command: Callable[..., None], without: Collection[str] = (), defaults: Mapping[str, object] | None = None
) -> Callable[..., None]:
    """The command with the flags in place of its parameter `flags`, which gets what was given by field name."""
    flags = flag_parameters(without, defaults)
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        parameters += flags if name == "flags" else [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)]

    def wrapped(**values: Any) -> None:
        given = {flag.name: values.pop(flag.name) for flag in flags}
        command(**values, flags=given)

    wrapped.__doc__ = command.__doc__
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapped
