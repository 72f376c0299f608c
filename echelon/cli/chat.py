"""`echelon chat`: a conversation in the terminal, or line by line through a pipe.

Runs in the user's terminal, over the asynchronous client: see generate.py. Reading a line is plain and blocking, each
answer is one run of the event loop: so Ctrl-C means the answer while there is one, and leaves otherwise.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated

import typer

from echelon.aio import AsyncClient
from echelon.chat import ChatMessage
from echelon.cli import output
from echelon.errors import EchelonError, InvalidRequestError
from echelon.internal.generate import GenerateOptions
from echelon.sampling import SamplingParams
from echelon.types import Completion, FinishReason, Model

PROMPT = "> "
MAX_TOKENS = 512
MAX_TOKENS_HELP = f"At most this many tokens an answer; default {MAX_TOKENS}, or a quarter of a short context."
HELP = "/reset begins anew, /exit leaves; Ctrl-C stops an answer, and leaves where there is none"


def chat(
    sampling: SamplingParams,
    system: Annotated[str, typer.Option(help="What the model is told before the conversation.")] = "",
    model: Annotated[str, typer.Option(help="The served model, when there are several.")] = "",
    address: output.Address = None,
    profile: output.Profile = None,
    as_json: output.AsJson = False,
) -> None:
    """Talk to the model: a message a line, each answered with all that was said before. /help names the commands.

    Example: echelon chat --system "Answer in one sentence."
    """
    if sampling.n not in (None, 1):
        raise InvalidRequestError(f"n must be 1 in a chat, got {sampling.n}", field="sampling.n")
    client = AsyncClient(address, profile=profile)
    with asyncio.Runner() as runner:
        try:
            served = _choose(runner.run(client.models()), model)
            if sampling.max_tokens is None:
                sampling = replace(sampling, max_tokens=max(min(MAX_TOKENS, served.max_context // 4), 1))
            options: GenerateOptions = {"model": model, "sampling": sampling}
            talk = Talk(runner, client, options, Conversation(system), sys.stdin.isatty(), as_json)
            talk.tell(f"{served.name} at {client.address}; {HELP}")
            for line in _lines(talk.on_terminal):
                if not talk.turn(line):
                    break
        finally:
            runner.run(client.close())


@dataclass(slots=True)
class Conversation:
    """What was said so far, as it is sent with the next message."""

    system: str = ""
    messages: list[ChatMessage] = field(default_factory=list)

    def with_message(self, text: str) -> list[ChatMessage]:
        """All that goes with a new message."""
        first = [ChatMessage("system", self.system)] if self.system else []
        return [*first, *self.messages, ChatMessage("user", text)]

    def add(self, text: str, answer: str) -> None:
        """A message and its answer, or as much of it as came."""
        self.messages += [ChatMessage("user", text), ChatMessage("assistant", answer)]


@dataclass(slots=True)
class Talk:
    """One run of the command. on_terminal: somebody sits there, who reads remarks and can go on after an error."""

    runner: asyncio.Runner
    client: AsyncClient
    options: GenerateOptions
    conversation: Conversation
    on_terminal: bool
    as_json: bool

    def tell(self, remark: str) -> None:
        """A remark of ours, which a pipe is spared."""
        if self.on_terminal:
            typer.echo(remark, err=True)

    def turn(self, line: str) -> bool:
        """One line of the user's; False to leave. A command is a single word: other lines may begin with a slash."""
        match line.strip():
            case "":
                return True
            case "/exit" | "/quit":
                return False
            case "/reset":
                self.conversation.messages.clear()
                self.tell("the conversation is forgotten")
            case "/help":
                typer.echo(HELP, err=True)
            case word if word.startswith("/") and len(word.split()) == 1:
                typer.echo(f"{word} is no command; {HELP}", err=True)
            case text:
                self.answer(text)
        return True

    def answer(self, text: str) -> None:
        """Print the answer as it comes. An error ends a pipe; on a terminal the message is forgotten."""
        pieces: list[str] = []
        try:
            completion = self.runner.run(self._ask(text, pieces))
        except KeyboardInterrupt:
            typer.echo("\n(stopped)", err=True)
        except EchelonError as error:
            if not self.on_terminal:
                raise
            output.error_line(error)
            if error.reason == "CONTEXT_TOO_LONG" and self.conversation.messages:
                self.tell("the conversation has grown too long: /reset begins anew")
            return
        else:
            if self.as_json:
                output.json_line(output.openai_completion(completion))
            else:
                typer.echo()
            if completion.finish_reason is FinishReason.LENGTH:
                self.tell("(cut at --max-tokens)")
        self.conversation.add(text, "".join(pieces))

    async def _ask(self, text: str, pieces: list[str]) -> Completion:
        """The answer; pieces get its text as it comes. A cancel on the way is one at the server too."""
        options: GenerateOptions = {**self.options, "messages": self.conversation.with_message(text)}
        async with self.client.stream(**options) as events:
            async for event in events:
                pieces.append(event.text)
                if not self.as_json:
                    typer.echo(event.text, nl=False)
        assert events.completion is not None, "a stream without an error has its answer"
        return events.completion


def _choose(models: list[Model], name: str) -> Model:
    served = [model for model in models if name in ("", model.name)]
    if not served:
        names = ", ".join(model.name for model in models)
        raise InvalidRequestError(f"no model {name!r} is served, but {names or 'none'}", field="model")
    return served[0]


def _lines(on_terminal: bool) -> Iterator[str]:
    """What the user types, until its end. Raises KeyboardInterrupt for Ctrl-C at the prompt."""
    if on_terminal:
        import readline  # noqa: F401 - gives input() its editing and history

    while True:
        try:
            yield input(PROMPT if on_terminal else "")
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise InvalidRequestError(f"standard input is not UTF-8 at byte {error.start}", field="messages") from None
