"""The nouns between coordinator and leader: requests down, runs of tokens up, and the three fences.

Used in both processes, by their sans-IO cores and by the simulator. Knows no protobuf type (`wire.py`
translates), no clock and no socket.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

PROTOCOL_VERSION = 1


@dataclass(frozen=True, slots=True, order=True)
class Fence:
    """Term of the coordinator, replica, and epoch of that replica. A message with an older term or epoch is refused."""

    term: int
    replica: int
    epoch: int


class Finish(enum.IntEnum):
    """How the leader ended a choice: an end token, or the token limit."""

    STOP = 1
    LENGTH = 2


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling with every default and the seed settled; echelon.sampling.SamplingParams says what each field means.

    stop_token_ids hold the model's end ids too, unless ignored. stop strings are judged by the coordinator alone.
    bad_words are token ids. grammar is llguidance's own form of a constraint, empty for any text.
    """

    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    seed: int
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    n: int = 1
    prompt_logprobs: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    grammar: str = ""


@dataclass(frozen=True, slots=True)
class Logprob:
    """Log-probability of the sampled token, and the likeliest ids with theirs."""

    logprob: float
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Progress:
    """A choice that has not ended. generated ids are already journaled: prefill them, never sample them again."""

    choice: int
    generated: tuple[int, ...] = ()


CANARY = "@canary"  # a request of no client: a token that shows that a replica computes


@dataclass(frozen=True, slots=True)
class Assign:
    """Run these choices of a request. Lower priority goes first; prefixes are shared under the same cache_salt only."""

    request: str
    attempt: int
    prompt: tuple[int, ...]
    choices: tuple[Progress, ...]
    sampling: Sampling
    priority: int = 0
    cache_salt: str = ""


@dataclass(frozen=True, slots=True)
class Abandon:
    """Stop this attempt, or one choice of it, and release what that holds; the last one is answered by Released."""

    request: str
    attempt: int
    choice: int | None = None


@dataclass(frozen=True, slots=True)
class Command:
    """Coordinator -> leader. Reports up to acked_report are journaled and may be forgotten by the leader."""

    fence: Fence
    acked_report: int
    assigns: tuple[Assign, ...] = ()
    abandons: tuple[Abandon, ...] = ()


class TokenRun(NamedTuple):
    """Consecutive new ids of one choice. first_token = ids of this choice before them, replayed ones included.

    One a request a step, so it must be cheap.
    """

    request: str
    choice: int
    attempt: int
    first_token: int
    ids: tuple[int, ...]
    logprobs: tuple[Logprob, ...] = ()
    finish: Finish | None = None


@dataclass(frozen=True, slots=True)
class Prompted:
    """A prompt has been computed, cached_tokens of it by an earlier request. prompt_logprobs: of all but its first."""

    request: str
    attempt: int
    cached_tokens: int
    prompt_logprobs: tuple[Logprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Released:
    """The leader holds nothing of this attempt any more; if it holds nothing at all, no step computes any of it either.

    error and its reason say why it cannot be run, else empty.
    """

    request: str
    attempt: int
    error: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Running:
    """An attempt that the leader holds."""

    request: str
    attempt: int


@dataclass(frozen=True, slots=True)
class ReplicaHello:
    """A leader's first report on a link: what it can hold, and what it holds already.

    last_attempt: the highest that it was ever given, canaries left out; a later one never reached it.
    """

    slots: int
    kv_blocks: int
    block_tokens: int
    max_context: int
    running: tuple[Running, ...] = ()
    last_attempt: int = 0


@dataclass(frozen=True, slots=True)
class ReplicaStats:
    """Counted by the leader since its epoch began; blocks as they are now: held, and kept for what may begin alike."""

    step: int = 0
    blocks_referenced: int = 0
    counters: Mapping[str, int] = field(default_factory=dict)
    blocks_cached: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """Leader -> coordinator, numbered from 1 within an epoch. Kept by the leader until acknowledged."""

    fence: Fence
    report_seq: int
    runs: tuple[TokenRun, ...] = ()
    released: tuple[Released, ...] = ()
    hello: ReplicaHello | None = None
    stats: ReplicaStats | None = None
    prompted: tuple[Prompted, ...] = ()
