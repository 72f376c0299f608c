"""Errors as google.rpc.Status, and back: what the server sends as trailing metadata and the SDK raises again.

Used in the coordinator (pack, abort_status) and in the SDK (unpack, from_rpc) over the one table of
`echelon/errors.py`. Every packed error carries ErrorInfo with its reason, field and request; BadRequest names the
field once more for generic clients, RetryInfo says when to come back. Knows no request and no policy.
"""

from __future__ import annotations

from typing import cast

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from echelon.errors import (
    ERROR_DOMAIN,
    DeadlineError,
    EchelonError,
    InternalError,
    InvalidRequestError,
    UnavailableError,
    error_of,
)

# What gRPC itself says, under other codes than UNAVAILABLE, when a peer dies in the middle of a stream.
_BROKEN_TRANSPORT = ("Stream removed", "RST_STREAM", "Socket closed", "GOAWAY", "Connection reset")

# A message travels three times in the trailing metadata, a field twice; gRPC loses what is over 8 KiB.
MAX_MESSAGE_BYTES = 1000
MAX_FIELD_BYTES = 200


def pack(error: EchelonError) -> status_pb2.Status:
    """The status of an error, with its details; a long message is cut."""
    message, field = _cut(error.message, MAX_MESSAGE_BYTES), _cut(error.field or "", MAX_FIELD_BYTES)
    metadata = {name: value for name, value in (("field", field), ("request_id", error.request_id)) if value}
    details = [_any(error_details_pb2.ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN, metadata=metadata))]
    if field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=message)
        details.append(_any(error_details_pb2.BadRequest(field_violations=[violation])))
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(round(error.retry_after_s * 1e9))
        details.append(_any(error_details_pb2.RetryInfo(retry_delay=delay)))
    return status_pb2.Status(code=error.code, message=message, details=details)


def unpack(status: status_pb2.Status) -> EchelonError:
    """The error a status was packed from; a status of another origin gives the error of its code."""
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    retry_after_s: float | None = None
    for detail in status.details:
        if detail.Is(info.DESCRIPTOR):
            detail.Unpack(info)
        elif detail.Is(retry.DESCRIPTOR):
            detail.Unpack(retry)
            retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
    return error_of(
        status.code,
        status.message,
        reason=info.reason or None,
        field=info.metadata.get("field"),
        request_id=info.metadata.get("request_id"),
        retry_after_s=retry_after_s,
    )


def abort_status(error: EchelonError) -> grpc.Status:
    """The code, details and trailing_metadata that a server aborts a call with."""
    return rpc_status.to_status(pack(error))


def from_rpc(error: grpc.RpcError, address: str) -> EchelonError:
    """The error of a failed call: the server's own where it sent one, else what the transport's failure means."""
    call = cast(grpc.Call, error)  # every error a call raises is one, grpc.aio's by shape
    try:
        status = rpc_status.from_call(call)
    except ValueError:  # the call ended here, by its deadline, while the server's own end was on its way
        status = None
    if status is not None and status.details:
        return unpack(status)
    details = call.details() or ""
    match call.code():
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineError(f"the deadline passed before {address} answered")
        # CANCELLED without a detail of ours is a server that stopped: our own cancel ends the call unread.
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.CANCELLED:
            return _unreachable(address, details)
        case _ if any(mark in details for mark in _BROKEN_TRANSPORT):
            return _unreachable(address, details)
        case grpc.StatusCode.RESOURCE_EXHAUSTED if "larger than max" in details:
            return InvalidRequestError(f"the message is too large: {details}")
        case grpc.StatusCode.UNIMPLEMENTED:
            return InternalError(f"{address} does not serve this call: {details}")
        case code:
            return error_of(code.value[0], details or code.name)


def _cut(text: str, most_bytes: int) -> str:
    return text.encode(errors="replace")[:most_bytes].decode(errors="ignore")


def _unreachable(address: str, details: str) -> UnavailableError:
    why = details.rsplit(": ", 1)[-1].rstrip("]") or "connection lost"
    remedy = f"; is `echelon serve --address {address}` running?" if "refused" in why else ""
    return UnavailableError(f"cannot reach {address}: {why}{remedy}")


def _any(message: error_details_pb2.ErrorInfo) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed
