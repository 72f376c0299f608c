"""What a serving cluster answers to bad input: one clear error with the right status, and nothing else disturbed.

Requests go over bare stubs, past every check of the SDK. Metrics, health and reflection are asked here too, since
they must tell the truth about a cluster that has refused much.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from google.rpc import code_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from echelon import EchelonError, InvalidRequestError, NotFoundError
from echelon.testing import LocalCluster
from echelon.types import Cluster, JobState
from echelon.v1 import generation_pb2, generation_pb2_grpc, jobs_pb2, jobs_pb2_grpc
from tests.cluster.calls import eventually
from tests.cluster.conftest import free_ports
from tests.cluster.stubs import TIMEOUT_S, Served, refusal
from tests.tiny import make_checkpoint

pytestmark = pytest.mark.cluster

Request = generation_pb2.GenerateRequest
Sampling = generation_pb2.SamplingParams
VOCABULARY, MAX_CONTEXT = 320, 512
GOOD_LINE = b'{"custom_id": "good", "prompt": "Geese fly so", "max_tokens": 2}\n'


@pytest.fixture(scope="module")
def served(ray_address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = make_checkpoint(tmp_path_factory.mktemp("bad") / "tiny")
    (port,) = free_ports(1)
    metrics = f"127.0.0.1:{port}"
    with LocalCluster(
        directory, ray_address=ray_address, metrics_address=metrics, max_queue_tokens=2000, max_running=4
    ) as cluster:
        with grpc.insecure_channel(cluster.target) as channel:
            generation = generation_pb2_grpc.GenerationServiceStub(channel)
            yield Served(cluster, channel, generation, jobs_pb2_grpc.BatchJobServiceStub(channel), port)


@pytest.fixture
def undisturbed(served: Served) -> Iterator[Served]:
    """Afterwards the same processes serve, a good request is answered, and no block is referenced."""

    def processes(cluster: Cluster) -> list[object]:
        return [cluster.coordinator_pid, cluster.replicas[0].epoch, *(rank.pid for rank in cluster.ranks)]

    before = served.cluster.status()
    yield served
    assert len(served.cluster.client().generate("Geese fly so", max_tokens=2, ignore_eos=True).token_ids) == 2
    idle = served.cluster.wait(lambda now: now.replicas[0].kv_blocks_referenced == 0, "no referenced block")
    assert (processes(idle), idle.queued, idle.running) == (processes(before), 0, 0)


def ids(*values: int) -> generation_pb2.TokenIds:
    return generation_pb2.TokenIds(ids=values)


def sampled(**values: object) -> Request:
    return Request(text="x", sampling=Sampling(**values))  # type: ignore[arg-type]


def resumed(*received: int) -> Request:
    resume = generation_pb2.Resume(received=[ids(*received)])
    return Request(text="x", request_id="held-elsewhere", sampling=Sampling(max_tokens=4), resume=resume)


def said(role: str) -> Request:
    return Request(chat=generation_pb2.ChatPrompt(messages=[generation_pb2.ChatMessage(role=role, content="x")]))


REFUSED: dict[str, tuple[Request, str, str]] = {
    "no input": (Request(), "prompt", "set one of text, token_ids or messages"),
    "empty text": (Request(text=""), "text", "text is empty"),
    "no ids": (Request(token_ids=ids()), "prompt", "the prompt has no tokens"),
    "no messages": (Request(chat=generation_pb2.ChatPrompt()), "messages", "messages is empty"),
    "no role": (said(""), "messages", r"messages\[0\] has no role"),
    "id outside": (Request(token_ids=ids(7, VOCABULARY)), "token_ids", r"token_ids\[1\] = 320 is outside the vocab"),
    "stop id outside": (sampled(stop_token_ids=[999]), "sampling.stop_token_ids", "= 999 is outside the vocabulary"),
    "held id outside": (
        resumed(5, VOCABULARY),
        "resume.received[0]",
        r"received\[0\]\[1\] = 320 is outside the vocabulary",
    ),
    "held too many": (resumed(5, 5, 5, 5, 5), "resume.received", "holds 5 ids, over max_tokens=4"),
    "temperature NaN": (sampled(temperature=math.nan), "sampling.temperature", "finite number >= 0, got nan"),
    "temperature inf": (sampled(temperature=math.inf), "sampling.temperature", "finite number >= 0, got inf"),
    "temperature < 0": (sampled(temperature=-0.5), "sampling.temperature", "finite number >= 0, got -0.5"),
    "top_p NaN": (sampled(top_p=math.nan), "sampling.top_p", r"must be in \(0, 1\], got nan"),
    "top_p 0": (sampled(top_p=0.0), "sampling.top_p", r"must be in \(0, 1\], got 0.0"),
    "top_k < 0": (sampled(top_k=-1), "sampling.top_k", "an integer >= 0, got -1"),
    "max_tokens 0": (sampled(max_tokens=0), "sampling.max_tokens", "an integer >= 1, got 0"),
    "max_tokens < 0": (sampled(max_tokens=-9), "sampling.max_tokens", "an integer >= 1, got -9"),
    "logprobs": (sampled(logprobs=21), "sampling.logprobs", "from 0 to 20, got 21"),
    "request_id": (Request(text="x", request_id="a b"), "request_id", "request_id must be 1 to 128 letters"),
    "job's id": (Request(text="x", request_id="job.a.0"), "request_id", "must not start with 'job.'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_request_is_refused_by_field(undisturbed: Served, name: str) -> None:
    request, field, message = REFUSED[name]
    for method in (undisturbed.generation.Generate, undisturbed.generation.StreamGenerate):
        error = refusal(lambda method=method: method(request, timeout=TIMEOUT_S))  # type: ignore[misc]
        assert (type(error), error.reason, error.field) == (InvalidRequestError, "INVALID_FIELD", field)
        with pytest.raises(InvalidRequestError, match=message):
            raise error


@pytest.mark.parametrize(
    ("prompt_tokens", "max_tokens", "field", "remedy"),
    [
        (MAX_CONTEXT, 1, "prompt", "shorten the prompt to 511 tokens or less"),
        (9, 2**31 - 1, "sampling.max_tokens", "set max_tokens to 503 or less"),
    ],
)
def test_what_does_not_fit_the_context_gets_the_arithmetic(
    undisturbed: Served, prompt_tokens: int, max_tokens: int, field: str, remedy: str
) -> None:
    request = Request(token_ids=ids(*[5] * prompt_tokens), sampling=Sampling(max_tokens=max_tokens))
    error = refusal(lambda: undisturbed.generation.Generate(request, timeout=TIMEOUT_S))
    assert (error.code, error.reason, error.field) == (code_pb2.INVALID_ARGUMENT, "CONTEXT_TOO_LONG", field)
    sum_ = f"{prompt_tokens} prompt tokens + max_tokens={max_tokens} = {prompt_tokens + max_tokens}"
    assert error.message.startswith(f"{sum_}, over max_context=512 of 'tiny'; {remedy}")


def test_an_unknown_model_is_not_found_for_requests_and_jobs(undisturbed: Served) -> None:
    source = jobs_pb2.BatchSource(jsonl=GOOD_LINE)
    job = jobs_pb2.CreateBatchJobRequest(batch_job_id="unserved", model="large", source=source)
    for call in (
        lambda: undisturbed.generation.Generate(Request(text="x", model="large"), timeout=TIMEOUT_S),
        lambda: undisturbed.jobs.CreateBatchJob(job, timeout=TIMEOUT_S),
    ):
        error = refusal(call)
        assert (type(error), error.reason, error.field) == (NotFoundError, "MODEL_NOT_FOUND", "model")
        assert error.message == "model 'large' is not served; leave model empty, or take 'tiny'"
    assert "unserved" not in {job.job_id for job in undisturbed.cluster.client().jobs.list()}


def test_bytes_that_are_no_message_end_their_call_alone(undisturbed: Served) -> None:
    call: Callable[..., bytes] = undisturbed.channel.unary_unary("/echelon.v1.GenerationService/Generate")
    error = refusal(lambda: call(b"\xff\xff\xff\x01", timeout=TIMEOUT_S))
    assert (error.code, error.reason) == (code_pb2.INVALID_ARGUMENT, "INVALID_FIELD")


def test_more_ids_than_anybody_cancels_are_refused(undisturbed: Served) -> None:
    message = generation_pb2.CancelGenerationRequest(request_ids=["x"] * 10_001)
    error = refusal(lambda: undisturbed.generation.CancelGeneration(message, timeout=TIMEOUT_S))
    assert (error.reason, error.field) == ("INVALID_FIELD", "request_ids")
    assert error.message == "request_ids has 10001 ids; send at most 10000 at once"


@pytest.mark.parametrize(
    ("jsonl", "field", "message"),
    [
        (b"", "source.jsonl", "the batch has no items; send at least one JSON line"),
        (b"\n \r\n", "source.jsonl", "the batch has no items; send at least one JSON line"),
        (GOOD_LINE + b"{oops}\n", "source.jsonl[2]", "line 2 is not JSON: "),
        (GOOD_LINE + b"\n" + GOOD_LINE, "source.jsonl[3].custom_id", "line 3: custom_id 'good' is already the custom"),
        (GOOD_LINE + b'{"custom_id": "b"}', "source.jsonl[2].prompt", "line 2: prompt is missing; give one of"),
        (b'{"custom_id": "b", "prompt": ""}', "source.jsonl[1].prompt", "line 1: prompt is empty"),
        (b'{"custom_id": "b", "prompt": "x", "top_k": -1}', "source.jsonl[1].top_k", "line 1: top_k must be an integ"),
        (b'{"custom_id": "b", "prompt": "x", "top_p": NaN}', "source.jsonl[1]", "line 1 holds NaN, which is not JSON"),
        (b'{"custom_id": "\xe9", "prompt": "x"}', "source.jsonl[1]", "line 1 is not UTF-8 at byte 15"),
    ],
)
def test_a_bad_line_refuses_the_job_by_number_and_field(
    undisturbed: Served, jsonl: bytes, field: str, message: str
) -> None:
    source = jobs_pb2.BatchSource(jsonl=jsonl)
    job = jobs_pb2.CreateBatchJobRequest(batch_job_id="bad", source=source)
    error = refusal(lambda: undisturbed.jobs.CreateBatchJob(job, timeout=TIMEOUT_S))
    assert (type(error), error.reason, error.field) == (InvalidRequestError, "INVALID_FIELD", field)
    assert error.message.startswith(message)
    unknown = jobs_pb2.GetBatchJobRequest(name="batchJobs/bad")
    assert refusal(lambda: undisturbed.jobs.GetBatchJob(unknown, timeout=TIMEOUT_S)).reason == "JOB_NOT_FOUND"


def test_a_file_from_windows_is_read_and_what_cannot_run_is_an_items_error(undisturbed: Served) -> None:
    lines = (
        GOOD_LINE.strip(),
        b"",
        b'{"custom_id": "outside", "token_ids": [320]}',
        b'{"custom_id": "x", "prompt": "x"}',
    )
    source = jobs_pb2.BatchSource(jsonl=b"\xef\xbb\xbf" + b"\r\n".join(lines))
    undisturbed.jobs.CreateBatchJob(jobs_pb2.CreateBatchJobRequest(batch_job_id="crlf", source=source))
    job = undisturbed.cluster.client().jobs.get("crlf")
    results = {result.custom_id: result for result in job.results()}
    assert set(results) == {"good", "outside", "x"}
    error = results["outside"].error
    assert isinstance(error, InvalidRequestError) and error.field == "token_ids"
    assert (job.status().counts.succeeded, job.status().counts.failed) == (2, 1)


def test_ids_of_jobs_are_taken_once_and_unknown_ones_are_not_found(undisturbed: Served) -> None:
    def create(jsonl: bytes) -> str:
        source = jobs_pb2.BatchSource(jsonl=jsonl)
        job = jobs_pb2.CreateBatchJobRequest(batch_job_id="twice", source=source)
        return str(undisturbed.jobs.CreateBatchJob(job, timeout=TIMEOUT_S).name)

    assert create(GOOD_LINE) == create(b"\n" + GOOD_LINE) == "batchJobs/twice"
    conflict = refusal(lambda: create(GOOD_LINE.replace(b"Geese", b"Ducks")))
    assert (conflict.code, conflict.reason) == (code_pb2.ALREADY_EXISTS, "JOB_ID_CONFLICT")
    undisturbed.cluster.client().jobs.get("twice").wait()
    jobs, name = undisturbed.jobs, "batchJobs/nobody"
    for call in (
        lambda: jobs.GetBatchJob(jobs_pb2.GetBatchJobRequest(name=name), timeout=TIMEOUT_S),
        lambda: jobs.CancelBatchJob(jobs_pb2.CancelBatchJobRequest(name=name), timeout=TIMEOUT_S),
        lambda: jobs.WatchBatchJob(jobs_pb2.WatchBatchJobRequest(name=name), timeout=TIMEOUT_S),
        lambda: jobs.StreamBatchJobResults(jobs_pb2.StreamBatchJobResultsRequest(name=name), timeout=TIMEOUT_S),
    ):
        error = refusal(call)
        assert (error.code, error.reason) == (code_pb2.NOT_FOUND, "JOB_NOT_FOUND")
        assert error.message == "there is no job 'nobody'; `echelon batch list` shows those there are"


def test_a_job_cancelled_in_the_middle_leaves_nothing_running(undisturbed: Served) -> None:
    items = [{"custom_id": f"{i}", "prompt": "x", "max_tokens": 40, "ignore_eos": True} for i in range(1000)]
    client = undisturbed.cluster.client()
    job = client.jobs.submit(items, job_id="cancelled")
    next(job.results())
    job.cancel()
    ended = job.wait(timeout_s=TIMEOUT_S)
    assert ended.state is JobState.CANCELLED and 0 < ended.counts.succeeded < 1000
    assert ended.counts.running == 0
    assert len(list(job.results())) == ended.counts.succeeded + ended.counts.failed


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(undisturbed: Served) -> None:
    """Four run and four wait, of 500 prompt tokens each; one more is over max-queue-tokens=2000."""
    generation = undisturbed.generation
    long = Request(token_ids=ids(*[5] * 500), sampling=Sampling(max_tokens=12, ignore_eos=True))
    slow = Request(text="x", sampling=Sampling(max_tokens=MAX_CONTEXT - 9, ignore_eos=True))
    running = [generation.Generate.future(slow, timeout=TIMEOUT_S) for _ in range(4)]
    undisturbed.cluster.wait(lambda now: now.running == 4, "four running")
    waiting = [generation.Generate.future(long, timeout=TIMEOUT_S) for _ in range(4)]
    undisturbed.cluster.wait(lambda now: now.queued == 4, "four queued")
    error = refusal(lambda: generation.Generate(long, timeout=TIMEOUT_S))
    assert (error.code, error.reason) == (code_pb2.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    assert error.message.startswith("2000 queued prompt tokens + 500 = 2500, over max-queue-tokens=2000")
    assert error.retry_after_s
    for call in (*running, *waiting):
        assert call.result().choices[0].finish_reason == generation_pb2.FINISH_REASON_LENGTH


def test_a_reader_that_leaves_and_a_full_disk_are_no_tracebacks(undisturbed: Served) -> None:
    items = [{"custom_id": f"{i}", "prompt": "x", "max_tokens": 1} for i in range(50)]
    undisturbed.cluster.client().jobs.submit(items, job_id="piped").wait()
    command = [sys.executable, "-m", "echelon", "batch", "results", "piped", "--address", undisturbed.cluster.target]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert json.loads(process.stdout.readline())["custom_id"]
        process.stdout.close()
        assert process.stderr.read() == b""
    with Path("/dev/full").open("wb") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=TIMEOUT_S)
    assert ended.stderr == "echelon: error: the output cannot be written: No space left on device\n"
    assert ended.returncode == 1


def test_metrics_count_each_request_and_token_once(undisturbed: Served) -> None:
    before = undisturbed.metrics()
    client = undisturbed.cluster.client()
    for _ in range(2):  # the second one is the first one's answer, asked for again
        client.generate("x", max_tokens=5, seed=1, ignore_eos=True, request_id="counted")
    with pytest.raises(EchelonError):
        client.generate("y", request_id="counted")
    refusal(lambda: undisturbed.generation.Generate(Request(), timeout=TIMEOUT_S))
    list(eventually(lambda: undisturbed.metrics()["echelon_num_requests_waiting"], TIMEOUT_S))  # set at each tick
    after = undisturbed.metrics()

    def gained(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    assert gained("echelon_requests_total") == 1
    assert gained("echelon_requests_ended_total") == gained("echelon_requests_ended_total/length") == 1
    assert gained("echelon_generated_tokens_total") == 5
    assert gained("echelon_time_to_first_token_seconds_count") >= 1
    assert gained("echelon_inter_token_latency_seconds_count") >= 1
    assert after["echelon_num_requests_waiting"] == 0
    assert after["echelon_replica_epoch"] == undisturbed.cluster.status().replicas[0].epoch
    assert after["echelon_coordinator_term"] == after["echelon_journal_durable"] == 1


def test_health_and_reflection_are_answered(served: Served) -> None:
    services = {f"echelon.v1.{name}Service" for name in ("Generation", "BatchJob", "Cluster", "Model")}
    health = health_pb2_grpc.HealthStub(served.channel)
    for name in ("", *services):
        answer = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=TIMEOUT_S)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    unknown = health_pb2.HealthCheckRequest(service="Nothing")
    assert refusal(lambda: health.Check(unknown)).code == code_pb2.NOT_FOUND
    reflection = reflection_pb2_grpc.ServerReflectionStub(served.channel)
    asked = [reflection_pb2.ServerReflectionRequest(list_services="")]
    asked += [reflection_pb2.ServerReflectionRequest(file_containing_symbol=name) for name in sorted(services)]
    listed, *files = reflection.ServerReflectionInfo(iter(asked), timeout=TIMEOUT_S)
    assert services <= {service.name for service in listed.list_services_response.service}
    assert all(file.file_descriptor_response.file_descriptor_proto for file in files)
