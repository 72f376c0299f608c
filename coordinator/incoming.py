"""What a client sent, from protobuf messages to the front end's nouns; of a large message on a thread of its own.

In the coordinator. Making Python of a message takes long in proportion to its bytes, and nothing else runs on the event
loop meanwhile. Checks no more than the nouns themselves do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from google.protobuf.message import Message

from coordinator.frontend import GenerateFields, Prompt, check_client_request_id
from coordinator.requests.nouns import Received
from echelon import convert
from echelon.v1 import generation_pb2

LARGE_BYTES = 64 * 1024  # takes about a millisecond

T = TypeVar("T")


async def off_loop(message: Message, read: Callable[[], T]) -> T:
    """What `read` makes of the message."""
    return read() if message.ByteSize() <= LARGE_BYTES else await asyncio.to_thread(read)


async def read_generation(
    message: generation_pb2.GenerateRequest, deadline_unix_s: float | None
) -> tuple[GenerateFields, Received | None]:
    """What is asked for, and the ids that a re-attaching client holds."""
    return await off_loop(message, lambda: (_fields(message, deadline_unix_s), _received(message)))


async def read_prompt(message: generation_pb2.TokenizeRequest) -> Prompt | None:
    """The one input that a client sent, if it sent one."""
    return await off_loop(message, lambda: _prompt(message))


def _fields(message: generation_pb2.GenerateRequest, deadline_unix_s: float | None) -> GenerateFields:
    check_client_request_id(message.request_id)
    return GenerateFields(
        prompt=_prompt(message),
        sampling=convert.sampling_from_proto(message.sampling),
        model=message.model,
        request_id=message.request_id,
        deadline_unix_s=deadline_unix_s,
        priority=message.priority,
        cache_salt=message.cache_salt,
    )


def _received(message: generation_pb2.GenerateRequest) -> Received | None:
    if not message.HasField("resume"):
        return None
    return tuple(tuple(choice.ids) for choice in message.resume.received)


def _prompt(message: generation_pb2.GenerateRequest | generation_pb2.TokenizeRequest) -> Prompt | None:
    match message.WhichOneof("input"):
        case "text":
            return message.text
        case "chat":
            return convert.chat_from_proto(message.chat)
        case "token_ids":
            assert isinstance(message, generation_pb2.GenerateRequest)
            return tuple(message.token_ids.ids)
    return None
