"""Every row of docs/errors.md for real: its reason provoked, its code, exception and words as the table has them.

Through the SDK on a cluster wherever a client can bring it about; a defect, which no client should be able to, at the
server that tells of it. A row without a provocation is a failure, and so is a provocation without a row.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pydantic
import pytest

import echelon.errors
from coordinator.journal.state import Finished
from coordinator.requests.life import error_of as ended_with
from coordinator.requests.quarantine import decide
from coordinator.server import refuse
from echelon import Client, EchelonError, SamplingParams
from echelon.config import resolve_config
from echelon.errors import error_of
from echelon.retry import RetryPolicy
from echelon.status import from_rpc, pack, unpack
from echelon.testing import LocalCluster
from echelon.v1 import generation_pb2, generation_pb2_grpc
from tests.architecture.source import ROOT
from tests.cluster.conftest import free_ports
from tests.cluster.streams import no_writing
from tests.tiny import POISON, make_checkpoint, make_poisoned_checkpoint

pytestmark = pytest.mark.cluster

MODELS: list[Path] = []  # the one that is served
LONG = SamplingParams(max_tokens=400, ignore_eos=True)
RETRYABLE = re.compile(r"^`(\w+)` and `(\w+)` are retryable", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the table."""

    code: str
    exception: str
    when: str
    remedy: str


def table() -> dict[str, Row]:
    text = (ROOT / "docs/errors.md").read_text(encoding="utf-8")
    cells = ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `"))
    return {
        reason.strip("`"): Row(code, exception.strip("`"), when.replace("`", ""), remedy.replace("`", ""))
        for reason, code, exception, when, remedy in cells
    }


ROWS = table()


@dataclass(frozen=True, slots=True)
class Provocation:
    """words: what the message and the row both say, of the remedy where there is one."""

    words: str
    call: Callable[[LocalCluster, Client], object]


PROVOCATIONS: dict[str, Provocation] = {}
Call = Callable[[LocalCluster, Client], object]


def provokes(reason: str, words: str) -> Callable[[Call], Call]:
    """Of a function that raises the error."""

    def register(call: Call) -> Call:
        PROVOCATIONS[reason] = Provocation(words, call)
        return call

    return register


@pytest.fixture(scope="module")
def cluster(ray_address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    model = make_checkpoint(tmp_path_factory.mktemp("errors") / "tiny")
    MODELS.append(model)
    with LocalCluster(model, ray_address=ray_address, max_running=2, max_queue_tokens=10) as made:
        yield made


@pytest.mark.parametrize("reason", sorted(ROWS, key=lambda reason: reason == "DRAINING"))  # which ends the cluster
def test_every_reason_is_provoked(cluster: LocalCluster, reason: str) -> None:
    row, provocation = ROWS[reason], PROVOCATIONS[reason]
    with Client(cluster.target, retry=RetryPolicy(max_retries=0)) as client, pytest.raises(EchelonError) as raised:
        provocation.call(cluster, client)
    error = raised.value
    assert (error.reason, type(error).__name__) == (reason, row.exception), error
    if row.code != "never sent":
        assert error.code == getattr(grpc.StatusCode, row.code).value[0]
    assert provocation.words in error.message, error.message
    assert provocation.words in f"{row.when}; {row.remedy}"


def test_the_table_is_provoked_whole() -> None:
    assert PROVOCATIONS.keys() == ROWS.keys()


def test_the_retryable_ones_are_those_the_document_names() -> None:
    named = RETRYABLE.search((ROOT / "docs/errors.md").read_text(encoding="utf-8"))
    assert named is not None
    assert set(named.groups()) == {kind.__name__ for kind in echelon.errors.WIRE_ERRORS if kind.retryable}


@provokes("INVALID_FIELD", "must be")
def _(cluster: LocalCluster, client: Client) -> object:
    return sent(client_of(cluster).Generate, text="x", sampling=generation_pb2.SamplingParams(top_p=7))


@provokes("CONTEXT_TOO_LONG", "shorten the prompt")
def _(cluster: LocalCluster, client: Client) -> object:
    return client.generate(token_ids=[5] * 500, max_tokens=13)


@provokes("CONSTRAINT_FAILED", "follow")
def _(cluster: LocalCluster, client: Client) -> object:
    """Another cluster's answer, say, or no answer at all."""
    resume = generation_pb2.Resume(received=[generation_pb2.TokenIds(ids=[88])])
    sampling = generation_pb2.SamplingParams(regex="[0-9]{9}")
    return sent(client_of(cluster).Generate, text="x", request_id="strange", sampling=sampling, resume=resume)


@provokes("NON_FINITE", "change the prompt")
def _(cluster: LocalCluster, client: Client) -> object:
    """A model in which one token is poison."""
    with tempfile.TemporaryDirectory() as folder:
        cluster.reconfigure(model=make_poisoned_checkpoint(Path(folder)))
        try:
            return client.generate(token_ids=[5, POISON, 6], max_tokens=4)
        finally:
            assert client.generate(token_ids=[5, 6], max_tokens=4, logit_bias={POISON: -100.0}).token_ids
            cluster.reconfigure(model=MODELS[-1])


@provokes("MODEL_NOT_FOUND", "leave model empty")
def _(cluster: LocalCluster, client: Client) -> object:
    return client.generate("x", model="large")


@provokes("JOB_NOT_FOUND", "echelon batch list")
def _(cluster: LocalCluster, client: Client) -> object:
    return client.jobs.get("nobody")


@provokes("REQUEST_ID_CONFLICT", "take a new id")
def _(cluster: LocalCluster, client: Client) -> object:
    client.generate("x", request_id="taken", max_tokens=1)
    return client.generate("y", request_id="taken", max_tokens=1)


@provokes("JOB_ID_CONFLICT", "take a new id")
def _(cluster: LocalCluster, client: Client) -> object:
    client.jobs.submit([{"custom_id": "a", "prompt": "x", "max_tokens": 1}], job_id="taken").wait()
    return client.jobs.submit([{"custom_id": "a", "prompt": "y", "max_tokens": 1}], job_id="taken")


@provokes("STREAM_TAKEN_OVER", "another stream")
def _(cluster: LocalCluster, client: Client) -> object:
    first = client.stream("x", request_id="wanted", sampling=LONG)
    next(first)
    second = client.stream("x", request_id="wanted", sampling=LONG)
    next(second)
    try:
        return list(first)
    finally:
        second.close()


@provokes("REQUEST_QUARANTINED", "it was alone")
def _(cluster: LocalCluster, client: Client) -> object:
    """No client can break a step: as the coordinator words and sends it."""
    _, why = decide(3, alone=True)
    raise unpack(pack(ended_with(Finished("r", 0.0, (), "REQUEST_QUARANTINED", why))))


@provokes("QUEUE_FULL", "try again")
def _(cluster: LocalCluster, client: Client) -> object:
    with ThreadPoolExecutor(3) as pool:
        slow = [pool.submit(client.generate, "x", sampling=LONG) for _ in range(2)]
        cluster.wait(lambda now: now.running == 2, "two running")
        slow.append(pool.submit(client.generate, token_ids=[5] * 9, sampling=LONG))
        cluster.wait(lambda now: now.queued == 1, "one queued")
        try:
            return client.generate(token_ids=[5] * 9, max_tokens=1)
        finally:
            assert all(len(answer.result().token_ids) == LONG.max_tokens for answer in slow)


@provokes("JOURNAL_UNAVAILABLE", "free space in the state directory")
def _(cluster: LocalCluster, client: Client) -> object:
    try:
        with no_writing(cluster.coordinator_pid):
            client.generate("x", max_tokens=1)  # whose records could not be written
            return client.generate("x", max_tokens=1)
    finally:
        cluster.wait(lambda _: "journal.recovered" in [event.kind for event in cluster.events()], "the journal")


@provokes("FAILING_OVER", "reach")
def _(cluster: LocalCluster, client: Client) -> object:
    (nobody,) = free_ports(1)
    with Client(f"127.0.0.1:{nobody}", retry=RetryPolicy(max_retries=0)) as lonely:
        return lonely.generate("x")


@provokes("DEADLINE", "fewer tokens")
def _(cluster: LocalCluster, client: Client) -> object:
    """The server's own: asked for again, as the first call is ended by its client."""
    answer: object = None
    for patience_s in (0.05, 0.1, 0.2):  # a call may be over before the server has heard of it, if all stood still
        with pytest.raises(echelon.errors.DeadlineError):
            client.generate("x", request_id=f"late-{patience_s}", sampling=LONG, timeout_s=patience_s)
        cluster.wait(lambda now: now.running == 0, "the request's own end")
        answer = client.generate("x", request_id=f"late-{patience_s}", sampling=LONG)
    return answer


@provokes("CANCELLED", "the request was cancelled")
def _(cluster: LocalCluster, client: Client) -> object:
    stream = client.stream("x", request_id="unwanted", sampling=LONG)
    next(stream)
    message = generation_pb2.CancelGenerationRequest(request_ids=["unwanted"])
    assert list(client_of(cluster).CancelGeneration(message).cancelled_request_ids) == ["unwanted"]
    return list(stream)


@provokes("INTERNAL", "log")
def _(cluster: LocalCluster, client: Client) -> object:
    """A defect, told by the server as any that a handler meets."""
    told: list[grpc.Status] = []

    class Context:
        async def abort_with_status(self, status: grpc.Status) -> None:
            told.append(status)
            raise grpc.RpcError

    context: Any = Context()
    with pytest.raises(grpc.RpcError):
        asyncio.run(refuse(context, ZeroDivisionError("a defect")))
    raise error_of(told[0].code.value[0], told[0].details)


class Point(pydantic.BaseModel):
    """Of which a random model makes no instance in three tokens."""

    x: int
    y: int


@provokes("RESPONSE_INVALID", "a larger max_tokens")
def _(cluster: LocalCluster, client: Client) -> object:
    return client.generate("x", response_model=Point, max_tokens=3)


@provokes("CONFIG", "file")
def _(cluster: LocalCluster, client: Client) -> object:
    return resolve_config({"model": "m"}, {}, "tensr: 2")


@provokes("DRAINING", "is being stopped or handed over")
def _(cluster: LocalCluster, client: Client) -> object:
    """The last one: nobody is answered here any more."""
    stream = client.stream("x", request_id="last", sampling=LONG)
    next(stream)
    os.kill(cluster.pid, signal.SIGTERM)
    try:
        while True:
            client.generate("x", max_tokens=1)
    finally:
        assert sum(len(event.token_ids) for event in stream) > 300, "what runs is finished"


def client_of(cluster: LocalCluster) -> generation_pb2_grpc.GenerationServiceStub:
    return generation_pb2_grpc.GenerationServiceStub(grpc.insecure_channel(cluster.target))


def sent(method: Callable[..., object], **fields: Any) -> object:
    """Past the checks of the SDK."""
    try:
        return method(generation_pb2.GenerateRequest(**fields), timeout=30)
    except grpc.RpcError as error:
        raise from_rpc(error, "the cluster") from error
