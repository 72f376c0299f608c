"""Large requests are read beside the event loop, small ones on it; what is read is what was sent."""

from __future__ import annotations

import asyncio
import threading

from coordinator.incoming import LARGE_BYTES, off_loop, read_generation, read_prompt
from echelon.chat import ChatMessage, ChatPrompt
from echelon.v1 import generation_pb2

Request = generation_pb2.GenerateRequest


def test_only_what_takes_long_is_read_on_a_thread_of_its_own() -> None:
    async def threads(text: str) -> bool:
        return await off_loop(Request(text=text), threading.get_ident) == threading.get_ident()

    assert asyncio.run(threads("x"))
    assert not asyncio.run(threads("x" * LARGE_BYTES))


def test_what_is_read_is_what_was_sent() -> None:
    for ids in ((5, 6), (5,) * LARGE_BYTES):
        resume = generation_pb2.Resume(received=[generation_pb2.TokenIds(ids=[1]), generation_pb2.TokenIds()])
        message = Request(token_ids=generation_pb2.TokenIds(ids=ids), resume=resume, priority=-3, cache_salt="tenant")
        fields, received = asyncio.run(read_generation(message, None))
        assert (fields.prompt, fields.priority, fields.cache_salt) == (ids, -3, "tenant")
        assert fields.deadline_unix_s is None and received == ((1,), ())
    fields, received = asyncio.run(read_generation(Request(text="x"), 5.0))
    assert fields.deadline_unix_s is not None and received is None
    chat = generation_pb2.ChatPrompt(messages=[generation_pb2.ChatMessage(role="user", content="x")])
    prompt = asyncio.run(read_prompt(generation_pb2.TokenizeRequest(chat=chat)))
    assert prompt == ChatPrompt((ChatMessage("user", "x"),))
    assert asyncio.run(read_prompt(generation_pb2.TokenizeRequest())) is None
