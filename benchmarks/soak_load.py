"""What the soak's clients do: whole answers, cancels, disconnects with and without a return, deadlines, jobs.

Bare asynchronous stubs, so that every step is the load's own choice; drawn from a seed. Each behaviour knows how its
request may end, and anything else ends the run. Knows nothing of what is measured meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

import grpc
import grpc.aio

from echelon.internal.channel import CLIENT_OPTIONS
from echelon.v1 import generation_pb2, generation_pb2_grpc, jobs_pb2, jobs_pb2_grpc

Call = grpc.aio.UnaryStreamCall[generation_pb2.GenerateRequest, generation_pb2.StreamGenerateResponse]
Code = grpc.StatusCode

PATIENT_S = 60.0
ITEMS_PER_JOB = 100
PROMPTS = ("Geese fly so", "The quick brown fox", "An echelon is a formation in which each unit stands behind", "x")


@dataclass(slots=True)
class Load:
    """Clients of one cluster. ends: how often each behaviour met each end."""

    channel: grpc.aio.Channel
    random: random.Random
    choices: int
    ends: Counter[str] = field(default_factory=Counter)

    async def run(self, requests: int, concurrency: int) -> None:
        """So many requests, a tenth of them as items of jobs. Raises what no behaviour allows."""
        jobs = requests // 10 // ITEMS_PER_JOB
        left = iter(range(requests - jobs * ITEMS_PER_JOB))

        async def client() -> None:
            for number in left:
                await self._one(number)

        async def batches() -> None:
            for number in range(jobs):
                await self._job(f"soak-{number}")

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(client())
            group.create_task(batches())

    async def _one(self, number: int) -> None:
        name = self.random.choices(tuple(_WEIGHTS), tuple(_WEIGHTS.values()))[0]
        code, allowed = Code.OK, _ALLOWED.get(name, ())
        try:
            await _BEHAVIOURS[name](self, self._request(f"soak-{number}"))
        except grpc.aio.AioRpcError as error:
            code = error.code()
            if code not in allowed:
                raise AssertionError(f"{name}: {code.name} {error.details()}") from error
        except asyncio.CancelledError:  # of the call, which this side has cancelled; not of this task
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise
            code = Code.CANCELLED
        self.ends[f"{name}: {code.name}"] += 1

    def _request(self, request_id: str) -> generation_pb2.GenerateRequest:
        draw = self.random
        sampling = generation_pb2.SamplingParams(
            max_tokens=draw.randint(1, 16), ignore_eos=draw.random() < 0.7, temperature=draw.choice((0.0, 1.0))
        )
        if draw.random() < 0.2:
            sampling.logprobs = 3
        if draw.random() < 0.2:
            sampling.n = draw.randint(1, self.choices)
        text = f"{draw.choice(PROMPTS)} {draw.randint(0, 99)}"
        return generation_pb2.GenerateRequest(text=text, request_id=request_id, sampling=sampling)

    def open(self, request: generation_pb2.GenerateRequest, timeout_s: float = PATIENT_S) -> Call:
        call: Call = generation_pb2_grpc.GenerationServiceStub(self.channel).StreamGenerate(request, timeout=timeout_s)
        return call

    async def _job(self, job_id: str) -> None:
        stub = jobs_pb2_grpc.BatchJobServiceStub(self.channel)
        items = [{"custom_id": f"{i}", "prompt": "Geese fly so", "max_tokens": 4} for i in range(ITEMS_PER_JOB)]
        source = jobs_pb2.BatchSource(jsonl="\n".join(map(json.dumps, items)).encode())
        await stub.CreateBatchJob(jobs_pb2.CreateBatchJobRequest(batch_job_id=job_id, source=source))
        name = f"batchJobs/{job_id}"
        results = stub.StreamBatchJobResults(jobs_pb2.StreamBatchJobResultsRequest(name=name, follow=True))
        cancelled = self.random.random() < 0.25
        async for result in results:
            if cancelled and result.result.cursor == ITEMS_PER_JOB // 2:
                await stub.CancelBatchJob(jobs_pb2.CancelBatchJobRequest(name=name))
        job = await stub.GetBatchJob(jobs_pb2.GetBatchJobRequest(name=name))
        done = job.counts.succeeded + job.counts.failed
        assert job.counts.failed == 0 and (cancelled or done == ITEMS_PER_JOB), job
        self.ends["job item: OK"] += done
        self.ends["job item: CANCELLED"] += ITEMS_PER_JOB - done


async def read(call: Call, most: int | None = None) -> tuple[list[int], ...]:
    """The ids by choice, of the whole stream or of its first messages."""
    ids: dict[int, list[int]] = {}
    for _ in range(most or 1_000_000):
        message = await call.read()
        if not isinstance(message, generation_pb2.StreamGenerateResponse):  # the stream's end
            break
        if message.WhichOneof("event") == "delta":
            ids.setdefault(message.delta.index, []).extend(message.delta.token_ids)
    return tuple(ids.get(choice, []) for choice in range(max(ids, default=-1) + 1))


async def whole(load: Load, request: generation_pb2.GenerateRequest) -> None:
    ids = await read(load.open(request))
    assert len(ids) == (request.sampling.n or 1) and all(ids)


async def unary(load: Load, request: generation_pb2.GenerateRequest) -> None:
    await generation_pb2_grpc.GenerationServiceStub(load.channel).Generate(request, timeout=PATIENT_S)


async def cancelled(load: Load, request: generation_pb2.GenerateRequest) -> None:
    call = load.open(request)
    await read(call, load.random.randint(1, 4))
    message = generation_pb2.CancelGenerationRequest(request_ids=[request.request_id])
    await generation_pb2_grpc.GenerationServiceStub(load.channel).CancelGeneration(message)
    await read(call)


async def disconnected(load: Load, request: generation_pb2.GenerateRequest) -> None:
    """Never to be seen again."""
    call = load.open(request)
    await read(call, load.random.randint(1, 4))
    call.cancel()


async def resumed(load: Load, request: generation_pb2.GenerateRequest) -> None:
    """Comes back with what it has, after a while."""
    call = load.open(request)
    held = await read(call, load.random.randint(1, 4))
    call.cancel()
    await asyncio.sleep(load.random.random() * 0.5)
    request.resume.received.extend(generation_pb2.TokenIds(ids=ids) for ids in held)
    await read(load.open(request))


async def taken_over(load: Load, request: generation_pb2.GenerateRequest) -> None:
    first = load.open(request)
    await read(first, 1)
    await read(load.open(request))
    await read(first)


async def late(load: Load, request: generation_pb2.GenerateRequest) -> None:
    await read(load.open(request, timeout_s=load.random.random() * 0.05))


async def refused(load: Load, request: generation_pb2.GenerateRequest) -> None:
    request.sampling.top_p = 7.0
    await read(load.open(request))


_BEHAVIOURS: Mapping[str, Callable[[Load, generation_pb2.GenerateRequest], Awaitable[None]]] = {
    behaviour.__name__.replace("_", " "): behaviour
    for behaviour in (whole, unary, cancelled, disconnected, resumed, taken_over, late, refused)
}
_WEIGHTS = dict(zip(_BEHAVIOURS, (35, 10, 12, 12, 12, 5, 9, 5), strict=True))
_ALLOWED: Mapping[str, tuple[Code, ...]] = {
    "cancelled": (Code.CANCELLED,),
    "taken over": (Code.ABORTED,),
    "late": (Code.DEADLINE_EXCEEDED,),
    "refused": (Code.INVALID_ARGUMENT,),
}


def connect(address: str) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(address, options=CLIENT_OPTIONS)
