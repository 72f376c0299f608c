"""`echelon eval`: how well the served model foretells a text, measured through the whole system.

Runs in the user's terminal, over the asynchronous client: see generate.py. Prompts are windows of a text's tokens, and
what is scored are the log-probabilities that a cluster tells of prompts. What the figures are is `evaluation.py`'s.
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from echelon.aio import AsyncClient
from echelon.cli import output
from echelon.errors import ConfigError, InternalError, NotFoundError
from echelon.evaluation import Score, Window, check_windows, longest_window, windows
from echelon.types import Completion, Model

JSON_LINES = ".jsonl"
CONCURRENCY = 16

app = typer.Typer(help="How well the served model foretells a text.", no_args_is_help=True)


@dataclass(frozen=True, slots=True)
class Ruler:
    """The windows that all texts are measured by."""

    model: str
    window: int
    stride: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """A window, and the ids in it."""

    window: Window
    ids: tuple[int, ...]


@app.command()
def perplexity(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="Texts in UTF-8; of a .jsonl each line's `text` is one document."),
    ],
    window: Annotated[
        int | None, typer.Option(help="Tokens given at once; default: the context but one.", show_default=False)
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(help="Tokens between windows; default: half a window. Fewer cost more and score better."),
    ] = None,
    documents: Annotated[int | None, typer.Option(help="Only the first so many.", min=1)] = None,
    concurrency: Annotated[int, typer.Option(help="Windows asked for at once.", min=1)] = CONCURRENCY,
    model: Annotated[str, typer.Option(help="The served model, when there are several.")] = "",
    timeout_s: Annotated[float | None, typer.Option("--timeout", help="Seconds for each window; default 600.")] = None,
    address: output.Address = None,
    profile: output.Profile = None,
    as_json: output.AsJson = False,
) -> None:
    """Perplexity, bits per byte and next-token accuracy of the served model on texts, by sliding windows.

    Every token but the first of each document is scored once, behind window - stride tokens or all there are.

    Example: echelon eval perplexity held_out.jsonl --stride 256
    """
    texts = [text for path in files for text in read_texts(path)][:documents]
    client = AsyncClient(address, profile=profile, timeout_s=timeout_s)
    start_s = time.monotonic()
    ruler, score = asyncio.run(_evaluate(client, texts, model, (window, stride), concurrency))
    shown = figures(ruler, score, time.monotonic() - start_s)
    if as_json:
        output.json_line(shown)
    else:
        output.table("", ("measure", "value"), [(name.replace("_", " "), _cell(shown[name])) for name in shown])


def read_texts(path: Path) -> list[str]:
    """The documents of a file. Raises ConfigError naming the file and what is wrong with it."""
    try:
        content = path.read_bytes().decode()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", field="files") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 at byte {error.start}", field="files") from None
    found = _json_texts(path, content) if path.suffix == JSON_LINES else [content]
    if not any(found):
        raise ConfigError(f"{path} has no text", field="files")
    return [text for text in found if text]


def _json_texts(path: Path, content: str) -> list[str]:
    texts = []
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{path}, line {number}: not JSON: {error}", field="files") from None
        text = entry.get("text") if isinstance(entry, dict) else None
        if not isinstance(text, str):
            message = f"{path}, line {number}: expected an object with a string `text`"
            raise ConfigError(message, field="files")
        texts.append(text)
    return texts


async def _evaluate(
    client: AsyncClient,
    texts: Sequence[str],
    name: str,
    sizes: tuple[int | None, int | None],
    concurrency: int,
) -> tuple[Ruler, Score]:
    """Tokenises all documents, then asks for all windows."""
    async with client:
        ruler = ruler_for(await client.models(), name, *sizes)
        prompts: list[Prompt] = []
        score = Score()
        for text in texts:
            ids = await client.tokenize(text, model=ruler.model)
            unscored = await client.detokenize(ids[:1], model=ruler.model)  # nothing, where a begin token is put before
            cut = windows(len(ids), ruler.window, ruler.stride)
            prompts += [Prompt(part, ids[part.first : part.last]) for part in cut]
            score += Score(1, len(text.encode()) - len(unscored.encode())) if cut else Score()
        if not prompts:
            raise ConfigError("no document has two tokens, so there is none to foretell", field="files")
        return ruler, score + await _scored(client, prompts, ruler, concurrency)


def ruler_for(served: Sequence[Model], name: str, window: int | None, stride: int | None) -> Ruler:
    """The model that is asked for, and sizes that it can take. Raises ConfigError naming the flag."""
    fitting = [model for model in served if name in ("", model.name)]
    if not fitting:
        names = ", ".join(model.name for model in served) or "none"
        raise NotFoundError(f"no model {name!r} is served; served: {names}", reason="MODEL_NOT_FOUND", field="model")
    context = fitting[0].max_context
    window = longest_window(context) if window is None else window
    stride = max(1, window // 2) if stride is None else stride
    check_windows(window, stride, context)
    return Ruler(fitting[0].name, window, stride)


async def _scored(client: AsyncClient, prompts: Sequence[Prompt], ruler: Ruler, concurrency: int) -> Score:
    """What the cluster says of all windows; how many are done is told on a terminal."""
    asked = ({"token_ids": prompt.ids} for prompt in prompts)
    total = Score()
    terminal = Console(stderr=True)
    with Progress(console=terminal, transient=True, disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task("windows", total=len(prompts))
        answers = client.map(
            asked, concurrency=concurrency, model=ruler.model, max_tokens=1, temperature=0.0, prompt_logprobs=1
        )
        async with aclosing(answers):
            for prompt in prompts:
                total += window_score(prompt, await anext(answers))
                progress.advance(bar)
    return total


def window_score(prompt: Prompt, answer: Completion) -> Score:
    """Of the tokens that a window scores. Raises InternalError where the answer is of other ones."""
    told = answer.prompt_logprobs
    if tuple(entry.token_id for entry in told) != prompt.ids[1:]:
        raise InternalError(
            f"log-probabilities of {len(told)} tokens came for a prompt of {len(prompt.ids)}, or of other tokens",
            request_id=answer.request_id,
        )
    scored = told[prompt.window.scored - prompt.window.first - 1 :]
    correct = sum(entry.top[0][0] == entry.token_id for entry in scored if entry.top)
    return Score(scored=len(scored), nats=-math.fsum(entry.logprob for entry in scored), correct=correct)


def figures(ruler: Ruler, score: Score, seconds: float) -> dict[str, object]:
    """What is printed, by name."""
    return {
        "model": ruler.model,
        "documents": score.documents,
        "text_bytes": score.text_bytes,
        "scored_tokens": score.scored,
        "window": ruler.window,
        "stride": ruler.stride,
        "nats_per_token": score.nats_per_token,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
        "accuracy": score.accuracy,
        "seconds": round(seconds, 3),
    }


def _cell(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
