"""`echelon chat`: what is sent as the conversation grows, its commands, pipes, and Ctrl-C on a terminal."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from echelon import convert_cluster
from echelon.cli.app import app
from echelon.errors import InvalidRequestError
from echelon.types import Model
from echelon.v1 import cluster_pb2, generation_pb2
from tests.unit.scripted import WORDS, ScriptedServer, fail, tokens

ANSWER = "".join(WORDS)
WAIT_S = 30.0


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    model = Model(name="tiny", source="/m", state="active", dtype="float32", architecture="L", max_context=100)
    listed = cluster_pb2.ListModelsResponse(models=[convert_cluster.model_to_proto(model)])
    with ScriptedServer() as scripted:
        scripted.on("ListModels", *[lambda request, context: listed] * 2)
        yield scripted


def chat(server: ScriptedServer, stdin: str | bytes, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["chat", *arguments], env={"ECHELON_ADDRESS": server.address}, input=stdin)


def sent(server: ScriptedServer) -> list[list[tuple[str, str]]]:
    """The messages of each request, as (role, content)."""
    return [[(m.role, m.content) for m in request.chat.messages] for request in server.requests["StreamGenerate"]]


def test_each_line_is_answered_with_all_before_it(server: ScriptedServer) -> None:
    server.on("StreamGenerate", *[tokens(0, 6, end=True)] * 2)
    result = chat(server, "hello\n\nand now?\n", "--system", "be brief", "--temperature", "0")
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{ANSWER}\n{ANSWER}\n", "")
    first = [("system", "be brief"), ("user", "hello")]
    assert sent(server) == [first, [*first, ("assistant", ANSWER), ("user", "and now?")]]
    sampling = server.requests["StreamGenerate"][0].sampling
    assert (sampling.temperature, sampling.max_tokens) == (0.0, 25), "a quarter of a short context"


def test_reset_forgets_and_exit_leaves(server: ScriptedServer) -> None:
    server.on("StreamGenerate", *[tokens(0, 6, end=True)] * 3)
    result = chat(server, "a\n/reset\nb\n/nonsense\n/usr is a path?\n/help\n/exit\nnever\n", "--max-tokens", "7")
    assert result.exit_code == 0
    assert sent(server) == [
        [("user", "a")],
        [("user", "b")],
        [("user", "b"), ("assistant", ANSWER), ("user", "/usr is a path?")],
    ]
    assert "/nonsense is no command; /reset begins anew" in result.stderr
    assert server.requests["StreamGenerate"][0].sampling.max_tokens == 7


def test_json_is_one_line_an_answer(server: ScriptedServer) -> None:
    server.on("StreamGenerate", *[tokens(0, 6, end=True)] * 2)
    result = chat(server, "a\nb\n", "--json")
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [answer["choices"][0]["text"] for answer in answers] == [ANSWER, ANSWER]


def test_an_error_ends_a_pipe(server: ScriptedServer) -> None:
    error = InvalidRequestError("no template", field="messages")
    server.on("StreamGenerate", tokens(0, 0, then=lambda context: fail(context, error)))
    result = chat(server, "a\nb\n")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("echelon: error: no template (request_id=")
    assert len(server.requests["StreamGenerate"]) == 1


def test_a_model_that_is_not_served_and_text_that_is_none_are_wrong_use(server: ScriptedServer) -> None:
    result = chat(server, "a\n", "--model", "other")
    assert (result.exit_code, result.stderr) == (2, "echelon: error: no model 'other' is served, but tiny\n")
    result = chat(server, b"a\xe9\n")
    assert (result.exit_code, result.stderr) == (2, "echelon: error: standard input is not UTF-8 at byte 1\n")


class Terminal:
    """The command on a terminal of its own: what is typed, what is seen, and Ctrl-C as a terminal sends it."""

    def __init__(self, address: str) -> None:
        heed = (
            "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
        )
        command = [sys.executable, "-S", "-c", heed, sys.executable, "-m", "echelon", "chat", "--address", address]
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
        os.close(slave)
        self._seen = ""

    def type(self, line: str) -> None:
        os.write(self._master, line.encode() + b"\n")

    def see(self, text: str) -> None:
        """Read on until the text has been shown; what comes after it is left for the next call."""
        deadline = time.monotonic() + WAIT_S
        while text not in self._seen:
            readable, _, _ = select.select([self._master], [], [], max(deadline - time.monotonic(), 0))
            assert readable, f"{text!r} was not shown, but {self._seen!r}"
            self._seen += os.read(self._master, 4096).decode()
        self._seen = self._seen.partition(text)[2]

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def leave(self) -> int:
        """Ctrl-C at the prompt, again if it came while the prompt was being written: readline does not see that one."""
        for _ in range(int(WAIT_S)):
            self.interrupt()
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self.process.wait(1.0)
        raise TimeoutError("Ctrl-C did not end it")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


@pytest.fixture
def terminal(server: ScriptedServer) -> Iterator[Terminal]:
    started = Terminal(server.address)
    try:
        yield started
    finally:
        started.close()


def hang(entered: threading.Event) -> Any:
    def handler(context: Any) -> None:
        gone = threading.Event()
        context.add_callback(gone.set)
        entered.set()
        gone.wait(WAIT_S)

    return handler


def test_ctrl_c_stops_the_answer_and_the_second_leaves(server: ScriptedServer, terminal: Terminal) -> None:
    cancelled = threading.Event()

    def cancel(request: Any, context: Any) -> Any:
        cancelled.set()
        return generation_pb2.CancelGenerationResponse()

    server.on("StreamGenerate", tokens(0, 2, then=hang(threading.Event())), tokens(0, 6, end=True))
    server.on("CancelGeneration", cancel)
    terminal.see("tiny at ")
    terminal.see("> ")
    terminal.type("go on")
    terminal.see("one two ")
    terminal.interrupt()
    terminal.see("(stopped)")
    assert cancelled.wait(WAIT_S)
    terminal.type("again")
    terminal.see(ANSWER)
    terminal.see("> ")
    assert sent(server)[1] == [("user", "go on"), ("assistant", "one two "), ("user", "again")]
    assert terminal.leave() == 130


def test_on_a_terminal_an_error_is_told_and_forgotten(server: ScriptedServer, terminal: Terminal) -> None:
    error = InvalidRequestError("over max_context", reason="CONTEXT_TOO_LONG")
    server.on("StreamGenerate", tokens(0, 6, end=True))
    server.on("StreamGenerate", tokens(0, 0, then=lambda context: fail(context, error)), tokens(0, 6, end=True))
    for line, shown in (("a", "six"), ("b", "/reset begins anew"), ("c", "six")):
        terminal.see("> ")
        terminal.type(line)
        terminal.see(shown)
    assert sent(server)[2] == [("user", "a"), ("assistant", ANSWER), ("user", "c")]
    terminal.see("> ")
    terminal.type("/exit")
    assert terminal.process.wait(WAIT_S) == 0
