"""The nouns of a request: what is asked for, and what its stream is shown.

Frozen values without behaviour, in the coordinator. They know no protobuf type, no socket and no clock: times are unix
seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

from echelon.errors import EchelonError
from echelon.internal.link import Sampling
from echelon.types import Admitted, Completion, StreamEvent


@dataclass(frozen=True, slots=True)
class Request:
    """One admitted prompt with every default settled. digest covers what the client sent, without id and resume.

    Lower priority goes first. Cached prefixes are shared by requests of the same cache_salt only.
    """

    request_id: str
    digest: bytes
    model: str
    prompt: tuple[int, ...]
    sampling: Sampling
    deadline_unix_s: float
    opened_unix_s: float
    priority: int = 0
    cache_salt: str = ""


Received = tuple[tuple[int, ...], ...]  # by choice: ids of the answer that a client holds

# What a stream is shown: Admitted, then the tokens as they come, then exactly one outcome.
Outcome = Completion | EchelonError
Shown = Admitted | StreamEvent | Outcome
