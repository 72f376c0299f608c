"""The RPCs of the SDK as values: method, how the request is built and the answer read, and the session.

Pure, shared by the two transports, so that what a call means is written once. Knows the protobuf messages and no
channel.
"""

from __future__ import annotations

import logging
import math
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message

from echelon import convert_cluster, convert_jobs
from echelon.errors import InvalidRequestError
from echelon.internal.channel import MAX_MESSAGE_BYTES
from echelon.profiles import Settings
from echelon.sampling import check_text, shown
from echelon.session import Broken, CallSession, FeedSession, Session
from echelon.types import (
    Cluster,
    ClusterEvent,
    ExpertLoad,
    ItemResult,
    JobStatus,
    Model,
)
from echelon.v1 import cluster_pb2, generation_pb2, jobs_pb2

P = TypeVar("P")
M = TypeVar("M")
Y = TypeVar("Y")
R = TypeVar("R")

LIST_PAGE_SIZE = 200
MAX_INPUT_BYTES = MAX_MESSAGE_BYTES - 2**16  # the rest of the message fits beside it
_JOBS = "echelon.v1.BatchJobService"
_log = logging.getLogger("echelon")


@dataclass(frozen=True, slots=True)
class Call(Generic[P, M, Y, R]):
    """A remote call: request builds what to send from what the session resumes after, decode reads an answer."""

    method: str
    request: Callable[[P], Message]
    response: type[Message]
    decode: Callable[[Any], M]
    session: Session[P, M, Y, R]
    streams: bool = False
    request_id: str | None = None  # its errors carry it


def log_retry(event: object, seconds: float) -> None:
    """Say why a call waits and is tried again: at level INFO of the logger `echelon`, silent unless asked for."""
    if isinstance(event, Broken):
        _log.info("%s; trying again in %.1f s", event.error.message, seconds, extra={"why": event.error.message})


Unary = Call[None, M, M, M]
Feed = Call[int, tuple[int, M], M, None]


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


def tokenize(settings: Settings, text: str, model: str) -> Unary[tuple[int, ...]]:
    """The ids that a generation would be given for this text."""
    request = generation_pb2.TokenizeRequest(text=check_text("text", text, "text"), model=model)
    size = request.ByteSize()
    if size > MAX_INPUT_BYTES:
        message = f"the text is {size} bytes, one call takes at most {MAX_INPUT_BYTES}: send it in parts"
        raise InvalidRequestError(message, field="text")
    method, response = "echelon.v1.GenerationService/Tokenize", generation_pb2.TokenizeResponse
    return _unary(settings, method, request, response, lambda answer: tuple(answer.token_ids))


def detokenize(settings: Settings, token_ids: Sequence[int], model: str) -> Unary[str]:
    """The text of these ids, special tokens left out."""
    request = generation_pb2.DetokenizeRequest(token_ids=check_ids(token_ids), model=model)
    method, response = "echelon.v1.GenerationService/Detokenize", generation_pb2.DetokenizeResponse
    return _unary(settings, method, request, response, lambda answer: str(answer.text))


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


def get_expert_load(settings: Settings) -> Unary[list[ExpertLoad]]:
    return _unary(
        settings,
        "echelon.v1.ClusterService/GetExpertLoad",
        cluster_pb2.GetExpertLoadRequest(),
        cluster_pb2.GetExpertLoadResponse,
        lambda answer: [convert_cluster.expert_load_from_proto(layer) for layer in answer.layers],
    )


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
    return _unary(settings, f"{_JOBS}/CreateBatchJob", request, jobs_pb2.BatchJob, convert_jobs.job_from_proto)


def get_job(settings: Settings, job_id: str) -> Unary[JobStatus]:
    request = jobs_pb2.GetBatchJobRequest(name=convert_jobs.job_name(job_id))
    return _unary(settings, f"{_JOBS}/GetBatchJob", request, jobs_pb2.BatchJob, convert_jobs.job_from_proto)


def cancel_job(settings: Settings, job_id: str) -> Unary[JobStatus]:
    request = jobs_pb2.CancelBatchJobRequest(name=convert_jobs.job_name(job_id))
    return _unary(settings, f"{_JOBS}/CancelBatchJob", request, jobs_pb2.BatchJob, convert_jobs.job_from_proto)


def list_jobs(settings: Settings, page_token: str, page_size: int) -> Unary[tuple[list[JobStatus], str]]:
    """One page, and the token of the next one or nothing. The server may cut a large page_size."""
    if not isinstance(page_size, int) or isinstance(page_size, bool) or not 0 < page_size < 2**31:
        raise InvalidRequestError(f"page_size must be an integer >= 1, got {page_size!r}", field="page_size")
    return _unary(
        settings,
        f"{_JOBS}/ListBatchJobs",
        jobs_pb2.ListBatchJobsRequest(page_size=page_size, page_token=page_token),
        jobs_pb2.ListBatchJobsResponse,
        lambda answer: ([convert_jobs.job_from_proto(job) for job in answer.batch_jobs], answer.next_page_token),
    )


def watch_job(settings: Settings, job_id: str, timeout_s: float | None) -> Feed[JobStatus]:
    """The job now and at each change, without positions: after a break it is told again."""
    return _feed(
        settings,
        f"{_JOBS}/WatchBatchJob",
        lambda _: jobs_pb2.WatchBatchJobRequest(name=convert_jobs.job_name(job_id)),
        jobs_pb2.WatchBatchJobResponse,
        lambda answer: (0, convert_jobs.job_from_proto(answer.batch_job)),
        timeout_s=timeout_s,
    )


def job_results(settings: Settings, job_id: str, after: int, follow: bool) -> Feed[ItemResult]:
    name = convert_jobs.job_name(job_id)
    return _feed(
        settings,
        f"{_JOBS}/StreamBatchJobResults",
        lambda cursor: jobs_pb2.StreamBatchJobResultsRequest(name=name, after_cursor=cursor, follow=follow),
        jobs_pb2.StreamBatchJobResultsResponse,
        lambda answer: (answer.result.cursor, convert_jobs.item_from_proto(answer.result)),
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


def check_timeout(timeout_s: float) -> None:
    """A deadline must be a time ahead, and finite: everything ends."""
    if not 0 < timeout_s < math.inf:
        raise InvalidRequestError(f"timeout_s must be a finite number > 0, got {timeout_s!r}", field="timeout_s")


def check_ids(token_ids: Sequence[int]) -> Sequence[int]:
    """The ids, unless one of them is none."""
    for index, token_id in enumerate(token_ids):
        if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id < 2**31:
            message = f"token_ids[{index}] must be an integer >= 0, got {shown(token_id)}"
            raise InvalidRequestError(message, field="token_ids")
    return token_ids
