"""Bytes that are no message, and messages larger than they need be: one status, whatever the method; others pass."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import pytest

from coordinator.decoding import MAX_REQUEST_BYTES, DecodingInterceptor
from echelon.errors import EchelonError, InvalidRequestError
from echelon.internal.channel import CLIENT_OPTIONS, SERVER_OPTIONS
from echelon.status import from_rpc
from echelon.v1 import generation_pb2, generation_pb2_grpc

SERVICE = "/echelon.v1.GenerationService"
GOOD = generation_pb2.GenerateRequest(text="größer")


class Echo(generation_pb2_grpc.GenerationServiceServicer):
    """Answers with what was asked, twice where it streams."""

    async def Generate(self, request: generation_pb2.GenerateRequest, context: Any) -> generation_pb2.GenerateResponse:
        return generation_pb2.GenerateResponse(model=request.text[:9])

    async def StreamGenerate(
        self, request: generation_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[generation_pb2.StreamGenerateResponse]:
        for _ in range(2):
            yield generation_pb2.StreamGenerateResponse(request_id=request.text[:9])


async def answers(name: str, payload: bytes, large: tuple[str, ...] = ()) -> list[Any]:
    """What a client of such a server is told. Raises its error."""
    server = grpc.aio.server(interceptors=[DecodingInterceptor(large)], options=SERVER_OPTIONS)
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(Echo(), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        async with grpc.aio.insecure_channel(address, options=CLIENT_OPTIONS) as channel:
            if name == "Generate":
                unary: Any = channel.unary_unary(f"{SERVICE}/{name}")
                return [generation_pb2.GenerateResponse.FromString(await unary(payload)).model]
            stream: Any = channel.unary_stream(f"{SERVICE}/{name}")
            found = [generation_pb2.StreamGenerateResponse.FromString(told) async for told in stream(payload)]
            return [message.request_id for message in found]
    finally:
        await server.stop(None)


def refusal(name: str, payload: bytes) -> EchelonError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        asyncio.run(answers(name, payload))
    return from_rpc(caught.value, "here")


@pytest.mark.parametrize("name", ["Generate", "StreamGenerate"])
@pytest.mark.parametrize("payload", [b"\xff\xff\xff\x01", b"\x1a\x03\xed\xa0\x80", b"\x1a\x7fcut"])
def test_what_is_no_message_is_refused(name: str, payload: bytes) -> None:
    error = refusal(name, payload)
    assert (type(error), error.reason) == (InvalidRequestError, "INVALID_FIELD")
    assert "echelon.v1.GenerateRequest" in error.message and "UTF-8" in error.message


def test_what_is_a_message_passes() -> None:
    payload = GOOD.SerializeToString()
    assert asyncio.run(answers("Generate", payload)) == ["größer"]
    assert asyncio.run(answers("StreamGenerate", payload)) == ["größer"] * 2


def test_a_large_message_passes_where_it_may() -> None:
    payload = generation_pb2.GenerateRequest(text="x" * MAX_REQUEST_BYTES).SerializeToString()
    error = refusal("Generate", payload)
    limit = f"the request has {len(payload)} bytes, over the limit of {MAX_REQUEST_BYTES}"
    assert (error.reason, error.message) == ("INVALID_FIELD", limit)
    assert asyncio.run(answers("Generate", payload, (f"{SERVICE}/Generate",))) == ["x" * 9]
