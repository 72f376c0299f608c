"""`echelon generate`: one prompt, its answer as it comes.

Runs in the user's terminal, over the asynchronous client: there Ctrl-C is a cancel at a known place, where in a
blocking call it would strike anywhere inside gRPC.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Annotated

import typer

from echelon.aio import AsyncClient
from echelon.cli import output
from echelon.errors import InvalidRequestError
from echelon.internal.generate import GenerateOptions
from echelon.sampling import SamplingParams
from echelon.types import Completion


def generate(
    prompt: Annotated[str, typer.Argument(help="The text to go on from; - reads standard input.")],
    sampling: SamplingParams,
    address: output.Address = None,
    profile: output.Profile = None,
    model: Annotated[str, typer.Option(help="The served model, when there are several.")] = "",
    chat: Annotated[bool, typer.Option("--chat", help="Send it as a user's message, by the chat template.")] = False,
    priority: Annotated[int, typer.Option(help="Lower goes first.")] = 0,
    timeout_s: Annotated[
        float | None, typer.Option("--timeout", help="Seconds until the whole answer; default 600.")
    ] = None,
    stream: Annotated[bool, typer.Option(help="Print tokens as they come, or the answer at its end.")] = True,
    as_json: output.AsJson = False,
) -> None:
    """Generate text.

    Example: echelon generate "Once upon a time" --max-tokens 64 --temperature 0
    """
    text = _standard_input() if prompt == "-" else prompt
    options: GenerateOptions = {"model": model, "sampling": sampling, "priority": priority}
    if timeout_s is not None:
        options["timeout_s"] = timeout_s
    if chat:
        options["messages"] = [{"role": "user", "content": text}]
    stream = stream and not as_json and (sampling.n or 1) == 1  # several answers at once cannot be read
    client = AsyncClient(address, profile=profile)
    completion = asyncio.run(_run(client, None if chat else text, options, show=stream))
    if as_json:
        output.json_line(output.openai_completion(completion))
    elif len(completion.choices) > 1:
        for choice in completion.choices:
            typer.echo(f"[{choice.index}] {choice.text}")
    else:
        typer.echo("" if stream else completion.text)


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"standard input is not UTF-8 at byte {error.start}", field="prompt") from None


async def _run(client: AsyncClient, prompt: str | None, options: GenerateOptions, *, show: bool) -> Completion:
    """The whole answer. Ctrl-C leaves the `with` and so cancels the request at the server as well."""
    async with client, client.stream(prompt, **options) as events:
        async for event in events:
            if show:
                typer.echo(event.text, nl=False)
    assert events.completion is not None, "a stream without an error has its answer"
    return events.completion
