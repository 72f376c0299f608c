"""map() of both clients: order, bounded concurrency, failures in their place, and an end that leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echelon import AsyncClient, CancelledError, Client, Completion, ConflictError, EchelonError, InvalidRequestError
from echelon.internal.mapping import READ_AHEAD, in_order
from echelon.v1 import generation_pb2
from tests.unit.scripted import IDS, ScriptedServer, fail, tokens

WAIT_S = 30.0


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as scripted:
        yield scripted


def map_sync(address: str, prompts: Any, take: int | None = None, **options: Any) -> list[Any]:
    with Client(address, timeout_s=WAIT_S) as client:
        with contextlib.closing(client.map(prompts, **options)) as answers:
            return list(itertools.islice(answers, take))


def map_async(address: str, prompts: Any, take: int | None = None, **options: Any) -> list[Any]:
    async def run() -> list[Any]:
        found: list[Any] = []
        async with AsyncClient(address, timeout_s=WAIT_S) as client:
            async with contextlib.aclosing(client.map(prompts, **options)) as answers:
                while take is None or len(found) < take:
                    try:
                        found.append(await anext(answers))
                    except StopAsyncIteration:
                        break
        return found

    return asyncio.run(run())


@pytest.fixture(params=[map_sync, map_async], ids=["sync", "async"])
def mapped(request: pytest.FixtureRequest) -> Callable[..., list[Any]]:
    function: Callable[..., list[Any]] = request.param
    return function


class Gate:
    """Handlers of StreamGenerate that wait for one another: `order[i]` is the i-th prompt to be answered."""

    def __init__(self, server: ScriptedServer, order: list[str]) -> None:
        self.most = self._running = 0
        self._lock = threading.Condition()
        self._order = order
        server.on("StreamGenerate", *[self._handle] * len(order))

    def _handle(self, request: Any, context: Any) -> Iterator[Any]:
        with self._lock:
            self._running += 1
            self.most = max(self.most, self._running)
            assert self._lock.wait_for(lambda: self._order[0] == request.text, WAIT_S)
            self._order.pop(0)
            self._running -= 1
            self._lock.notify_all()
        return tokens(0, 1, end=True)(request, context)  # type: ignore[no-any-return]


def texts(server: ScriptedServer) -> list[str]:
    return [request.text for request in server.requests["StreamGenerate"]]


def test_answers_come_in_the_order_of_the_prompts(server: ScriptedServer, mapped: Callable[..., list[Any]]) -> None:
    prompts = [str(index) for index in range(6)]
    Gate(server, list(reversed(prompts)))  # the last one is answered first: all must be asked at once
    items = [{"prompt": prompt, "request_id": f"r{prompt}"} for prompt in prompts]
    answers = mapped(server.address, items, concurrency=6, max_tokens=3)
    assert [answer.request_id for answer in answers] == ["r0", "r1", "r2", "r3", "r4", "r5"]
    assert {request.sampling.max_tokens for request in server.requests["StreamGenerate"]} == {3}


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_run_at_once(server: ScriptedServer, mapped: Callable[..., list[Any]], concurrency: int) -> None:
    prompts = [str(index) for index in range(9)]
    gate = Gate(server, prompts.copy())
    assert len(mapped(server.address, iter(prompts), concurrency=concurrency)) == 9
    assert gate.most <= concurrency
    assert sorted(texts(server)) == prompts


def test_an_item_has_options_of_its_own(server: ScriptedServer, mapped: Callable[..., list[Any]]) -> None:
    server.on("StreamGenerate", *[tokens(0, 1, end=True)] * 3)
    items = ["a", {"prompt": "b", "seed": 2}, {"token_ids": [5], "max_tokens": 1}]
    mapped(server.address, items, concurrency=1, seed=1, max_tokens=7)
    sent = [
        (request.text, request.sampling.seed, request.sampling.max_tokens)
        for request in server.requests["StreamGenerate"]
    ]
    assert sent == [("a", 1, 7), ("b", 2, 7), ("", 1, 1)]


def failing(request: Any, context: Any) -> Iterator[Any]:
    yield from ()
    fail(context, ConflictError(f"no {request.text}"))


def test_a_failure_is_raised_in_its_place(server: ScriptedServer) -> None:
    server.on("StreamGenerate", tokens(0, 1, end=True), failing, *[tokens(0, 1, end=True)] * 2)
    with Client(server.address) as client:
        answers = client.map(["a", "b", "c", "d"], concurrency=1)
        assert next(answers).token_ids == IDS
        with pytest.raises(ConflictError, match="no b") as caught:
            next(answers)
        assert caught.value.request_id
        assert list(answers) == []


def test_a_failure_ends_the_asynchronous_map_too(server: ScriptedServer) -> None:
    server.on("StreamGenerate", failing)
    with pytest.raises(ConflictError, match="no a"):
        map_async(server.address, ["a"], concurrency=1)


def test_failures_are_returned_when_asked_for(server: ScriptedServer, mapped: Callable[..., list[Any]]) -> None:
    server.on("StreamGenerate", tokens(0, 1, end=True), failing, tokens(0, 1, end=True))
    found = mapped(server.address, ["a", "b", 5, "c"], concurrency=1, return_exceptions=True)
    kinds = [type(answer) for answer in found]
    assert kinds == [Completion, ConflictError, InvalidRequestError, Completion]
    assert "no b" in str(found[1]) and "got 5" in str(found[2])


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"concurrency": 0}, "concurrency"),
        ({"concurrency": 1.5}, "concurrency"),
        ({"request_id": "r"}, "request_id"),
    ],
)
def test_bad_arguments_are_refused_at_the_call(options: dict[str, Any], field: str) -> None:
    for client in (Client("localhost:1"), AsyncClient("localhost:1")):
        with pytest.raises(InvalidRequestError) as caught:
            client.map(["a"], **options)
        assert caught.value.field == field


def hanging(entered: threading.Semaphore) -> Callable[[Any, Any], Iterator[Any]]:
    def handler(request: Any, context: Any) -> Iterator[Any]:
        gone = threading.Event()
        context.add_callback(gone.set)
        entered.release()
        gone.wait(WAIT_S)
        yield from ()

    return handler


def test_leaving_early_cancels_what_runs_and_starts_no_more(
    server: ScriptedServer, mapped: Callable[..., list[Any]]
) -> None:
    """The first answer is taken while two others hang; those are cancelled at the server, the rest is never asked."""
    entered, cancelled = threading.Semaphore(0), set[str]()

    def cancel(request: Any, context: Any) -> Any:
        cancelled.update(request.request_ids)
        return generation_pb2.CancelGenerationResponse(cancelled_request_ids=request.request_ids)

    def first(request: Any, context: Any) -> Iterator[Any]:
        assert entered.acquire(timeout=WAIT_S) and entered.acquire(timeout=WAIT_S)
        yield from tokens(0, 1, end=True)(request, context)

    by_text = {"a": first, "b": hanging(entered), "c": hanging(entered)}
    server.on("StreamGenerate", *[lambda request, context: by_text[request.text](request, context)] * 3)
    server.on("CancelGeneration", cancel, cancel)
    items = [{"prompt": text, "request_id": text} for text in "abc"]
    # Nobody reads on after the first answer, so the free place goes to nobody.
    (answer,) = mapped(server.address, items, take=1, concurrency=3)
    assert answer.request_id == "a"
    assert cancelled == {"b", "c"}
    assert server.requests["StreamGenerate"] and not server.handlers["StreamGenerate"]


def test_closing_the_client_ends_its_map(server: ScriptedServer) -> None:
    entered = threading.Semaphore(0)
    server.on("StreamGenerate", *[hanging(entered)] * 2)
    client, caught = Client(server.address), list[Completion | EchelonError]()

    def read() -> None:
        caught.extend(
            answer
            for answer in client.map("ab", concurrency=2, return_exceptions=True)
            if isinstance(answer, EchelonError)
        )

    reader = threading.Thread(target=read)
    reader.start()
    assert entered.acquire(timeout=WAIT_S) and entered.acquire(timeout=WAIT_S)
    client.close()
    reader.join(WAIT_S)
    assert [type(error) for error in caught] == [CancelledError, CancelledError]
    assert server.requests["CancelGeneration"] == [], "parked: they can be resumed"


def test_an_endless_source_is_read_only_as_far_as_needed(
    server: ScriptedServer, mapped: Callable[..., list[Any]]
) -> None:
    taken = itertools.count()
    server.on("StreamGenerate", *[tokens(0, 1, end=True)] * 100)
    server.on("CancelGeneration", *[lambda r, c: generation_pb2.CancelGenerationResponse()] * 100)
    assert len(mapped(server.address, (f"p{index}" for index in taken), take=3, concurrency=2)) == 3
    assert next(taken) <= 3 + 2 * READ_AHEAD


@pytest.mark.parametrize("left", ["map('abc', concurrency=1)", "stream('a')"])
def test_a_process_ends_though_it_left_answers_behind(server: ScriptedServer, left: str) -> None:
    """What is left must not hold the interpreter, as the threads of an executor or a last call to the server would."""
    server.on("StreamGenerate", *[tokens(0, 1, then=lambda context: None, end=True)] * 2)
    server.on("StreamGenerate", hanging(threading.Semaphore(0)))
    code = (
        "import sys\nfrom echelon import Client\n"
        f"answers = Client({server.address!r}).{left}\nnext(answers)\nsys.exit(7)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=WAIT_S, check=False).returncode == 7


@given(count=st.integers(0, 40), concurrency=st.integers(1, 5))
def test_every_input_is_started_and_handed_out_once_in_order(count: int, concurrency: int) -> None:
    started: list[int] = []

    def start(item: int) -> int:
        started.append(item)
        return item

    for place, item in enumerate(in_order(range(count), start, concurrency)):
        assert item == place
        assert len(started) == min(place + READ_AHEAD * concurrency, count)
    assert started == list(range(count))
