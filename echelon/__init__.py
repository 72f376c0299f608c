"""Echelon's client SDK: everything a user imports.

    from echelon import Client
    with Client("localhost:50051") as client:
        print(client.generate("Once upon a time", max_tokens=32).text)

Each name is loaded when it is first asked for: servers import the nouns from below here, and a Ctrl-C at the command
line must find it past its imports.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from echelon.aio import AsyncClient
    from echelon.chat import ChatMessage, ToolCall
    from echelon.client import Client
    from echelon.errors import (
        CancelledError,
        ConfigError,
        ConflictError,
        DeadlineError,
        EchelonError,
        InternalError,
        InvalidRequestError,
        NotFoundError,
        OverloadedError,
        QuarantinedError,
        ResponseInvalidError,
        StreamTakenOverError,
        UnavailableError,
    )
    from echelon.retry import RetryPolicy
    from echelon.sampling import SamplingParams
    from echelon.structured import ParsedCompletion
    from echelon.types import Choice, Completion, FinishReason, StreamEvent

__all__ = [
    "AsyncClient",
    "CancelledError",
    "ChatMessage",
    "Choice",
    "Client",
    "Completion",
    "ConfigError",
    "ConflictError",
    "DeadlineError",
    "EchelonError",
    "FinishReason",
    "InternalError",
    "InvalidRequestError",
    "NotFoundError",
    "OverloadedError",
    "ParsedCompletion",
    "QuarantinedError",
    "ResponseInvalidError",
    "RetryPolicy",
    "SamplingParams",
    "StreamEvent",
    "StreamTakenOverError",
    "ToolCall",
    "UnavailableError",
]

_PLACES = {
    "AsyncClient": "echelon.aio",
    "Client": "echelon.client",
    "ChatMessage": "echelon.chat",
    "ToolCall": "echelon.chat",
    "ParsedCompletion": "echelon.structured",
    "RetryPolicy": "echelon.retry",
    "SamplingParams": "echelon.sampling",
    **dict.fromkeys(("Choice", "Completion", "FinishReason", "StreamEvent"), "echelon.types"),
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'echelon' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES.get(name, "echelon.errors")), name)


def __dir__() -> list[str]:
    return __all__
