"""Every RPC of the SDK as a value: its method, how its request is built and its answer read, and its session.

Pure, shared by the two transports, so that what a call means is written once. Knows the protobuf messages and no
channel.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypedDict, TypeVar

from google.protobuf import json_format
from google.protobuf.message import Message

from echelon import convert, convert_cluster
from echelon.errors import InvalidRequestError
from echelon.internal.channel import MAX_MESSAGE_BYTES
from echelon.retry import RetryPolicy
from echelon.session import CallSession, FeedSession, Session, StreamSession
from echelon.session import Message as StreamMessage
from echelon.types import (
    Admitted,
    ChatMessage,
    Cluster,
    ClusterEvent,
    Completion,
    ItemResult,
    JobStatus,
    Model,
    SamplingParams,
    StreamEvent,
    check_text,
)
from echelon.v1 import cluster_pb2, generation_pb2, jobs_pb2

P = TypeVar("P")
M = TypeVar("M")
Y = TypeVar("Y")
R = TypeVar("R")

LIST_PAGE_SIZE = 200
MAX_INPUT_BYTES = MAX_MESSAGE_BYTES - 2**16  # the rest of the message fits beside it
_JOBS = "echelon.v1.BatchJobService"


@dataclass(frozen=True, slots=True)
class Settings:
    """What a client was made with."""

    address: str
    timeout_s: float
    retry: RetryPolicy


@dataclass(frozen=True, slots=True)
class Call(Generic[P, M, Y, R]):
    """A remote call: request builds what to send from what the session resumes after, decode reads an answer."""

    method: str
    request: Callable[[P], Message]
    response: type[Message]
    decode: Callable[[Any], M]
    session: Session[P, M, Y, R]
    streams: bool = False


class GenerateOptions(TypedDict, total=False):
    """What generate() and stream() take beside a prompt: another input, the model, and SamplingParams or its fields.

    request_id: the same id with the same content attaches to the running request. timeout_s: until the whole answer.
    """

    messages: Sequence[ChatMessage | Mapping[str, str]]
    token_ids: Sequence[int]
    template_args: Mapping[str, object]
    model: str
    request_id: str
    timeout_s: float
    sampling: SamplingParams
    temperature: float | None
    top_p: float | None
    top_k: int | None
    max_tokens: int | None
    seed: int | None
    stop_token_ids: Sequence[int]
    logprobs: int | None
    ignore_eos: bool


GenerateCall = Call[tuple[int, ...], StreamMessage, StreamEvent, Completion]
Unary = Call[None, M, M, M]
Feed = Call[int, tuple[int, M], M, None]


def generate(settings: Settings, prompt: str | None, options: GenerateOptions) -> GenerateCall:
    """One generation, whether its tokens are wanted one by one or at the end."""
    fields: dict[str, Any] = dict(options)
    template_args = fields.pop("template_args", None)
    request = _with_input(prompt, fields.pop("messages", None), fields.pop("token_ids", None), template_args)
    request.model = fields.pop("model", "")
    request.request_id = fields.pop("request_id", None) or uuid.uuid4().hex
    timeout_s = fields.pop("timeout_s", settings.timeout_s)
    check_timeout(timeout_s)
    sampling = fields.pop("sampling", SamplingParams())
    if "stop_token_ids" in fields:
        fields["stop_token_ids"] = tuple(fields["stop_token_ids"])
    request.sampling.CopyFrom(convert.sampling_to_proto(replace(sampling, **fields)))

    def resumed(received: tuple[int, ...]) -> generation_pb2.GenerateRequest:
        if not received:
            return request
        resume = generation_pb2.Resume(received=[generation_pb2.TokenIds(ids=received)])
        again = generation_pb2.GenerateRequest(resume=resume)
        again.MergeFrom(request)
        return again

    session = StreamSession(request.request_id, timeout_s, settings.retry)
    method, response = "echelon.v1.GenerationService/StreamGenerate", generation_pb2.StreamGenerateResponse
    return Call(method, resumed, response, convert.stream_from_proto, session, streams=True)


def admitted(call: GenerateCall) -> Admitted | None:
    """What the server said when it took the request; None before."""
    assert isinstance(call.session, StreamSession)
    return call.session.admitted


def cancel(settings: Settings, request_ids: Sequence[str]) -> Unary[tuple[str, ...]]:
    """Ends requests; answers the ids of those that were there to end."""
    request = generation_pb2.CancelGenerationRequest(request_ids=request_ids)
    return _unary(
        settings,
        "echelon.v1.GenerationService/CancelGeneration",
        request,
        generation_pb2.CancelGenerationResponse,
        lambda answer: tuple(answer.cancelled_request_ids),
    )


def list_models(settings: Settings) -> Unary[list[Model]]:
    request, response = cluster_pb2.ListModelsRequest(), cluster_pb2.ListModelsResponse
    return _unary(
        settings,
        "echelon.v1.ModelService/ListModels",
        request,
        response,
        lambda answer: [convert_cluster.model_from_proto(model) for model in answer.models],
    )


def get_cluster(settings: Settings) -> Unary[Cluster]:
    method, request = "echelon.v1.ClusterService/GetCluster", cluster_pb2.GetClusterRequest()
    return _unary(settings, method, request, cluster_pb2.Cluster, convert_cluster.cluster_from_proto)


def watch_events(settings: Settings, after: int, follow: bool) -> Feed[ClusterEvent]:
    return _feed(
        settings,
        "echelon.v1.ClusterService/WatchClusterEvents",
        lambda position: cluster_pb2.WatchClusterEventsRequest(after_sequence=position, follow=follow),
        cluster_pb2.WatchClusterEventsResponse,
        lambda answer: (answer.sequence, convert_cluster.event_from_proto(answer)),
        after=after,
        timeout_s=None if follow else settings.timeout_s,
    )


def create_job(settings: Settings, jsonl: bytes, job_id: str | None, model: str) -> Unary[JobStatus]:
    """Safe to send again: the id is drawn here when none is given."""
    if len(jsonl) > MAX_INPUT_BYTES:
        message = (
            f"the input is {len(jsonl)} bytes, one job takes at most {MAX_INPUT_BYTES}: split it into several jobs"
        )
        raise InvalidRequestError(message, field="source")
    request = jobs_pb2.CreateBatchJobRequest(
        batch_job_id=job_id or uuid.uuid4().hex, model=model, source=jobs_pb2.BatchSource(jsonl=jsonl)
    )
    return _unary(settings, f"{_JOBS}/CreateBatchJob", request, jobs_pb2.BatchJob, convert.job_from_proto)


def get_job(settings: Settings, job_id: str) -> Unary[JobStatus]:
    request = jobs_pb2.GetBatchJobRequest(name=convert.job_name(job_id))
    return _unary(settings, f"{_JOBS}/GetBatchJob", request, jobs_pb2.BatchJob, convert.job_from_proto)


def cancel_job(settings: Settings, job_id: str) -> Unary[JobStatus]:
    request = jobs_pb2.CancelBatchJobRequest(name=convert.job_name(job_id))
    return _unary(settings, f"{_JOBS}/CancelBatchJob", request, jobs_pb2.BatchJob, convert.job_from_proto)


def list_jobs(settings: Settings, page_token: str) -> Unary[tuple[list[JobStatus], str]]:
    """One page, and the token of the next one or nothing."""
    return _unary(
        settings,
        f"{_JOBS}/ListBatchJobs",
        jobs_pb2.ListBatchJobsRequest(page_size=LIST_PAGE_SIZE, page_token=page_token),
        jobs_pb2.ListBatchJobsResponse,
        lambda answer: ([convert.job_from_proto(job) for job in answer.batch_jobs], answer.next_page_token),
    )


def watch_job(settings: Settings, job_id: str, timeout_s: float | None) -> Feed[JobStatus]:
    """The job now and at each change, without positions: after a break it is told again."""
    return _feed(
        settings,
        f"{_JOBS}/WatchBatchJob",
        lambda _: jobs_pb2.WatchBatchJobRequest(name=convert.job_name(job_id)),
        jobs_pb2.WatchBatchJobResponse,
        lambda answer: (0, convert.job_from_proto(answer.batch_job)),
        timeout_s=timeout_s,
    )


def job_results(settings: Settings, job_id: str, after: int, follow: bool) -> Feed[ItemResult]:
    name = convert.job_name(job_id)
    return _feed(
        settings,
        f"{_JOBS}/StreamBatchJobResults",
        lambda cursor: jobs_pb2.StreamBatchJobResultsRequest(name=name, after_cursor=cursor, follow=follow),
        jobs_pb2.StreamBatchJobResultsResponse,
        lambda answer: (answer.result.cursor, convert.item_from_proto(answer.result)),
        after=after,
        timeout_s=None if follow else settings.timeout_s,
    )


def _unary(
    settings: Settings, method: str, request: Message, response: type[Message], decode: Callable[[Any], M]
) -> Unary[M]:
    session: CallSession[M] = CallSession(uuid.uuid4().hex, settings.timeout_s, settings.retry)
    return Call(method, lambda _: request, response, decode, session)


def _feed(
    settings: Settings,
    method: str,
    request: Callable[[int], Message],
    response: type[Message],
    decode: Callable[[Any], tuple[int, M]],
    *,
    after: int = 0,
    timeout_s: float | None,
) -> Feed[M]:
    if not 0 <= after < 2**63:
        raise InvalidRequestError(f"after must be 0 or more, got {after}", field="after")
    session: FeedSession[M] = FeedSession(uuid.uuid4().hex, after, timeout_s, settings.timeout_s, settings.retry)
    return Call(method, request, response, decode, session, streams=True)


def _with_input(
    text: str | None,
    messages: Sequence[ChatMessage | Mapping[str, str]] | None,
    token_ids: Sequence[int] | None,
    template_args: Mapping[str, object] | None,
) -> generation_pb2.GenerateRequest:
    """A request with exactly one input."""
    given = [
        name
        for name, value in (("prompt", text), ("messages", messages), ("token_ids", token_ids))
        if value is not None
    ]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise InvalidRequestError(f"give one of prompt, messages and token_ids, got {found}", field="input")
    if template_args is not None and messages is None:
        raise InvalidRequestError("template_args are for messages alone", field="template_args")
    request = generation_pb2.GenerateRequest()
    if text is not None:
        request.text = check_text("prompt", text, "prompt")
    elif token_ids is not None:
        for index, token_id in enumerate(token_ids):
            if not isinstance(token_id, int) or not 0 <= token_id < 2**31:
                message = f"token_ids[{index}] must be an integer >= 0, got {token_id!r}"
                raise InvalidRequestError(message, field="token_ids")
        request.token_ids.ids.extend(token_ids)
        request.token_ids.SetInParent()
    elif messages is not None:
        request.chat.messages.extend(_chat_message(index, message) for index, message in enumerate(messages))
        request.chat.SetInParent()
        json_format.ParseDict(dict(template_args or {}), request.chat.template_args)
    return request


def _chat_message(index: int, message: ChatMessage | Mapping[str, str]) -> generation_pb2.ChatMessage:
    if isinstance(message, ChatMessage):
        return convert.message_to_proto(message)
    if set(message) != {"role", "content"} or not all(isinstance(value, str) for value in message.values()):
        found = ", ".join(f"{key}: {type(value).__name__}" for key, value in message.items())
        rule = f"messages[{index}] must have a role and a content, both strings, got {found or 'nothing'}"
        raise InvalidRequestError(rule, field="messages")
    return convert.message_to_proto(ChatMessage(message["role"], message["content"]))


def check_timeout(timeout_s: float) -> None:
    """A deadline must be a time ahead, and finite: everything ends."""
    if not 0 < timeout_s < math.inf:
        raise InvalidRequestError(f"timeout_s must be a finite number > 0, got {timeout_s!r}", field="timeout_s")
