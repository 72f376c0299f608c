"""Both clients against a real gRPC server that answers by a script: breaks, resumes, duplicates, errors, cancels."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any

import grpc
import pytest

from echelon import AsyncClient, ChatMessage, Client, convert_cluster, convert_jobs
from echelon.errors import (
    CancelledError,
    ConfigError,
    ConflictError,
    DeadlineError,
    EchelonError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    UnavailableError,
)
from echelon.retry import RetryPolicy
from echelon.sampling import SamplingParams
from echelon.types import (
    Cluster,
    ClusterEvent,
    Completion,
    ItemCounts,
    ItemResult,
    JobState,
    JobStatus,
    Model,
    StreamEvent,
    Usage,
)
from echelon.v1 import cluster_pb2, generation_pb2, jobs_pb2
from tests.unit.scripted import IDS, WORDS, ScriptedServer, completion, fail, tokens

QUICK = RetryPolicy(initial_s=0.01, max_s=0.05)
Answer = tuple[list[StreamEvent], Completion | None]


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as scripted:
        yield scripted


def stream_sync(address: str, prompt: str = "once", **options: Any) -> Answer:
    with Client(address, timeout_s=20.0, retry=QUICK) as client, client.stream(prompt, **options) as events:
        return list(events), events.completion


def stream_async(address: str, prompt: str = "once", **options: Any) -> Answer:
    async def run() -> Answer:
        async with AsyncClient(address, timeout_s=20.0, retry=QUICK) as client:
            async with client.stream(prompt, **options) as events:
                return [event async for event in events], events.completion

    return asyncio.run(run())


@pytest.fixture(params=[stream_sync, stream_async], ids=["sync", "async"])
def stream(request: pytest.FixtureRequest) -> Callable[..., Answer]:
    function: Callable[..., Answer] = request.param
    return function


def check_whole(answer: Answer) -> None:
    """Every token once, in order, and the same again at the end."""
    events, whole = answer
    assert whole is not None
    assert tuple(token_id for event in events for token_id in event.token_ids) == IDS == whole.token_ids
    assert "".join(event.text for event in events) == "".join(WORDS) == whole.text
    assert whole.usage == Usage(3, 6)


def limits_s(server: ScriptedServer, *known_s: float) -> list[float]:
    """Which of these each call was given: no more of it is left when the call comes, if less on a busy machine."""
    return [next(limit for limit in known_s if remaining < limit + 0.5) for remaining in server.remaining_s]


def test_an_undisturbed_stream(server: ScriptedServer, stream: Callable[..., Answer]) -> None:
    server.on("StreamGenerate", tokens(0, 6, end=True))
    sampling = SamplingParams(temperature=0.0, stop_token_ids=(7,))
    answer = stream(server.address, model="tiny", sampling=sampling, max_tokens=6, seed=5, timeout_s=9.0)
    check_whole(answer)
    (request,) = server.requests["StreamGenerate"]
    assert (request.text, request.model, len(request.request_id)) == ("once", "tiny", 32)
    assert request.sampling == generation_pb2.SamplingParams(temperature=0.0, stop_token_ids=[7], max_tokens=6, seed=5)
    assert not request.HasField("resume")
    assert limits_s(server, 9, 60) == [9]
    assert server.requests["CancelGeneration"] == []


def test_a_stream_that_breaks_twice_goes_on_at_the_next_token(
    server: ScriptedServer, stream: Callable[..., Answer]
) -> None:
    def unavailable(context: Any) -> None:
        fail(context, UnavailableError("a replica ended"))

    server.on(
        "StreamGenerate",
        tokens(0, 2, then=unavailable),
        tokens(2, 5, then=lambda context: context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")),
        tokens(5, 6, end=True),
    )
    check_whole(stream(server.address, request_id="mine", seed=3))
    first, second, third = server.requests["StreamGenerate"]
    assert [list(ids.ids) for ids in second.resume.received] == [[11, 12]]
    assert [list(ids.ids) for ids in third.resume.received] == [[11, 12, 13, 14, 15]]
    for again in (second, third):
        again.ClearField("resume")
        assert again == first


def test_duplicates_and_gaps_reach_nobody(server: ScriptedServer, stream: Callable[..., Answer]) -> None:
    def broken(context: Any) -> None:
        context.abort(grpc.StatusCode.UNAVAILABLE, "gone")

    # A server that replays from the start; one that skips a token; then an honest one without its last delta.
    server.on(
        "StreamGenerate", tokens(0, 3, then=broken), tokens(0, 4, then=broken), tokens(5, 6), tokens(4, 5, end=True)
    )
    check_whole(stream(server.address))
    assert [len(r.resume.received[0].ids) for r in server.requests["StreamGenerate"][1:]] == [3, 4, 4]


def test_a_stream_survives_a_server_that_is_killed_and_started_again(stream: Callable[..., Answer]) -> None:
    first = ScriptedServer()
    half = threading.Event()

    def hang(context: Any) -> None:
        half.set()
        gone = threading.Event()
        context.add_callback(gone.set)
        gone.wait(20)

    first.on("StreamGenerate", tokens(0, 3, then=hang))
    found: list[Answer] = []
    reader = threading.Thread(target=lambda: found.append(stream(first.address)))
    reader.start()
    assert half.wait(20)
    first.stop()
    with ScriptedServer(first.port) as second:
        second.on("StreamGenerate", tokens(3, 6, end=True))
        reader.join(20)
    check_whole(found[0])
    assert list(second.requests["StreamGenerate"][0].resume.received[0].ids) == [11, 12, 13]


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequestError("prompt of 9 tokens", reason="CONTEXT_TOO_LONG", field="prompt", request_id="r"),
        ConflictError("other content", request_id="r"),
        CancelledError("cancelled elsewhere", request_id="r"),
        DeadlineError("too late", request_id="r"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_the_servers_error_arrives_whole_and_is_not_tried_again(
    server: ScriptedServer, stream: Callable[..., Answer], error: EchelonError
) -> None:
    server.on("StreamGenerate", tokens(0, 1, then=lambda context: fail(context, error)))
    with pytest.raises(type(error)) as caught:
        stream(server.address)
    assert vars(caught.value) == vars(error)
    assert len(server.requests["StreamGenerate"]) == 1


def test_a_full_queue_is_tried_again(server: ScriptedServer, stream: Callable[..., Answer]) -> None:
    full = OverloadedError("queue full", retry_after_s=0.01)
    server.on("StreamGenerate", tokens(0, 0, then=lambda context: fail(context, full)), tokens(0, 6, end=True))
    check_whole(stream(server.address))


def test_nothing_listening_ends_with_the_deadline(stream: Callable[..., Answer]) -> None:
    """It says why, unless the deadline passed in the middle of an attempt: then nobody knows yet."""
    why = r"deadline.*(cannot reach localhost:1: Connection refused|before localhost:1 answered)"
    with pytest.raises(DeadlineError, match=why):
        stream("localhost:1", timeout_s=0.5)


def test_a_server_that_never_answers_ends_with_the_deadline(
    server: ScriptedServer, stream: Callable[..., Answer]
) -> None:
    server.on("StreamGenerate", tokens(0, 1, then=lambda context: time.sleep(1.5)))
    with pytest.raises(DeadlineError):
        stream(server.address, timeout_s=0.3)


def test_generate_gives_the_whole_answer(server: ScriptedServer) -> None:
    server.on("StreamGenerate", tokens(0, 6, end=True), tokens(0, 6, end=True))
    with Client(server.address) as client:
        assert client.generate("once", request_id="a") == completion("a")

    async def run() -> Completion:
        async with AsyncClient(server.address) as client:
            return await client.generate("once", request_id="b")

    assert asyncio.run(run()) == completion("b")


def waiting(entered: threading.Event) -> Callable[[Any], None]:
    def hang(context: Any) -> None:
        gone = threading.Event()
        context.add_callback(gone.set)
        entered.set()
        gone.wait(20)

    return hang


def cancel_handler(cancelled: threading.Event) -> Callable[[Any, Any], generation_pb2.CancelGenerationResponse]:
    def handler(request: Any, context: Any) -> generation_pb2.CancelGenerationResponse:
        cancelled.set()
        return generation_pb2.CancelGenerationResponse(cancelled_request_ids=request.request_ids)

    return handler


def test_leaving_the_loop_cancels_at_the_server(server: ScriptedServer) -> None:
    entered, cancelled = threading.Event(), threading.Event()
    server.on("StreamGenerate", tokens(0, 1, then=waiting(entered)))
    server.on("CancelGeneration", cancel_handler(cancelled))
    with Client(server.address) as client:
        for event in client.stream("once", request_id="mine"):
            assert event.token_ids == (11,)
            break
        assert cancelled.is_set()
    assert list(server.requests["CancelGeneration"][0].request_ids) == ["mine"]


def test_a_cancelled_task_cancels_at_the_server(server: ScriptedServer) -> None:
    entered, cancelled = threading.Event(), threading.Event()
    server.on("StreamGenerate", tokens(0, 1, then=waiting(entered)))
    server.on("CancelGeneration", cancel_handler(cancelled))

    async def run() -> None:
        async with AsyncClient(server.address) as client:
            task = asyncio.create_task(client.generate("once", request_id="mine"))
            await asyncio.to_thread(entered.wait, 20)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(run())
    assert list(server.requests["CancelGeneration"][0].request_ids) == ["mine"]


def test_closing_the_client_ends_its_streams(server: ScriptedServer) -> None:
    entered = threading.Event()
    server.on("StreamGenerate", tokens(0, 1, then=waiting(entered)))
    client, caught = Client(server.address), []

    def read() -> None:
        try:
            client.generate("once")
        except EchelonError as error:
            caught.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    assert entered.wait(20)
    client.close()
    reader.join(20)
    assert [type(error) for error in caught] == [CancelledError]
    with pytest.raises(CancelledError, match="closed"):
        client.cluster()


def test_closing_the_asynchronous_client_ends_its_streams(server: ScriptedServer) -> None:
    entered = threading.Event()
    server.on("StreamGenerate", tokens(0, 1, then=waiting(entered)))

    async def run() -> None:
        client = AsyncClient(server.address)
        task = asyncio.create_task(client.generate("once"))
        await asyncio.to_thread(entered.wait, 20)
        await client.close()
        with pytest.raises(CancelledError, match="closed"):
            await task

    asyncio.run(run())


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({}, "input"),
        ({"prompt": "a", "token_ids": [1]}, "input"),
        ({"token_ids": [1, -1]}, "token_ids"),
        ({"token_ids": [2**31]}, "token_ids"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"prompt": "a", "template_args": {}}, "template_args"),
        ({"prompt": "a", "timeout_s": 0.0}, "timeout_s"),
        ({"prompt": "a", "timeout_s": float("inf")}, "timeout_s"),
        ({"prompt": "a", "temperature": float("nan")}, "sampling.temperature"),
        ({"prompt": "a", "max_tokens": 0}, "sampling.max_tokens"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_sent(options: dict[str, Any], field: str) -> None:
    with Client("localhost:1") as client, pytest.raises(InvalidRequestError) as caught:
        client.generate(**options)
    assert caught.value.field == field


def test_other_inputs_reach_the_server(server: ScriptedServer) -> None:
    server.on("StreamGenerate", tokens(0, 6, end=True), tokens(0, 6, end=True))
    with Client(server.address) as client:
        client.generate(token_ids=[1, 2, 3])
        messages: list[ChatMessage | Mapping[str, str]] = [ChatMessage("system", "be brief")]
        messages.append({"role": "user", "content": "hi"})
        client.generate(messages=messages, template_args={"enable_thinking": False})
    ids, chat = server.requests["StreamGenerate"]
    assert list(ids.token_ids.ids) == [1, 2, 3]
    assert [(m.role, m.content) for m in chat.chat.messages] == [("system", "be brief"), ("user", "hi")]
    assert dict(chat.chat.template_args) == {"enable_thinking": False}


@pytest.mark.parametrize("address", ["localhost", "localhost:", "localhost:port", "localhost:70000", ""])
def test_an_address_needs_a_port(address: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        Client(address)


CLUSTER = Cluster(
    version="0.1.0", term=2, coordinator_pid=7, queued=0, running=0, parked=0, models=(), replicas=(), ranks=()
)
MODEL = Model(name="tiny", source="/tiny", state="active", dtype="float32", architecture="Llama", max_context=512)


def both(address: str, of: Callable[[Any], Any]) -> list[Any]:
    """The same call on each client; an async iterator is read into a list."""

    async def run() -> Any:
        async with AsyncClient(address, timeout_s=20.0, retry=QUICK) as client:
            answer = of(client)
            return await answer if isinstance(answer, Awaitable) else [item async for item in answer]

    with Client(address, timeout_s=20.0, retry=QUICK) as client:
        answer = of(client)
        found = list(answer) if isinstance(answer, Iterator) else answer
    return [found, asyncio.run(run())]


def test_calls_with_one_answer_are_tried_again(server: ScriptedServer) -> None:
    def away(request: Any, context: Any) -> Any:
        fail(context, UnavailableError("draining", reason="DRAINING"))

    for _ in range(2):
        server.on("GetCluster", away, lambda request, context: convert_cluster.cluster_to_proto(CLUSTER))
        server.on(
            "ListModels",
            lambda request, context: cluster_pb2.ListModelsResponse(models=[convert_cluster.model_to_proto(MODEL)]),
        )
        server.on("CancelGeneration", cancel_handler(threading.Event()))
    assert both(server.address, lambda client: client.cluster()) == [CLUSTER, CLUSTER]
    assert both(server.address, lambda client: client.models()) == [[MODEL], [MODEL]]
    assert both(server.address, lambda client: client.cancel("a", "b")) == [("a", "b"), ("a", "b")]


def test_events_go_on_after_the_last_one_seen(server: ScriptedServer) -> None:
    events = [ClusterEvent(sequence, 1.5, "kind", "subject", {}) for sequence in (4, 5, 6)]

    def first(request: Any, context: Any) -> Iterator[Any]:
        yield from map(convert_cluster.event_to_proto, events[:2])
        context.abort(grpc.StatusCode.UNAVAILABLE, "gone")

    for _ in range(2):
        server.on("WatchClusterEvents", first, lambda r, c: map(convert_cluster.event_to_proto, events[1:]))
    assert both(server.address, lambda client: client.events(after=3)) == [events, events]
    assert [request.after_sequence for request in server.requests["WatchClusterEvents"]] == [3, 5, 3, 5]


def job(state: JobState, done: int = 0) -> JobStatus:
    return JobStatus(
        job_id="j", state=state, model="tiny", counts=ItemCounts(2, done), usage=Usage(), create_unix_s=1.5
    )


def test_a_job_from_submit_to_results(server: ScriptedServer) -> None:
    items = [ItemResult(custom_id=str(i), index=i, cursor=i + 1, completion=completion(f"r{i}")) for i in range(2)]

    def watch(request: Any, context: Any) -> Iterator[Any]:
        yield jobs_pb2.WatchBatchJobResponse(batch_job=convert_jobs.job_to_proto(job(JobState.RUNNING, 1)))
        context.abort(grpc.StatusCode.UNAVAILABLE, "gone")

    def ended(request: Any, context: Any) -> Iterator[Any]:
        yield jobs_pb2.WatchBatchJobResponse(batch_job=convert_jobs.job_to_proto(job(JobState.SUCCEEDED, 2)))

    def results(request: Any, context: Any) -> Iterator[Any]:
        for item in items:
            yield jobs_pb2.StreamBatchJobResultsResponse(result=convert_jobs.item_to_proto(item))

    async def run() -> Any:
        async with AsyncClient(server.address, retry=QUICK) as client:
            handle = await client.jobs.submit(["a", {"custom_id": "x", "prompt": "b"}], job_id="j")
            return await handle.wait(timeout_s=20), [item async for item in handle.results()]

    for _ in range(2):
        server.on("CreateBatchJob", lambda request, context: convert_jobs.job_to_proto(job(JobState.QUEUED)))
        server.on("WatchBatchJob", watch, ended)
        server.on("StreamBatchJobResults", results)
    with Client(server.address, retry=QUICK) as client:
        handle = client.jobs.submit(["a", {"custom_id": "x", "prompt": "b"}], job_id="j")
        assert (handle.wait(timeout_s=20), list(handle.results())) == (job(JobState.SUCCEEDED, 2), items)
    assert asyncio.run(run()) == (job(JobState.SUCCEEDED, 2), items)
    for request in server.requests["CreateBatchJob"]:
        lines = b'{"custom_id": "0", "prompt": "a"}\n{"custom_id": "x", "prompt": "b"}\n'
        assert (request.batch_job_id, request.source.jsonl) == ("j", lines)
    assert all(request.follow for request in server.requests["StreamBatchJobResults"])


def test_waiting_for_a_job_has_a_limit(server: ScriptedServer) -> None:
    def watch(request: Any, context: Any) -> Iterator[Any]:
        yield jobs_pb2.WatchBatchJobResponse(batch_job=convert_jobs.job_to_proto(job(JobState.RUNNING)))
        waiting(threading.Event())(context)

    server.on("WatchBatchJob", watch)
    server.on("GetBatchJob", lambda request, context: convert_jobs.job_to_proto(job(JobState.RUNNING)))
    with Client(server.address) as client, pytest.raises(DeadlineError):
        client.jobs.get("j").wait(timeout_s=0.3)


def test_lists_are_read_to_their_last_page(server: ScriptedServer) -> None:
    page = [convert_jobs.job_to_proto(job(JobState.QUEUED))]
    for _ in range(2):
        server.on(
            "ListBatchJobs",
            lambda r, c: jobs_pb2.ListBatchJobsResponse(batch_jobs=page, next_page_token="2"),
            lambda r, c: jobs_pb2.ListBatchJobsResponse(batch_jobs=page * 2),
        )
    assert [len(found) for found in both(server.address, lambda client: client.jobs.list())] == [3, 3]
    assert [request.page_token for request in server.requests["ListBatchJobs"]] == ["", "2", "", "2"]


def test_pages_are_asked_for_as_they_are_read(server: ScriptedServer) -> None:
    names = [f"batchJobs/j{index}" for index in range(5)]

    def pages(request: Any, context: Any) -> Any:
        first = int(request.page_token or 0)
        last = first + request.page_size
        jobs = [jobs_pb2.BatchJob(name=name, state=jobs_pb2.BatchJob.STATE_QUEUED) for name in names[first:last]]
        token = str(last) if last < len(names) else ""
        return jobs_pb2.ListBatchJobsResponse(batch_jobs=jobs, next_page_token=token)

    server.on("ListBatchJobs", *[pages] * 8)
    for listed in both(server.address, lambda client: client.jobs.list(page_size=2)):
        assert [found.job_id for found in listed] == ["j0", "j1", "j2", "j3", "j4"]
    assert [(r.page_size, r.page_token) for r in server.requests["ListBatchJobs"]] == [(2, ""), (2, "2"), (2, "4")] * 2
    with Client(server.address) as client:
        assert [found.job_id for found, _ in zip(client.jobs.list(page_size=2), range(3), strict=False)] == names_of(3)
        with pytest.raises(InvalidRequestError, match="page_size must be an integer >= 1, got 0"):
            list(client.jobs.list(page_size=0))
    assert len(server.requests["ListBatchJobs"]) == 8, "the third page was not wanted"


def names_of(count: int) -> list[str]:
    return [f"j{index}" for index in range(count)]


def test_a_submit_that_broke_is_sent_again_under_the_same_id(server: ScriptedServer) -> None:
    def lost(request: Any, context: Any) -> Any:
        context.abort(grpc.StatusCode.UNAVAILABLE, "gone")

    server.on("CreateBatchJob", lost, lambda request, context: convert_jobs.job_to_proto(job(JobState.QUEUED)))
    with Client(server.address, retry=QUICK) as client:
        client.jobs.submit(b"{}\n")
    first, second = server.requests["CreateBatchJob"]
    assert first.batch_job_id
    assert first == second


@pytest.mark.parametrize("source", ["/no/such/file.jsonl", [{"custom_id": object()}], b"x" * (64 * 2**20)])
def test_an_input_that_cannot_be_sent_is_refused(source: Any) -> None:
    with Client("localhost:1") as client, pytest.raises(InvalidRequestError) as caught:
        client.jobs.submit(source)
    assert caught.value.field == "source"


def test_a_black_hole_ends_by_the_deadline(stream: Callable[..., Answer]) -> None:
    with socket.socket() as silent:  # accepts, and never says a word
        silent.bind(("localhost", 0))
        silent.listen()
        with pytest.raises(DeadlineError):
            stream(f"localhost:{silent.getsockname()[1]}", timeout_s=0.3)


def test_errors_of_a_request_carry_its_id(server: ScriptedServer, stream: Callable[..., Answer]) -> None:
    """Whoever they come from: the server with or without saying it, the transport, the SDK itself."""

    def aborts(code: grpc.StatusCode) -> Any:
        return tokens(0, 1, then=lambda context: context.abort(code, "by a proxy"))

    anonymous = InvalidRequestError("bad field", field="prompt")
    server.on("StreamGenerate", tokens(0, 0, then=lambda context: fail(context, anonymous)))
    server.on("StreamGenerate", aborts(grpc.StatusCode.INTERNAL), aborts(grpc.StatusCode.PERMISSION_DENIED))
    server.on("StreamGenerate", tokens(0, 1, then=lambda context: time.sleep(1.0)))
    errors: list[EchelonError] = []
    for options in ({}, {}, {}, {"timeout_s": 0.3}):
        with pytest.raises(EchelonError) as caught:
            stream(server.address, request_id="mine", **options)
        errors.append(caught.value)
    server.stop()
    with pytest.raises(EchelonError) as caught:
        stream(server.address, request_id="mine", timeout_s=0.3)
    errors.append(caught.value)
    assert [error.request_id for error in errors] == ["mine"] * 5
    assert str(errors[0]) == "bad field (request_id=mine)"
    assert errors[0].message == "bad field"
    assert all(str(error).endswith(" (request_id=mine)") for error in errors)


def test_other_calls_have_no_request_to_name(server: ScriptedServer) -> None:
    server.on("GetCluster", lambda request, context: fail(context, NotFoundError("nothing")))
    with Client(server.address) as client, pytest.raises(NotFoundError) as caught:
        client.cluster()
    assert (caught.value.request_id, str(caught.value)) == (None, "nothing")


def test_a_copy_with_options_shares_the_connection(server: ScriptedServer) -> None:
    def away(request: Any, context: Any) -> Any:
        fail(context, UnavailableError("draining"))

    def here(request: Any, context: Any) -> Any:
        peers.add(context.peer())
        return convert_cluster.cluster_to_proto(CLUSTER)

    peers: set[str] = set()
    server.on("GetCluster", here, away, away, here, here)
    with Client(server.address, timeout_s=20.0, retry=QUICK) as client:
        assert client.cluster() == CLUSTER
        hasty = client.with_options(timeout_s=7, max_retries=0)
        with pytest.raises(UnavailableError, match="draining"):
            hasty.cluster()
        patient = hasty.with_options(max_retries=1)
        assert patient.cluster() == CLUSTER
        hasty.close()
        with pytest.raises(CancelledError, match="closed"):
            hasty.cluster()
        with pytest.raises(CancelledError, match="closed"):
            patient.cluster()
        assert client.cluster() == CLUSTER
        other = client.with_options(timeout_s=1)
        with pytest.raises(ConfigError, match="max_retries must be an integer >= 0, got -1"):
            client.with_options(max_retries=-1)
    with pytest.raises(CancelledError, match="closed"):
        other.cluster()
    assert len(peers) == 1
    assert limits_s(server, 7, 20) == [20, 7, 7, 7, 20]


def test_an_asynchronous_copy_does_as_well(server: ScriptedServer) -> None:
    entered, gone = threading.Event(), threading.Event()
    seen_gone: list[bool] = []

    def hang(context: Any) -> None:
        context.add_callback(gone.set)
        entered.set()
        seen_gone.append(gone.wait(10))

    server.on("StreamGenerate", tokens(0, 1, then=hang))
    server.on("CancelGeneration", cancel_handler(threading.Event()))
    server.on("GetCluster", lambda request, context: convert_cluster.cluster_to_proto(CLUSTER))

    async def run() -> None:
        async with AsyncClient(server.address, timeout_s=20.0) as client:
            copy = client.with_options(timeout_s=60)
            task = asyncio.create_task(copy.generate("once", request_id="mine"))
            await asyncio.to_thread(entered.wait, 20)
            await copy.close()
            with pytest.raises(CancelledError, match="closed"):
                await task
            assert await client.cluster() == CLUSTER

    asyncio.run(run())
    assert seen_gone == [True], "the call itself was ended, long before its deadline"
    assert limits_s(server, 20, 60)[::2] == [60, 20]
    assert list(server.requests["CancelGeneration"][0].request_ids) == ["mine"]
