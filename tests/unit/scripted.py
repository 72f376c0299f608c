"""A real gRPC server in this process that answers by a script: the coordinator the client tests talk to.

Each method has a list of handlers, one a call; every request is kept. A handler breaks the transport for good with
`server.stop`, or ends its call with `fail`.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent import futures
from types import TracebackType
from typing import Any, NoReturn, Self

import grpc
from google.protobuf.message import Message

from echelon import convert
from echelon.errors import EchelonError
from echelon.internal.channel import SERVER_OPTIONS
from echelon.status import abort_status
from echelon.types import Admitted, Choice, Completion, FinishReason, StreamEvent, Usage
from echelon.v1 import cluster_pb2, generation_pb2, jobs_pb2

Handler = Callable[[Any, grpc.ServicerContext], Any]
STREAMS = {"StreamGenerate", "WatchBatchJob", "StreamBatchJobResults", "WatchClusterEvents"}
SERVICES = (
    generation_pb2.DESCRIPTOR.services_by_name["GenerationService"],
    jobs_pb2.DESCRIPTOR.services_by_name["BatchJobService"],
    cluster_pb2.DESCRIPTOR.services_by_name["ModelService"],
    cluster_pb2.DESCRIPTOR.services_by_name["ClusterService"],
)
MODULES = (generation_pb2, jobs_pb2, cluster_pb2)


class ScriptedServer:
    """Serves on a free port, or again on the port of one that was stopped."""

    def __init__(self, port: int = 0) -> None:
        self.handlers: defaultdict[str, deque[Handler]] = defaultdict(deque)
        self.requests: defaultdict[str, list[Any]] = defaultdict(list)
        self.remaining_s: list[float] = []
        self._server = grpc.server(futures.ThreadPoolExecutor(8), options=SERVER_OPTIONS)
        self._server.add_generic_rpc_handlers([_Router(self)])
        self.port = self._server.add_insecure_port(f"localhost:{port}")
        self.address = f"localhost:{self.port}"
        self._server.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """Break every call that runs, and listen no more."""
        self._server.stop(grace=None).wait()

    def on(self, method: str, *handlers: Handler) -> None:
        """What the method's next calls do."""
        self.handlers[method].extend(handlers)

    def take(self, method: str, request: Message, context: grpc.ServicerContext) -> Any:
        """The answer of the method's next handler."""
        self.requests[method].append(request)
        self.remaining_s.append(context.time_remaining())
        if not self.handlers[method]:
            context.abort(grpc.StatusCode.INTERNAL, f"no handler left for {method}")
        return self.handlers[method].popleft()(request, context)


class _Router(grpc.GenericRpcHandler):
    def __init__(self, server: ScriptedServer) -> None:
        self._methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
        for service in SERVICES:
            for method in service.methods:
                self._methods[f"/{service.full_name}/{method.name}"] = _handler(server, method.name, _class_of(method))

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        return self._methods.get(handler_call_details.method)


def _class_of(method: Any) -> type[Message]:
    name = method.input_type.name
    found: type[Message] = next(getattr(module, name) for module in MODULES if hasattr(module, name))
    return found


def _handler(server: ScriptedServer, name: str, request: type[Message]) -> grpc.RpcMethodHandler[Any, Any]:
    def serialize(message: Message) -> bytes:
        return message.SerializeToString()

    if name in STREAMS:

        def stream(message: Message, context: grpc.ServicerContext) -> Iterator[Message]:
            yield from server.take(name, message, context)

        return grpc.unary_stream_rpc_method_handler(stream, request.FromString, serialize)

    def unary(message: Message, context: grpc.ServicerContext) -> Message:
        answer: Message = server.take(name, message, context)
        return answer

    return grpc.unary_unary_rpc_method_handler(unary, request.FromString, serialize)


def fail(context: grpc.ServicerContext, error: EchelonError) -> NoReturn:
    """End the call with this error, as the coordinator does."""
    context.abort_with_status(abort_status(error))
    raise AssertionError("abort_with_status raises")


IDS = (11, 12, 13, 14, 15, 16)
WORDS = ("one ", "two ", "three ", "four ", "five ", "six")


def completion(request_id: str, ids: tuple[int, ...] = IDS, text: str | None = None) -> Completion:
    """The scripted generation's answer."""
    return Completion(
        request_id=request_id,
        model="tiny",
        choices=(
            Choice(
                text="".join(WORDS[: len(ids)]) if text is None else text,
                token_ids=ids,
                finish_reason=FinishReason.LENGTH,
            ),
        ),
        usage=Usage(3, len(ids)),
    )


def tokens(first: int, last: int, *, end: bool = False, then: Callable[[Any], None] | None = None) -> Handler:
    """Deltas of the tokens first .. last - 1, each alone; then the final answer if end; then whatever else."""

    def handler(request: Any, context: Any) -> Iterator[Message]:
        request_id = request.request_id
        yield convert.stream_to_proto(Admitted(request_id, 3, 99))
        for index in range(first, last):
            delta = StreamEvent(request_id, 0, index, WORDS[index], (IDS[index],))
            yield convert.stream_to_proto(delta)
        if then is not None:
            then(context)
        if end:
            yield convert.stream_to_proto(completion(request_id))

    return handler
