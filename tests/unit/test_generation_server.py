"""GenerationService over gRPC, with a scripted leader: what is asked in messages, and what errors become."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from google.protobuf import struct_pb2

from coordinator.answer_text import AnswerText, Stops
from coordinator.clock import SteadyClock
from coordinator.detokenizer import Detokenizer
from coordinator.events import EventLog
from coordinator.grammars import Grammars
from coordinator.journal.file import JournalFile
from coordinator.metrics import Metrics
from coordinator.model_facts import ModelFacts
from coordinator.requests.core import CoordinatorCore, CoreConfig
from coordinator.requests.events import Tick
from coordinator.server import GenerationServicer
from coordinator.service import Parts, Service
from coordinator.settle import Served
from coordinator.tokenizer import Tokenizer
from echelon import AsyncClient, status
from echelon.errors import EchelonError, InvalidRequestError, NotFoundError
from echelon.internal.link import (
    Abandon,
    Assign,
    Command,
    Fence,
    Finish,
    Prompted,
    Released,
    ReplicaHello,
    Report,
    TokenRun,
)
from echelon.types import FinishReason
from echelon.v1 import generation_pb2, generation_pb2_grpc
from tests.tiny import make_checkpoint

FENCE = Fence(1, 0, 1)
MAX_CONTEXT = 256
A_DAY_S = 86_400.0


@dataclass
class Leader:
    """Answers choice number i of every request with the words of `answers[i]`, an id a report."""

    service: Service
    answers: list[tuple[int, ...]] = field(default_factory=list)
    assigns: list[Assign] = field(default_factory=list)
    abandons: list[Abandon] = field(default_factory=list)
    reports: int = 0

    def take(self, command: Command) -> None:
        self.assigns.extend(command.assigns)
        self.abandons.extend(command.abandons)
        for assign in command.assigns:
            asyncio.get_running_loop().call_soon(self.answer, assign)

    def answer(self, assign: Assign) -> None:
        prompted = (Prompted(assign.request, assign.attempt, cached_tokens=1),)
        for place in range(max(map(len, self.answers), default=0)):
            runs = [
                TokenRun(assign.request, choice, assign.attempt, place, (ids[place],), (), self.end(ids, place))
                for choice, ids in enumerate(self.answers)
                if place < len(ids)
            ]
            self.report(runs=tuple(runs), prompted=prompted if not place else ())
        if self.answers:
            self.report(released=(Released(assign.request, assign.attempt),))

    def end(self, ids: tuple[int, ...], place: int) -> Finish | None:
        return Finish.LENGTH if place == len(ids) - 1 else None

    def report(self, **parts: Any) -> None:
        self.reports += 1
        self.service.reported(Report(FENCE, self.reports, **parts))


@dataclass
class Site:
    """A served model: its address for clients, its calls one by one, and the leader behind it."""

    address: str
    stub: Any
    leader: Leader
    tokenizer: Tokenizer

    async def refused(self, call: Any) -> EchelonError:
        """The error that ends this call."""
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        return status.from_rpc(caught.value, self.address)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def serve(model: Path, tmp_path: Path) -> Callable[[Callable[[Site], Awaitable[None]]], None]:
    async def run(test: Callable[[Site], Awaitable[None]]) -> None:
        tokenizer = Tokenizer.from_directory(model)
        facts = ModelFacts(name="tiny", vocab_size=tokenizer.vocab_size, max_context=MAX_CONTEXT, end_ids=(1,))
        journal = JournalFile(tmp_path / "journal", term=1)

        def new_text(stops: Stops) -> AnswerText:
            return AnswerText(Detokenizer(tokenizer.decode), stops)

        parts = Parts(
            core=CoordinatorCore(CoreConfig(1, 60.0, 10_000), new_text, journal.state),
            journal=journal,
            events=EventLog(1),
            metrics=Metrics.create(),
            served=Served(facts, tokenizer, Grammars(model, facts)),
            clock=SteadyClock(wall=lambda: time.time() - A_DAY_S),  # the machine's was set since
        )
        service = Service(parts)
        leader = Leader(service)
        service.open_link(Report(FENCE, 0, hello=ReplicaHello(4, 100, 16, MAX_CONTEXT)), leader.take)
        server = grpc.aio.server()
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(GenerationServicer(service), server)
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        try:
            async with grpc.aio.insecure_channel(address) as channel:
                stub = generation_pb2_grpc.GenerationServiceStub(channel)
                await test(Site(address, stub, leader, tokenizer))
        finally:
            await server.stop(None)
            service.close()

    def served(test: Callable[[Site], Awaitable[None]]) -> None:
        asyncio.run(asyncio.wait_for(run(test), 60))

    return served


Serve = Callable[[Callable[[Site], Awaitable[None]]], None]


def chat(**keys: Any) -> generation_pb2.ChatPrompt:
    message = generation_pb2.ChatMessage(role="user", content="The quick brown fox")
    return generation_pb2.ChatPrompt(messages=[message], **keys)


def test_tokenize_tells_the_ids_that_a_generation_is_given(serve: Serve) -> None:
    async def test(site: Site) -> None:
        told = await site.stub.Tokenize(generation_pb2.TokenizeRequest(text="The quick brown fox"))
        assert tuple(told.token_ids) == site.tokenizer.encode("The quick brown fox")
        assert told.max_context == MAX_CONTEXT
        arguments = struct_pb2.Struct(fields={"add_generation_prompt": struct_pb2.Value(bool_value=False)})
        both = [chat(), chat(template_args=arguments)]
        tokenized = [await site.stub.Tokenize(generation_pb2.TokenizeRequest(model="tiny", chat=each)) for each in both]
        site.leader.answers = [(5,)]
        for each in both:
            request = generation_pb2.GenerateRequest(chat=each)
            request.sampling.max_tokens = 1
            await site.stub.Generate(request)
        prompts = [assign.prompt for assign in site.leader.assigns]
        assert [tuple(each.token_ids) for each in tokenized] == prompts
        assert prompts[0] != prompts[1]
        begin = site.tokenizer.encode("")[0]
        assert [prompt.count(begin) for prompt in prompts] == [1, 1]

    serve(test)


def test_detokenize_gives_the_text_back(serve: Serve) -> None:
    async def test(site: Site) -> None:
        text = "敏捷的 fox\n"
        ids = (await site.stub.Tokenize(generation_pb2.TokenizeRequest(text=text))).token_ids
        assert (await site.stub.Detokenize(generation_pb2.DetokenizeRequest(token_ids=ids))).text == text
        assert (await site.stub.Detokenize(generation_pb2.DetokenizeRequest(model="tiny"))).text == ""

    serve(test)


@pytest.mark.parametrize(
    ("request_", "kind", "named", "message"),
    [
        (generation_pb2.TokenizeRequest(), InvalidRequestError, "prompt", "no input"),
        (generation_pb2.TokenizeRequest(text=""), InvalidRequestError, "text", "text is empty"),
        (
            generation_pb2.TokenizeRequest(chat=generation_pb2.ChatPrompt()),
            InvalidRequestError,
            "messages",
            "messages is empty",
        ),
        (
            generation_pb2.TokenizeRequest(chat=generation_pb2.ChatPrompt(messages=[generation_pb2.ChatMessage()])),
            InvalidRequestError,
            "messages",
            r"messages\[0\] has no role",
        ),
        (
            generation_pb2.TokenizeRequest(
                chat=chat(tools=[struct_pb2.Struct(fields={"a": struct_pb2.Value(number_value=float("nan"))})])
            ),
            InvalidRequestError,
            "tools[0]",
            "must be a JSON object",
        ),
        (
            generation_pb2.TokenizeRequest(model="gpt", text="x"),
            NotFoundError,
            "model",
            "'gpt' is not served; .* 'tiny'",
        ),
        (
            generation_pb2.DetokenizeRequest(token_ids=[5, 9999]),
            InvalidRequestError,
            "token_ids",
            r"token_ids\[1\] = 9999",
        ),
        (generation_pb2.DetokenizeRequest(model="gpt"), NotFoundError, "model", "'gpt' is not served"),
        (generation_pb2.GenerateRequest(), InvalidRequestError, "prompt", "no input"),
        (
            generation_pb2.GenerateRequest(text="x", sampling=generation_pb2.SamplingParams(n=5)),
            InvalidRequestError,
            None,
            "n=5 choices are over the 4",
        ),
        (
            generation_pb2.GenerateRequest(
                text="x",
                resume=generation_pb2.Resume(
                    received=[generation_pb2.TokenIds(), generation_pb2.TokenIds(ids=[5, 9999])]
                ),
            ),
            InvalidRequestError,
            "resume.received[1]",
            r"received\[1\]\[1\] = 9999 is outside the vocabulary",
        ),
        # Thrice in the metadata of a call, and every character a long one: it must not be lost on the way.
        (generation_pb2.GenerateRequest(text="x", model="狐" * 5000), NotFoundError, "model", "狐狐狐"),
    ],
)
def test_what_is_refused_is_told_by_kind_and_field(
    serve: Serve, request_: Any, kind: type[EchelonError], named: str | None, message: str
) -> None:
    async def test(site: Site) -> None:
        method = type(request_).__name__.removesuffix("Request")
        error = await site.refused(getattr(site.stub, method)(request_))
        assert type(error) is kind
        assert error.field == named
        with pytest.raises(kind, match=message):
            raise error

    serve(test)


def test_several_choices_through_the_sdk(serve: Serve) -> None:
    async def test(site: Site) -> None:
        words = [site.tokenizer.encode_plain(text) for text in ("one fox", "a dog. then", "x")]
        site.leader.answers = words
        async with AsyncClient(site.address) as client:
            answer = await client.generate(
                "two", n=3, stop=[". t"], max_tokens=32, priority=-2, cache_salt="tenant", seed=7
            )
            texts = ["", "", ""]
            async for event in client.stream("two", n=3, stop=". t", max_tokens=32):
                texts[event.index] += event.text
        assert [choice.text for choice in answer.choices] == texts == ["one fox", "a dog", "x"]
        assert [choice.matched_stop for choice in answer.choices] == ["", ". t", ""]
        assert [choice.finish_reason for choice in answer.choices] == [
            FinishReason.LENGTH,
            FinishReason.STOP,
            FinishReason.LENGTH,
        ]
        assert answer.usage.completion_tokens == sum(len(choice.token_ids) for choice in answer.choices)
        assert answer.usage.cached_tokens == 1
        assign = site.leader.assigns[0]
        assert (assign.priority, assign.cache_salt) == (-2, "tenant")
        assert (assign.sampling.n, assign.sampling.stop, assign.sampling.seed) == (3, (". t",), 7)
        assert len(assign.choices) == 3

    serve(test)


def test_a_call_ends_by_its_deadline_though_the_machines_clock_was_set(serve: Serve) -> None:
    """Neither early nor a day late: the leader says nothing."""

    async def test(site: Site) -> None:
        began_s = time.monotonic()
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await site.stub.Generate(generation_pb2.GenerateRequest(text="two", request_id="late"), timeout=0.5)
        assert ended.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert time.monotonic() - began_s > 0.4
        while site.leader.service.core.is_open("late"):
            site.leader.service.post(Tick())
            await asyncio.sleep(0.01)
        with pytest.raises(grpc.aio.AioRpcError, match="the deadline passed after 0 of"):
            await site.stub.Generate(generation_pb2.GenerateRequest(text="two", request_id="late"), timeout=30)

    serve(test)


def test_what_a_client_cancels_is_abandoned_whole(serve: Serve) -> None:
    async def test(site: Site) -> None:
        async with AsyncClient(site.address) as client:
            task = asyncio.create_task(client.generate("two", n=2, request_id="mine"))
            while not site.leader.assigns:
                await asyncio.sleep(0.01)
            await site.stub.CancelGeneration(generation_pb2.CancelGenerationRequest(request_ids=["mine", "other"]))
            with pytest.raises(EchelonError, match="cancelled"):
                await task
        assert site.leader.abandons == [Abandon("mine", 1)]

    serve(test)
