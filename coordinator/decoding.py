"""Requests whose bytes are no message of their kind, refused like any other bad input.

An interceptor of the coordinator's public server. gRPC ends such a call with UNKNOWN and a traceback in the log; here
it ends with INVALID_ARGUMENT and says which message was expected. So does one that is larger than it need be: read, a
message may take fifty times its bytes. Knows no service.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import aclosing
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from coordinator.server import refuse
from echelon.errors import InvalidRequestError
from echelon.internal.channel import MAX_MESSAGE_BYTES

MAX_REQUEST_BYTES = 16 * 2**20  # a million token ids have about three

Handler = Any  # grpc.RpcMethodHandler: its type has no parameter for what it handles


class DecodingInterceptor(grpc.aio.ServerInterceptor):
    """Of calls with one request; those with a stream of them pass. large: methods that take all that gRPC takes."""

    def __init__(self, large: Collection[str] = ()) -> None:
        self._large = large

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming or handler.request_deserializer is None:
            return handler
        limit_bytes = MAX_MESSAGE_BYTES if handler_call_details.method in self._large else MAX_REQUEST_BYTES
        codec = _decoded(handler.request_deserializer, limit_bytes), handler.response_serializer
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(_stream(handler.unary_stream), *codec)
        return grpc.unary_unary_rpc_method_handler(_unary(handler.unary_unary), *codec)


def _decoded(decode: Callable[[bytes], Any], limit_bytes: int) -> Callable[[bytes], Any]:
    """The message, or the error that its bytes are: what a deserializer raises, gRPC alone would see."""

    def decoded(content: bytes) -> Any:
        if len(content) > limit_bytes:
            return InvalidRequestError(f"the request has {len(content)} bytes, over the limit of {limit_bytes}")
        try:
            return decode(content)
        except DecodeError as error:
            return InvalidRequestError(f"the request cannot be read: {error}; texts must be UTF-8")

    return decoded


def _unary(call: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
    async def checked(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        if isinstance(request, InvalidRequestError):
            await refuse(context, request)
        return await call(request, context)

    return checked


def _stream(call: Callable[[Any, Any], Any]) -> Callable[[Any, Any], AsyncIterator[Any]]:
    async def checked(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        if isinstance(request, InvalidRequestError):
            await refuse(context, request)
        async with aclosing(call(request, context)) as messages:
            async for message in messages:
                yield message

    return checked
