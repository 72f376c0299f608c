"""What the commands share: the address option, tables, JSON, and the form of errors and results on a terminal.

Runs in the user's terminal. Knows no call.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.table import Table

from echelon.errors import ConfigError, EchelonError, InvalidRequestError
from echelon.profiles import DEFAULT_ADDRESS
from echelon.types import Choice, Completion, ItemResult

Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        "-a",
        help=f"HOST:PORT; else ECHELON_ADDRESS, the profile's, {DEFAULT_ADDRESS}.",
        show_default=False,
    ),
]
Profile = Annotated[
    str | None,
    typer.Option(
        "--profile", help="A section of ~/.config/echelon/config.toml; else ECHELON_PROFILE.", show_default=False
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]

PIPE_WIDTH = 200  # columns of a table that no terminal bounds


def exit_code(error: EchelonError) -> int:
    """2 for what the user can put right in the command or its input, 1 for everything else."""
    return 2 if isinstance(error, ConfigError | InvalidRequestError) else 1


def error_line(error: EchelonError) -> None:
    """One line on stderr, with the request's id where a log can be searched for it."""
    typer.echo(f"echelon: error: {error}", err=True)


class RetryNotice(logging.Handler):
    """Tells on stderr why a command waits, each reason once: a wait of minutes is not to look like a hang."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._told: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Print what the SDK says of a retry, if it is new."""
        why = getattr(record, "why", "")
        if why and why not in self._told:
            self._told.add(why)
            typer.echo(f"echelon: {why}; trying again until the deadline", err=True)


@contextlib.contextmanager
def retry_notices() -> Iterator[None]:
    """Within it, what the SDK waits for is told."""
    log, notice = logging.getLogger("echelon"), RetryNotice()
    level = log.level
    log.setLevel(logging.INFO)
    log.addHandler(notice)
    try:
        yield
    finally:
        log.removeHandler(notice)
        log.setLevel(level)


def forget_output() -> None:
    """Drop what is still to be written to stdout, where writing fails: the interpreter would try again at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def json_line(value: object, file: TextIO | None = None) -> None:
    """One JSON object or list on a line of its own, on stdout unless a file is given."""
    typer.echo(json.dumps(plain(value), ensure_ascii=False), file=file)


def plain(value: object) -> Any:
    """A noun as JSON's types: records by field name, enums by value, errors by reason and message."""
    match value:
        case EchelonError():
            return {"code": value.reason, "message": value.message}
        case enum.Enum():
            return value.value
        case dict():
            return {str(key): plain(item) for key, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
        case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return value


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table on stdout; nothing is cut when it goes into a pipe."""
    Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(grid(title, columns, rows))


def grid(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A table to be printed."""
    made = Table(*columns, title=title or None, title_justify="left", box=None, pad_edge=False)
    for row in rows:
        made.add_row(*(str(cell) for cell in row))
    return made


def clock(unix_s: float | None) -> str:
    """A time in the user's zone, to the second."""
    if unix_s is None:
        return "-"
    return datetime.fromtimestamp(unix_s, tz=UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def byte_count(count: int) -> str:
    """Bytes in the largest unit that leaves a number of at least 1."""
    amount, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while amount >= 1024 and len(units) > 1:
        amount, units = amount / 1024, units[1:]
    return f"{amount:.0f} B" if units[0] == "B" else f"{amount:.1f} {units[0]}"


def openai_result(job_id: str, item: ItemResult) -> dict[str, object]:
    """An item's outcome as a line of OpenAI's batch output file."""
    response = None
    if item.completion is not None:
        body = openai_completion(item.completion)
        response = {"status_code": 200, "request_id": item.completion.request_id, "body": body}
    return {
        "id": f"{job_id}.{item.index}",
        "custom_id": item.custom_id,
        "response": response,
        "error": plain(item.error) if item.error is not None else None,
    }


def openai_completion(completion: Completion) -> dict[str, object]:
    """A completion in OpenAI's form, with its token ids."""
    usage = completion.usage
    return {
        "id": completion.request_id,
        "object": "text_completion",
        "model": completion.model,
        "choices": [_openai_choice(choice) for choice in completion.choices],
        "prompt_logprobs": plain(completion.prompt_logprobs) or None,
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        },
    }


def _openai_choice(choice: Choice) -> dict[str, object]:
    return {
        "index": choice.index,
        "text": choice.text,
        "token_ids": list(choice.token_ids),
        "finish_reason": choice.finish_reason.value,
        "stop_reason": choice.matched_stop or None,
        "logprobs": plain(choice.logprobs) or None,
    }
