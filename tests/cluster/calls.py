"""Every public RPC as bytes in and an end out, and what must hold of any end whatever was sent.

The methods come from the services' descriptors, so a new one is called from the day it is in the proto. `Ends` are
judged by the table of docs/errors.md: no status but those in it, with its reason; UNKNOWN and INTERNAL never.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import grpc
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from echelon.errors import ERROR_DOMAIN
from echelon.v1 import cluster_pb2, generation_pb2, jobs_pb2
from tests.architecture.source import ROOT
from tests.tiny import TOKENIZER_VOCABULARY as VOCABULARY

ROW = re.compile(r"^\| `([A-Z_]+)` \| ([A-Z_]+|never sent) \|", re.MULTILINE)
CODES: Mapping[str, str] = dict(ROW.findall((ROOT / "docs/errors.md").read_text(encoding="utf-8")))


@dataclass(frozen=True, slots=True)
class Method:
    """One RPC. path: as gRPC addresses it."""

    path: str
    request: type[Message]
    response: type[Message]
    streams: bool


METHODS: Mapping[str, Method] = {
    method.name: Method(
        f"/{service.full_name}/{method.name}",
        GetMessageClass(method.input_type),
        GetMessageClass(method.output_type),
        bool(method.server_streaming),
    )
    for file in (generation_pb2, jobs_pb2, cluster_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}


@dataclass(frozen=True, slots=True)
class End:
    """What a call brought: its messages, and its error if it did not end well. left: by us, before its end."""

    method: Method
    messages: tuple[Any, ...]
    error: grpc.RpcError | None
    left: bool = False


def call(
    channel: grpc.Channel, method: Method, payload: bytes, timeout_s: float, leave_after: int | None = None
) -> End:
    """Call it and read it to its end, or leave after so many messages; a unary call is then left at once."""
    messages: list[Any] = []
    error: grpc.RpcError | None = None
    opened: Any = open_call(channel, method, payload, timeout_s)
    if leave_after == 0:
        opened.cancel()
        return End(method, (), None, left=True)
    try:
        for message in opened if method.streams else (opened.result(),):
            messages.append(message)
            if len(messages) == leave_after and method.streams:
                opened.cancel()
                return End(method, tuple(messages), None, left=True)
    except grpc.RpcError as raised:
        error = raised
    return End(method, tuple(messages), error)


def open_call(channel: grpc.Channel, method: Method, payload: bytes, timeout_s: float) -> Any:
    """The call under way: an iterator of messages, or a future of one."""
    kind: Any = channel.unary_stream if method.streams else channel.unary_unary
    callable_ = kind(method.path, response_deserializer=method.response.FromString)
    return (callable_ if method.streams else callable_.future)(payload, timeout=timeout_s)


def assert_proper(end: End) -> None:
    """Of a call that was not left: a proper answer, or one error of the table with its reason, field and text."""
    if end.error is None:
        if not end.left and not end.method.streams:
            assert len(end.messages) == 1
        return
    code, details = end.error.code(), end.error.details() or ""
    shown = f"{end.method.path}: {code.name} {details[:300]}"
    assert code not in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN), shown
    if (info := error_info(end.error)) is None:  # gRPC's own, at this side's deadline
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED, shown
        return
    assert info.domain == ERROR_DOMAIN and CODES[info.reason] == code.name, f"{shown} ({info.reason})"
    assert len(details) > 10, shown
    if info.reason == "INVALID_FIELD":  # or the whole of it is wrong
        assert info.metadata["field"] or details.startswith("the request "), shown


def error_info(error: grpc.RpcError) -> error_details_pb2.ErrorInfo | None:
    """What the server said, unless the call ended here, by its deadline, while that was on its way."""
    try:
        status = rpc_status.from_call(cast(grpc.Call, error))  # every error that a call raises is one
    except ValueError:
        return None
    info = error_details_pb2.ErrorInfo()
    return info if status is not None and status.details[0].Unpack(info) else None


class Answers:
    """What streams have shown of each request, by choice: later streams may only say the same, or say more."""

    def __init__(self) -> None:
        self._known: dict[str, dict[int, list[int]]] = {}
        self._made_up: set[str] = set()

    def distrust(self, request_id: str) -> None:
        """A client has told ids of its own making, and what follows may be a continuation of them."""
        self._made_up.add(request_id)

    def trusts(self, request_id: str) -> bool:
        return request_id not in self._made_up

    def of(self, request_id: str) -> tuple[tuple[int, ...], ...]:
        """By choice, as far as any stream has shown."""
        known = self._known.get(request_id, {})
        return tuple(tuple(known.get(choice, ())) for choice in range(max(known, default=-1) + 1))

    def take(self, end: End, received: tuple[tuple[int, ...], ...] = ()) -> None:
        """A stream of StreamGenerate: Admitted, deltas without gaps, one final that says the same, or an error."""
        held = dict(enumerate(map(list, received)))
        kinds = [message.WhichOneof("event") for message in end.messages]
        finished = not end.left and end.error is None
        assert kinds[:1] in ([], ["admitted"]) and kinds[1:].count("admitted") == 0
        assert kinds.count("final") == (1 if kinds[-1:] == ["final"] else 0)
        assert (kinds[-1:] == ["final"]) >= finished, f"{kinds} is no whole stream"
        if kinds[-1:] == ["final"] and end.error:  # on its way when this side's time was up
            assert error_info(end.error) is None, f"a final and {end.error}"
        request_id = ""
        for message in end.messages:
            assert message.request_id and request_id in ("", message.request_id)
            request_id = message.request_id
            if message.WhichOneof("event") == "delta":
                delta = message.delta
                choice = held.setdefault(delta.index, [])
                assert delta.sequence == len(choice) and delta.token_ids
                choice.extend(delta.token_ids)
                assert all(0 <= token_id < VOCABULARY for token_id in delta.token_ids)
                assert all(math.isfinite(logprob.logprob) for logprob in delta.logprobs)
        if kinds[-1:] == ["final"]:
            for choice in end.messages[-1].final.choices:
                assert list(choice.token_ids) == held.get(choice.index, [])
                assert choice.finish_reason and len(choice.logprobs) in (0, len(choice.token_ids))
        self._agree(request_id, held)

    def _agree(self, request_id: str, held: Mapping[int, list[int]]) -> None:
        if request_id in self._made_up:
            return
        known = self._known.setdefault(request_id, {})
        for index, ids in held.items():
            before = known.get(index, [])
            shared = min(len(before), len(ids))
            assert before[:shared] == ids[:shared], (
                f"choice {index} of {request_id} was shown as {before}, now as {ids}"
            )
            known[index] = max(before, ids, key=len)


def eventually(condition: Callable[[], object], timeout_s: float, pause_s: float = 0.005) -> Iterator[object]:
    """What the condition says, until it says nothing more or time is up."""
    end_by_s = time.monotonic() + timeout_s
    while (said := condition()) and time.monotonic() < end_by_s:
        yield said
        time.sleep(pause_s)
    yield said
