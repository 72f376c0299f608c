"""Errors over the wire: every class and field comes back, and what gRPC says by itself is understood."""

from __future__ import annotations

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from echelon import status
from echelon.errors import (
    ERROR_DOMAIN,
    WIRE_ERRORS,
    CancelledError,
    DeadlineError,
    EchelonError,
    InternalError,
    InvalidRequestError,
    OverloadedError,
    UnavailableError,
)


def rpc_error(code: grpc.StatusCode, details: str, trailing: tuple[tuple[str, str | bytes], ...] = ()) -> grpc.RpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), details=details)


def sent(error: EchelonError) -> grpc.RpcError:
    """The error as a client meets it."""
    ended = status.abort_status(error)
    return rpc_error(ended.code, ended.details, tuple(ended.trailing_metadata))


@pytest.mark.parametrize("kind", WIRE_ERRORS)
def test_every_error_comes_back_as_itself(kind: type[EchelonError]) -> None:
    known = {"field": "sampling.top_p", "request_id": "r-1"}
    error = kind("what and why: größer", reason=kind.default_reason, retry_after_s=1.5, **known)
    for back in (status.unpack(status.pack(error)), status.from_rpc(sent(error), "host:1")):
        assert type(back) is kind
        assert vars(back) == vars(error)


@pytest.mark.parametrize("kind", WIRE_ERRORS)
def test_reasons_default_by_class(kind: type[EchelonError]) -> None:
    back = status.unpack(status.pack(kind("why")))
    assert (back.reason, back.field, back.request_id, back.retry_after_s) == (kind.default_reason, None, None, None)


def test_generic_clients_find_the_field_and_the_domain() -> None:
    packed = status.pack(InvalidRequestError("bad", field="model"))
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    packed.details[0].Unpack(info)
    packed.details[1].Unpack(bad)
    assert (info.domain, info.reason) == (ERROR_DOMAIN, "INVALID_FIELD")
    assert [violation.field for violation in bad.field_violations] == ["model"]


def test_a_long_message_stays_within_the_metadata() -> None:
    packed = status.pack(InvalidRequestError("x" * 100_000, field="prompt"))
    assert len(packed.SerializeToString()) < 4096


def test_a_foreign_status_gives_the_error_of_its_code() -> None:
    assert type(status.unpack(status_pb2.Status(code=8, message="full"))) is OverloadedError
    assert type(status.unpack(status_pb2.Status(code=9, message="odd"))) is InternalError


@pytest.mark.parametrize(
    ("code", "details", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, "failed to connect: Connection refused (111)", UnavailableError),
        (grpc.StatusCode.CANCELLED, "", UnavailableError),
        (grpc.StatusCode.UNKNOWN, "Stream removed", UnavailableError),
        (grpc.StatusCode.INTERNAL, "Received RST_STREAM with error code 2", UnavailableError),
        (grpc.StatusCode.INTERNAL, "a defect", InternalError),
        (grpc.StatusCode.UNKNOWN, "Exception calling application: boom", InternalError),
        (grpc.StatusCode.UNIMPLEMENTED, "Method not found!", InternalError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded", DeadlineError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "Sent message larger than max (5 vs. 4)", InvalidRequestError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "busy", OverloadedError),
    ],
)
def test_what_the_transport_says_is_understood(code: grpc.StatusCode, details: str, kind: type[EchelonError]) -> None:
    assert type(status.from_rpc(rpc_error(code, details), "host:1")) is kind


def test_a_coordinator_that_is_away_is_named_in_one_line() -> None:
    details = "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: Connection refused (111)"
    error = status.from_rpc(rpc_error(grpc.StatusCode.UNAVAILABLE, details), "host:1")
    assert (
        error.message == "cannot reach host:1: Connection refused (111); is `echelon serve --address host:1` running?"
    )


def test_a_cancel_of_the_server_is_not_a_broken_transport() -> None:
    error = status.from_rpc(sent(CancelledError("cancelled", request_id="r")), "host:1")
    assert type(error) is CancelledError


def test_an_end_here_wins_over_a_status_that_says_otherwise() -> None:
    late = status.abort_status(UnavailableError("draining"))
    error = rpc_error(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded", tuple(late.trailing_metadata))
    assert type(status.from_rpc(error, "host:1")) is DeadlineError
