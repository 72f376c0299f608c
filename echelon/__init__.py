"""Echelon's client SDK: everything a user imports.

    from echelon import Client
    with Client("localhost:50051") as client:
        print(client.generate("Once upon a time", max_tokens=32).text)

Servers import the nouns from here too, so the clients, and gRPC with them, are loaded only when they are asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from echelon.chat import ChatMessage, ToolCall
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
    StreamTakenOverError,
    UnavailableError,
)
from echelon.sampling import SamplingParams
from echelon.types import Choice, Completion, FinishReason, StreamEvent

if TYPE_CHECKING:
    from echelon.aio import AsyncClient
    from echelon.client import Client

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
    "SamplingParams",
    "StreamEvent",
    "StreamTakenOverError",
    "ToolCall",
    "UnavailableError",
]

_CLIENTS = {"AsyncClient": "echelon.aio", "Client": "echelon.client"}


def __getattr__(name: str) -> object:
    if name not in _CLIENTS:
        raise AttributeError(f"module 'echelon' has no attribute {name!r}")
    return getattr(importlib.import_module(_CLIENTS[name]), name)
