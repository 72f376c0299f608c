"""The nouns of batch jobs as protobuf messages, both directions; one pair of functions a noun.

Used by the SDK and by the coordinator's server, like `convert.py`, which has generation. Pure; validates no more than
the nouns themselves do.
"""

from __future__ import annotations

from echelon import status
from echelon.convert import (
    completion_from_proto,
    completion_to_proto,
    timestamp_from_proto,
    timestamp_to_proto,
    usage_from_proto,
    usage_to_proto,
)
from echelon.errors import EchelonError, InternalError
from echelon.types import ItemCounts, ItemResult, JobState, JobStatus
from echelon.v1 import jobs_pb2

_JOB_PREFIX = "batchJobs/"
_JOB_STATES: dict[int, JobState] = {jobs_pb2.BatchJob.State.Value(f"STATE_{s.name}"): s for s in JobState}


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
