"""`echelon eval perplexity`: every token is scored once behind what it may see, and each figure is what it says."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from echelon import AsyncClient, Client, ConfigError, InvalidRequestError, convert, convert_cluster
from echelon.cli.app import app
from echelon.evaluation import Score, check_windows, windows
from echelon.types import Admitted, Choice, Completion, FinishReason, Model, TokenLogprob
from echelon.v1 import cluster_pb2, generation_pb2
from tests.unit.scripted import ScriptedServer

BEGIN, CONTEXT = 256, 21
MODEL = Model(name="tiny", source="", state="active", dtype="float32", architecture="", max_context=CONTEXT)


@given(tokens=st.integers(0, 90), window=st.integers(2, 40), data=st.data())
def test_every_token_but_the_first_is_scored_once(tokens: int, window: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, window - 1))
    made = windows(tokens, window, stride)
    scored = [token for part in made for token in range(part.scored, part.last)]
    assert scored == list(range(1, tokens))
    for part in made:
        assert part.first < part.scored < part.last <= part.first + window
        assert part.scored - part.first >= min(part.scored, window - stride)
    assert [part.first for part in made] == [stride * number for number in range(len(made))]


@pytest.mark.parametrize(
    ("window", "stride", "message"),
    [
        (21, 1, "window=21 must be 2 to 20: max_context=21 less the one token"),
        (1, 1, "window=1 must be 2 to 20"),
        (8, 8, "stride=8 must be 1 to 7: below window=8"),
        (8, 0, "stride=0 must be 1 to 7"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(window: int, stride: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_windows(window, stride, CONTEXT)
    check_windows(20, 19, CONTEXT)


def test_figures() -> None:
    """Four tokens of two bits each, for three bytes."""
    score = Score(1, 3, 1, 2 * math.log(2), 0) + Score(0, 0, 3, 6 * math.log(2), 2)
    assert score.scored == 4 and score.documents == 1
    assert score.perplexity == pytest.approx(4)
    assert score.nats_per_token == pytest.approx(2 * math.log(2))
    assert score.bits_per_byte == pytest.approx(8 / 3)
    assert score.accuracy == 0.5
    assert Score(1, 1, 1, 1e6).perplexity == math.inf


class ByteModel:
    """A server whose tokens are bytes, behind a begin token if it has one. What it holds of a token tells how many it
    was given before it: p = 1 / (1 + tokens), and it is the likeliest where its id is even."""

    def __init__(self, server: ScriptedServer, *, begin: bool = True) -> None:
        self.begin = begin
        listed = cluster_pb2.ListModelsResponse(models=[convert_cluster.model_to_proto(MODEL)])
        server.on("ListModels", lambda request, context: listed)
        server.on("Tokenize", *20 * [self.tokenize])
        server.on("Detokenize", *20 * [self.detokenize])
        server.on("StreamGenerate", *500 * [self.generate])

    def tokenize(self, request: Any, context: Any) -> Message:
        ids = [*([BEGIN] if self.begin else []), *request.text.encode()]
        return generation_pb2.TokenizeResponse(token_ids=ids, max_context=CONTEXT)

    def detokenize(self, request: Any, context: Any) -> Message:
        return generation_pb2.DetokenizeResponse(text=bytes(x for x in request.token_ids if x != BEGIN).decode())

    def generate(self, request: Any, context: Any) -> Iterator[Message]:
        yield convert.stream_to_proto(Admitted(request.request_id, 3, 99))
        choice = Choice(text="", token_ids=(1,), finish_reason=FinishReason.LENGTH)
        logprobs = self.logprobs(list(request.token_ids.ids))
        yield convert.stream_to_proto(
            Completion(request_id=request.request_id, model="tiny", choices=(choice,), prompt_logprobs=logprobs)
        )

    def logprobs(self, ids: list[int]) -> tuple[TokenLogprob, ...]:
        return tuple(
            TokenLogprob(ids[place], -math.log(1 + place), ((ids[place] + ids[place] % 2, -0.1),))
            for place in range(1, len(ids))
        )


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as scripted:
        yield scripted


def evaluate(server: ScriptedServer, *arguments: object) -> Result:
    command = ["eval", "perplexity", "--address", server.address, *map(str, arguments)]
    return CliRunner().invoke(app, command)


def found(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    content: dict[str, Any] = json.loads(result.stdout)
    return content


@pytest.mark.parametrize("begin", [True, False])
def test_the_command_scores_what_the_cluster_says(server: ScriptedServer, tmp_path: Path, begin: bool) -> None:
    """A text of one window, and one of several whose later tokens have at least window - stride before them."""
    ByteModel(server, begin=begin)
    texts = ["short", "", "a text of more bytes than a window"]
    path = tmp_path / "held_out.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts) + "\n")
    shown = found(evaluate(server, path, "--window", 10, "--stride", 4, "--json"))
    first = int(not begin)  # of its tokens, the one that none is before
    nats, correct, parts = 0.0, 0, [text.encode() for text in texts if text]
    for part in parts:
        for index in range(first, len(part)):
            token = index + 1 - first  # by its place among the tokens
            before = token if token < 10 else 6 + (token - 10) % 4
            nats, correct = nats + math.log(1 + before), correct + (part[index] % 2 == 0)
    scored = sum(len(part) - first for part in parts)
    assert (shown["documents"], shown["scored_tokens"], shown["text_bytes"]) == (2, scored, scored)
    assert shown["nats_per_token"] == pytest.approx(nats / scored)
    assert shown["perplexity"] == pytest.approx(math.exp(nats / scored))
    assert shown["bits_per_byte"] == pytest.approx(nats / scored / math.log(2))
    assert shown["accuracy"] == pytest.approx(correct / scored)
    (sampling,) = {(r.sampling.max_tokens, r.sampling.prompt_logprobs) for r in server.requests["StreamGenerate"]}
    assert sampling == (1, 1)


def test_the_windows_are_the_contexts_unless_told(server: ScriptedServer, tmp_path: Path) -> None:
    ByteModel(server)
    path = tmp_path / "text.txt"
    path.write_text("one document of two lines,\nwhatever its lines are")
    result = evaluate(server, path, path, "--documents", 1)
    assert result.exit_code == 0, result.output
    rows = {line.split("  ")[0]: line.split()[-1] for line in result.stdout.splitlines()}
    assert (rows["window"], rows["stride"], rows["documents"], rows["model"]) == ("20", "10", "1", "tiny")
    assert max(len(request.token_ids.ids) for request in server.requests["StreamGenerate"]) == 20


FILES: dict[str, tuple[bytes, str]] = {
    "absent.txt": (b"", "absent.txt cannot be read: No such file"),
    "latin.txt": (b"caf\xe9", "latin.txt is not UTF-8 at byte 3"),
    "empty.txt": (b"", "empty.txt has no text"),
    "broken.jsonl": (b'{"text": "x"}\n{"text', "broken.jsonl, line 2: not JSON"),
    "other.jsonl": (b'\n{"content": "x"}', "other.jsonl, line 2: expected an object with a string `text`"),
    "list.jsonl": (b'["x"]', "list.jsonl, line 1: expected an object"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_text_are_refused(server: ScriptedServer, tmp_path: Path, name: str) -> None:
    content, message = FILES[name]
    if not name.startswith("absent"):
        (tmp_path / name).write_bytes(content)
    result = evaluate(server, tmp_path / name)
    assert result.exit_code == 2 and message in result.output, result.output
    assert not server.requests, "nothing was asked"


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["--window", 40], "window=40 must be 2 to 20", 2),
        (["--window", 4, "--stride", 4], "stride=4 must be 1 to 3", 2),
        (["--model", "large"], "no model 'large' is served; served: tiny", 1),
    ],
)
def test_what_the_model_cannot_take_is_refused(
    server: ScriptedServer, tmp_path: Path, arguments: list[object], message: str, code: int
) -> None:
    ByteModel(server)
    path = tmp_path / "text.txt"
    path.write_text("some text")
    result = evaluate(server, path, *arguments)
    assert result.exit_code == code and message in result.output, result.output
    assert not server.requests["StreamGenerate"]


def test_a_text_of_one_token_has_none_to_foretell(server: ScriptedServer, tmp_path: Path) -> None:
    ByteModel(server, begin=False)
    path = tmp_path / "text.txt"
    path.write_text("x")
    result = evaluate(server, path)
    assert result.exit_code == 2 and "no document has two tokens" in result.output


@pytest.mark.parametrize("wrong", [lambda ids: ids[:-1], lambda ids: [*ids[:-1], ids[-1] + 1], lambda ids: []])
def test_an_answer_about_other_tokens_is_refused(
    server: ScriptedServer, tmp_path: Path, wrong: Callable[[list[int]], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ByteModel(server)
    right = model.logprobs
    monkeypatch.setattr(model, "logprobs", lambda ids: right(wrong(ids)))
    path = tmp_path / "text.txt"
    path.write_text("some text")
    result = evaluate(server, path)
    assert result.exit_code == 1 and "or of other tokens" in result.output


def sync_calls(address: str, text: str, ids: Any) -> tuple[tuple[int, ...], str]:
    with Client(address) as client:
        return client.tokenize(text, model="tiny"), client.detokenize(ids)


def async_calls(address: str, text: str, ids: Any) -> tuple[tuple[int, ...], str]:
    async def run() -> tuple[tuple[int, ...], str]:
        async with AsyncClient(address) as client:
            return await client.tokenize(text, model="tiny"), await client.detokenize(ids)

    return asyncio.run(run())


@pytest.mark.parametrize("call", [sync_calls, async_calls])
def test_both_clients_tokenise(server: ScriptedServer, call: Callable[..., Any]) -> None:
    ByteModel(server)
    assert call(server.address, "né", (BEGIN, 104, 105)) == ((BEGIN, *"né".encode()), "hi")
    assert server.requests["Tokenize"][0].model == "tiny"
    with pytest.raises(InvalidRequestError, match=r"token_ids\[1\] must be an integer >= 0, got -1"):
        call(server.address, "x", (1, -1))
    with pytest.raises(InvalidRequestError, match="half of a surrogate pair"):
        call(server.address, "\ud800", ())
