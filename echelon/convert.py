"""The public nouns of `types.py` as protobuf messages, both directions; one pair of functions a noun.

Used by the SDK and by the coordinator's server, and the only place where the two meet. Pure; validates no more than
the nouns themselves do (their InvalidRequestError passes through). Generation and jobs are here, the cluster's nouns
in `convert_cluster.py`.
"""

from __future__ import annotations

from google.protobuf import duration_pb2, timestamp_pb2

from echelon import status
from echelon.errors import EchelonError, InternalError
from echelon.types import (
    Admitted,
    ChatMessage,
    Completion,
    FinishReason,
    ItemCounts,
    ItemResult,
    JobState,
    JobStatus,
    SamplingParams,
    StreamEvent,
    Timing,
    TokenLogprob,
    Usage,
)
from echelon.v1 import generation_pb2, jobs_pb2

_JOB_PREFIX = "batchJobs/"
_FINISHES = {
    FinishReason.STOP: generation_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
}
_FINISH_REASONS: dict[int, FinishReason] = {value: reason for reason, value in _FINISHES.items()}
_JOB_STATES: dict[int, JobState] = {jobs_pb2.BatchJob.State.Value(f"STATE_{s.name}"): s for s in JobState}
_OPTIONAL_SAMPLING = ("temperature", "top_p", "top_k", "max_tokens", "seed", "logprobs")


def sampling_to_proto(sampling: SamplingParams) -> generation_pb2.SamplingParams:
    return generation_pb2.SamplingParams(
        **{name: getattr(sampling, name) for name in _OPTIONAL_SAMPLING},
        stop_token_ids=sampling.stop_token_ids,
        ignore_eos=sampling.ignore_eos,
    )


def sampling_from_proto(message: generation_pb2.SamplingParams) -> SamplingParams:
    return SamplingParams(
        **{name: getattr(message, name) for name in _OPTIONAL_SAMPLING if message.HasField(name)},
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
    )


def message_to_proto(message: ChatMessage) -> generation_pb2.ChatMessage:
    return generation_pb2.ChatMessage(role=message.role, content=message.content)


def message_from_proto(message: generation_pb2.ChatMessage) -> ChatMessage:
    return ChatMessage(message.role, message.content)


def logprob_to_proto(logprob: TokenLogprob) -> generation_pb2.TokenLogprob:
    top = [generation_pb2.TopLogprob(token_id=token_id, logprob=value) for token_id, value in logprob.top]
    return generation_pb2.TokenLogprob(token_id=logprob.token_id, logprob=logprob.logprob, top=top)


def logprob_from_proto(message: generation_pb2.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(message.token_id, message.logprob, tuple((top.token_id, top.logprob) for top in message.top))


def usage_to_proto(usage: Usage) -> generation_pb2.Usage:
    return generation_pb2.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        recomputed_tokens=usage.recomputed_tokens,
    )


def usage_from_proto(message: generation_pb2.Usage) -> Usage:
    return Usage(message.prompt_tokens, message.completion_tokens, message.recomputed_tokens)


def completion_to_proto(completion: Completion) -> generation_pb2.GenerateResponse:
    choice = generation_pb2.Choice(
        text=completion.text,
        token_ids=completion.token_ids,
        logprobs=[logprob_to_proto(logprob) for logprob in completion.logprobs],
        finish_reason=_FINISHES[completion.finish_reason],
    )
    timing = completion.timing
    return generation_pb2.GenerateResponse(
        request_id=completion.request_id,
        model=completion.model,
        choices=[choice],
        usage=usage_to_proto(completion.usage),
        timing=generation_pb2.Timing(
            queue=_duration(timing.queue_s), ttft=_duration(timing.ttft_s), total=_duration(timing.total_s)
        ),
    )


def completion_from_proto(message: generation_pb2.GenerateResponse) -> Completion:
    if len(message.choices) != 1 or message.choices[0].finish_reason not in _FINISH_REASONS:
        raise InternalError(f"the server's answer is not one finished choice: {len(message.choices)} choices")
    choice, timing = message.choices[0], message.timing
    return Completion(
        request_id=message.request_id,
        model=message.model,
        text=choice.text,
        token_ids=tuple(choice.token_ids),
        finish_reason=_FINISH_REASONS[choice.finish_reason],
        logprobs=tuple(logprob_from_proto(logprob) for logprob in choice.logprobs),
        usage=usage_from_proto(message.usage),
        timing=Timing(_seconds(timing.queue), _seconds(timing.ttft), _seconds(timing.total)),
    )


def stream_to_proto(event: Admitted | StreamEvent | Completion) -> generation_pb2.StreamGenerateResponse:
    response = generation_pb2.StreamGenerateResponse
    match event:
        case StreamEvent(request_id, index, sequence, text, token_ids, logprobs):
            told = [logprob_to_proto(logprob) for logprob in logprobs]
            delta = generation_pb2.TokenDelta(
                index=index, sequence=sequence, text=text, token_ids=token_ids, logprobs=told
            )
            return response(request_id=request_id, delta=delta)
        case Admitted(request_id, prompt_tokens, seed):
            admitted = generation_pb2.Admitted(prompt_tokens=prompt_tokens, seed=seed)
            return response(request_id=request_id, admitted=admitted)
        case Completion():
            return response(request_id=event.request_id, final=completion_to_proto(event))


def stream_from_proto(message: generation_pb2.StreamGenerateResponse) -> Admitted | StreamEvent | Completion:
    match message.WhichOneof("event"):
        case "admitted":
            return Admitted(message.request_id, message.admitted.prompt_tokens, message.admitted.seed)
        case "delta":
            delta = message.delta
            logprobs = tuple(logprob_from_proto(logprob) for logprob in delta.logprobs)
            token_ids = tuple(delta.token_ids)
            return StreamEvent(message.request_id, delta.index, delta.sequence, delta.text, token_ids, logprobs)
        case "final":
            return completion_from_proto(message.final)
    raise InternalError("the server sent a stream message of a kind that this client does not know")


def job_name(job_id: str) -> str:
    """The resource name of a job."""
    return _JOB_PREFIX + job_id


def job_id_of(name: str) -> str:
    """The id in a job's resource name; a bare id is taken as it is."""
    return name.removeprefix(_JOB_PREFIX)


def job_to_proto(job: JobStatus) -> jobs_pb2.BatchJob:
    counts = job.counts
    return jobs_pb2.BatchJob(
        name=job_name(job.job_id),
        state=f"STATE_{job.state.name}",
        model=job.model,
        counts=jobs_pb2.ItemCounts(
            total=counts.total,
            succeeded=counts.succeeded,
            failed=counts.failed,
            running=counts.running,
            interrupted=counts.interrupted,
        ),
        usage=usage_to_proto(job.usage),
        create_time=timestamp_to_proto(job.create_unix_s),
        start_time=None if job.start_unix_s is None else timestamp_to_proto(job.start_unix_s),
        end_time=None if job.end_unix_s is None else timestamp_to_proto(job.end_unix_s),
    )


def job_from_proto(message: jobs_pb2.BatchJob) -> JobStatus:
    if message.state not in _JOB_STATES:
        raise InternalError(f"job {message.name} is in a state that this client does not know: {message.state}")
    counts = message.counts
    return JobStatus(
        job_id=job_id_of(message.name),
        state=_JOB_STATES[message.state],
        model=message.model,
        counts=ItemCounts(counts.total, counts.succeeded, counts.failed, counts.running, counts.interrupted),
        usage=usage_from_proto(message.usage),
        create_unix_s=timestamp_from_proto(message.create_time),
        start_unix_s=timestamp_from_proto(message.start_time) if message.HasField("start_time") else None,
        end_unix_s=timestamp_from_proto(message.end_time) if message.HasField("end_time") else None,
    )


def item_to_proto(item: ItemResult) -> jobs_pb2.BatchItemResult:
    message = jobs_pb2.BatchItemResult(custom_id=item.custom_id, cursor=item.cursor, index=item.index)
    if item.completion is not None:
        message.response.CopyFrom(completion_to_proto(item.completion))
    else:
        assert isinstance(item.error, EchelonError), f"item {item.index} has neither a completion nor an error"
        message.error.CopyFrom(status.pack(item.error))
    return message


def item_from_proto(message: jobs_pb2.BatchItemResult) -> ItemResult:
    succeeded = message.WhichOneof("result") == "response"
    return ItemResult(
        custom_id=message.custom_id,
        index=message.index,
        cursor=message.cursor,
        completion=completion_from_proto(message.response) if succeeded else None,
        error=None if succeeded else status.unpack(message.error),
    )


def timestamp_to_proto(unix_s: float) -> timestamp_pb2.Timestamp:
    timestamp = timestamp_pb2.Timestamp()
    timestamp.FromMicroseconds(round(unix_s * 1e6))  # a double holds no nanoseconds since 1970
    return timestamp


def timestamp_from_proto(message: timestamp_pb2.Timestamp) -> float:
    return message.ToMicroseconds() / 1e6


def _duration(seconds: float) -> duration_pb2.Duration:
    duration = duration_pb2.Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration


def _seconds(message: duration_pb2.Duration) -> float:
    return message.ToNanoseconds() / 1e9
