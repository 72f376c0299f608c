"""Requests whose bytes are no message of their kind, refused like any other bad input.

An interceptor of the coordinator's public server. gRPC ends such a call with UNKNOWN and a traceback in the log; here
it ends with INVALID_ARGUMENT and says which message was expected. Knows no service.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from coordinator.server import refuse
from echelon.errors import InvalidRequestError

Handler = Any  # grpc.RpcMethodHandler: its type has no parameter for what it handles


class DecodingInterceptor(grpc.aio.ServerInterceptor):
    """Of calls with one request; those with a stream of them pass."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming or handler.request_deserializer is None:
            return handler
        if handler.response_streaming:
            made, behavior = grpc.unary_stream_rpc_method_handler, _stream(handler.unary_stream)
        else:
            made, behavior = grpc.unary_unary_rpc_method_handler, _unary(handler.unary_unary)
        return made(behavior, _decoded(handler.request_deserializer), handler.response_serializer)


def _decoded(decode: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """The message, or the error that its bytes are: what a deserializer raises, gRPC alone would see."""

    def decoded(content: bytes) -> Any:
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
