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
    address: output.Address = None,
    profile: output.Profile = None,
    model: Annotated[str, typer.Option(help="The served model, when there are several.")] = "",
    chat: Annotated[bool, typer.Option("--chat", help="Send it as a user's message, by the chat template.")] = False,
    max_tokens: Annotated[int | None, typer.Option(help="At most this many new tokens; default 16.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the likeliest tokens up to this mass.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep this many likeliest tokens; 0 keeps all.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same tokens.")] = None,
    logprobs: Annotated[int | None, typer.Option(help="With --json: log-probabilities, and this many others.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the model's end tokens.")] = False,
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
    sampling = SamplingParams(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        max_tokens=max_tokens,
        seed=seed,
        logprobs=logprobs,
        ignore_eos=ignore_eos,
    )
    options: GenerateOptions = {"model": model, "sampling": sampling}
    if timeout_s is not None:
        options["timeout_s"] = timeout_s
    if chat:
        options["messages"] = [{"role": "user", "content": text}]
    client = AsyncClient(address, profile=profile)
    completion = asyncio.run(_run(client, None if chat else text, options, show=stream and not as_json))
    if as_json:
        output.json_line(output.openai_completion(completion))
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
