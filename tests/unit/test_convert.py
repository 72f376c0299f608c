"""The public nouns survive the wire, unset fields stay unset, and unknown content is an error."""

from __future__ import annotations

import dataclasses

import pytest

from echelon import convert, convert_cluster, convert_jobs
from echelon.errors import InternalError, InvalidRequestError, NotFoundError
from echelon.sampling import CONSTRAINTS, SamplingParams
from echelon.types import (
    Admitted,
    Choice,
    Cluster,
    ClusterEvent,
    Completion,
    FinishReason,
    ItemCounts,
    ItemResult,
    JobState,
    JobStatus,
    Model,
    Rank,
    Replica,
    Spare,
    SpareDevice,
    StreamEvent,
    Timing,
    TokenLogprob,
    Usage,
)
from echelon.v1 import generation_pb2, jobs_pb2

LOGPROBS = (TokenLogprob(5, -0.25, ((5, -0.25), (9, -2.5))), TokenLogprob(6, -1.0))
COMPLETION = Completion(
    request_id="r",
    model="tiny",
    choices=(
        Choice(text="grüße", token_ids=(5, 6), finish_reason=FinishReason.STOP, logprobs=LOGPROBS, matched_stop="e"),
        Choice(index=1, text="x", token_ids=(7,), finish_reason=FinishReason.LENGTH),
    ),
    usage=Usage(3, 3, 4, 2),
    timing=Timing(0.25, 0.5, 1.75),
    prompt_logprobs=LOGPROBS,
)


WHOLE = SamplingParams(
    temperature=0.5,
    top_p=0.75,
    top_k=9,
    min_p=0.125,
    presence_penalty=-1.0,
    frequency_penalty=1.0,
    repetition_penalty=1.25,
    logit_bias={0: -100.0, 2**31 - 1: 0.5},
    bad_words=("x", " y"),
    max_tokens=30,
    min_tokens=4,
    seed=-(2**63),
    n=3,
    stop=("</s>", "狐"),
    include_stop=True,
    stop_token_ids=(0, 2**31 - 1),
    ignore_eos=True,
    logprobs=20,
    prompt_logprobs=0,
)
ZEROS = SamplingParams(
    temperature=0.0,
    top_k=0,
    min_p=0.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    min_tokens=0,
    seed=0,
    logprobs=0,
    prompt_logprobs=0,
)


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(),
        ZEROS,  # zero is not unset
        WHOLE,
        SamplingParams(json_schema={"type": "object"}),
        SamplingParams(regex="a+"),
        SamplingParams(grammar='start: "a"'),
        SamplingParams(json_object=True),
        SamplingParams(choice=("yes", "no")),
    ],
)
def test_sampling(sampling: SamplingParams) -> None:
    assert convert.sampling_from_proto(convert.sampling_to_proto(sampling)) == sampling


def test_this_file_sets_every_field_of_sampling() -> None:
    for field in dataclasses.fields(SamplingParams):
        if field.name not in CONSTRAINTS:
            assert getattr(WHOLE, field.name) != field.default, field.name


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (generation_pb2.SamplingParams(logit_bias={2**31: 1.0}), "sampling.logit_bias"),
        (generation_pb2.SamplingParams(choice=generation_pb2.Alternatives()), "sampling.choice"),
        (generation_pb2.SamplingParams(regex=""), "sampling.regex"),
        (generation_pb2.SamplingParams(stop=[""]), "sampling.stop"),
    ],
)
def test_what_only_a_client_of_another_make_sends_is_refused(
    message: generation_pb2.SamplingParams, field: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        convert.sampling_from_proto(message)
    assert caught.value.field == field


def test_no_json_object_is_no_constraint() -> None:
    assert convert.sampling_from_proto(generation_pb2.SamplingParams(json_object=False)) == SamplingParams()


def test_bad_sampling_from_the_wire_names_its_field() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        convert.sampling_from_proto(generation_pb2.SamplingParams(temperature=float("nan")))
    assert caught.value.field == "sampling.temperature"


@pytest.mark.parametrize(
    "event", [Admitted("r", 7, -5), StreamEvent("r", 0, 3, "text", (5, 6), LOGPROBS), COMPLETION], ids=type
)
def test_stream_messages(event: Admitted | StreamEvent | Completion) -> None:
    assert convert.stream_from_proto(convert.stream_to_proto(event)) == event


def test_an_unknown_stream_message_is_an_error() -> None:
    with pytest.raises(InternalError):
        convert.stream_from_proto(generation_pb2.StreamGenerateResponse(request_id="r"))


@pytest.mark.parametrize("choices", [0, 1, 2])
def test_an_answer_without_a_finished_choice_is_an_error(choices: int) -> None:
    with pytest.raises(InternalError):
        convert.completion_from_proto(generation_pb2.GenerateResponse(choices=[generation_pb2.Choice()] * choices))


@pytest.mark.parametrize("state", JobState)
def test_job(state: JobState) -> None:
    job = JobStatus(
        job_id="nightly-42",
        state=state,
        model="tiny",
        counts=ItemCounts(10, 4, 3, 2, 1),
        usage=Usage(100, 200, 5),
        create_unix_s=1_700_000_000.25,
    )
    assert convert_jobs.job_from_proto(convert_jobs.job_to_proto(job)) == job
    ended = dataclasses.replace(job, start_unix_s=1_700_000_001.5, end_unix_s=1_700_000_002.5)
    assert convert_jobs.job_from_proto(convert_jobs.job_to_proto(ended)) == ended


def test_a_job_state_of_a_later_version_is_an_error() -> None:
    with pytest.raises(InternalError):
        convert_jobs.job_from_proto(jobs_pb2.BatchJob(name="batchJobs/a", state=99))  # type: ignore[arg-type]


def test_job_names() -> None:
    assert convert_jobs.job_name("a") == "batchJobs/a"
    assert convert_jobs.job_id_of("batchJobs/a") == convert_jobs.job_id_of("a") == "a"


def test_items() -> None:
    item = ItemResult(custom_id="c", index=3, cursor=8, completion=COMPLETION)
    assert convert_jobs.item_from_proto(convert_jobs.item_to_proto(item)) == item
    failed = ItemResult(custom_id="c", index=3, cursor=8, error=NotFoundError("no", request_id="r"))
    back = convert_jobs.item_from_proto(convert_jobs.item_to_proto(failed))
    assert isinstance(back.error, NotFoundError)
    assert vars(back.error) == vars(failed.error)
    assert back.completion is None


def rank(tensor: int, node: str) -> Rank:
    return Rank(
        replica=0,
        pipeline=0,
        data=0,
        tensor=tensor,
        expert=0,
        leader=tensor == 0,
        pid=100 + tensor,
        node_id=node,
        epoch=4,
        state="ready",
        device="cpu",
        parameter_bytes=2**33,
        kv_bytes=2**34,
        planned_parameter_bytes=2**33,
        planned_kv_bytes=2**34,
    )


def test_cluster_keeps_ranks_in_mesh_order_over_nodes() -> None:
    replica = Replica(
        index=0, epoch=4, state="ready", kv_blocks_total=9, kv_blocks_referenced=2, step=77, counters={"steps": 77}
    )
    model = Model(
        name="tiny", source="/models/tiny", state="active", dtype="float32", architecture="Llama", max_context=512
    )
    cluster = Cluster(
        version="0.1.0",
        term=3,
        coordinator_pid=42,
        queued=1,
        running=2,
        parked=3,
        models=(model,),
        replicas=(replica,),
        ranks=(rank(0, "a"), rank(1, "b"), rank(2, "a")),
        spares=(
            Spare(replica=0, rank=1, pid=43, node_id="b", state="warming"),
            Spare(replica=0, rank=1, pid=44, node_id="b", state="warm", on_spare_device=True),
        ),
        spare_devices=(
            SpareDevice(slot="device/1", node_id="b", state="free"),
            SpareDevice(slot="device/0", node_id="a", state="used", rank="0/2"),
            SpareDevice(slot="0/2", node_id="a", state="out"),
        ),
        journal="not durable: full",
    )
    assert convert_cluster.cluster_from_proto(convert_cluster.cluster_to_proto(cluster)) == cluster


def test_event() -> None:
    detail = {"ranks": [0, 1.5], "pid": 4242, "reason": "exit", "nested": {"ok": True, "none": None, "epoch": 3}}
    event = ClusterEvent(5, 1_700_000_000.5, "replica.fenced", "replica/0", detail)
    back = convert_cluster.event_from_proto(convert_cluster.event_to_proto(event))
    assert back == event
    assert repr(back.detail["pid"]) == "4242"
