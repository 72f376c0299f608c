"""The nouns a user meets: sampling parameters, completions, stream events, jobs and the cluster.

Frozen values without behaviour, shared by the SDK and the coordinator. They know no protobuf type and no
transport: `echelon/convert.py` translates. Units stand in the names; times are unix seconds.
"""

from __future__ import annotations

import enum
import operator
import sys
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field

from echelon.errors import InvalidRequestError

MAX_LOGPROBS = 20
SEED_RANGE = range(-(2**63), 2**63)


class FinishReason(enum.Enum):
    """Why a completion ended: at an end token, or at its token limit."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How tokens are drawn. `None` takes the model's generation_config.json, then the default named here.

    temperature: >= 0, 0 is greedy; default 1.       top_p: in (0, 1]; default 1.
    top_k: >= 0, 0 keeps every token; default 0.     max_tokens: >= 1; default 16.
    seed: drawn by the server when None.             stop_token_ids: end the completion, and are part of it.
    logprobs: None for none, k for each token's own and the k likeliest (0 <= k <= 20).
    ignore_eos: go on past the model's end tokens.

    Raises InvalidRequestError naming the field.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_tokens: int | None = None
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        def require(ok: bool, name: str, rule: str) -> None:
            if not ok:
                raise InvalidRequestError(
                    f"{name} must be {rule}, got {getattr(self, name)!r}", field=f"sampling.{name}"
                )

        def is_number(value: object) -> bool:
            return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max

        def is_integer(value: object) -> bool:
            return isinstance(value, int) and not isinstance(value, bool)

        if self.temperature is not None:
            require(is_number(self.temperature) and self.temperature >= 0, "temperature", "a finite number >= 0")
        if self.top_p is not None:
            require(is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", "in (0, 1]")
        if self.top_k is not None:
            require(is_integer(self.top_k) and 0 <= self.top_k < 2**31, "top_k", "an integer >= 0")
        if self.max_tokens is not None:
            require(is_integer(self.max_tokens) and 1 <= self.max_tokens < 2**31, "max_tokens", "an integer >= 1")
        if self.seed is not None:
            require(is_integer(self.seed) and self.seed in SEED_RANGE, "seed", "a 64-bit signed integer")
        if self.logprobs is not None:
            require(
                is_integer(self.logprobs) and 0 <= self.logprobs <= MAX_LOGPROBS,
                "logprobs",
                f"an integer from 0 to {MAX_LOGPROBS}",
            )
        require(
            all(is_integer(i) and 0 <= i < 2**31 for i in self.stop_token_ids),
            "stop_token_ids",
            "token ids, integers >= 0",
        )
        require(isinstance(self.ignore_eos, bool), "ignore_eos", "true or false")


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of a chat: role is system, user or assistant. Raises InvalidRequestError for what is no text."""

    role: str
    content: str

    def __post_init__(self) -> None:
        check_text("role", self.role, "messages")
        check_text("content", self.content, "messages")


def check_text(name: str, value: object, field: str) -> str:
    """The value, unless no message can carry it: no string, or half of a surrogate pair, as misread bytes have."""
    if not isinstance(value, str):
        raise InvalidRequestError(f"{name} must be a string, got {value!r}", field=field)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        rule = f"must be text, but its character {error.start} is half of a surrogate pair"
        raise InvalidRequestError(f"{name} {rule}", field=field) from None
    return value


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The natural logarithm of a token's probability, and the likeliest alternatives by falling probability."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one completion; recomputed_tokens were prefilled again after a fault."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    recomputed_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(*map(operator.add, astuple(self), astuple(other)))


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds from arrival: until first assigned, until the first token, until the end."""

    queue_s: float = 0.0
    ttft_s: float = 0.0
    total_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """One whole answer."""

    request_id: str
    model: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] = ()
    usage: Usage = Usage()
    timing: Timing = Timing()


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """Some tokens of one choice. sequence counts this choice's tokens before them; text is what they add."""

    request_id: str
    index: int
    sequence: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Admitted:
    """First message of a stream: the prompt's length, and the seed that was sent or drawn."""

    request_id: str
    prompt_tokens: int
    seed: int


class JobState(enum.Enum):
    """QUEUED -> RUNNING -> SUCCEEDED, or CANCELLING -> CANCELLED."""

    QUEUED = "queued"
    RUNNING = "running"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        return self in (JobState.SUCCEEDED, JobState.CANCELLED)


@dataclass(frozen=True, slots=True)
class ItemCounts:
    """Items of a job; interrupted ones met a fault and were taken up again."""

    total: int = 0
    succeeded: int = 0
    failed: int = 0
    running: int = 0
    interrupted: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class JobStatus:
    """A batch job as the coordinator knows it."""

    job_id: str
    state: JobState
    model: str
    counts: ItemCounts
    usage: Usage
    create_unix_s: float
    start_unix_s: float | None = None
    end_unix_s: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemResult:
    """One item's outcome: a completion or an error, never both. index is its place in the input."""

    custom_id: str
    index: int
    cursor: int
    completion: Completion | None = None
    error: Exception | None = None

    @property
    def text(self) -> str | None:
        return self.completion.text if self.completion else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Rank:
    """One device's process. parameter_bytes and kv_bytes are resident; planned_* is what placement foresaw."""

    replica: int
    pipeline: int
    data: int
    tensor: int
    expert: int
    leader: bool
    pid: int
    node_id: str
    epoch: int
    state: str
    device: str = "cpu"
    parameter_bytes: int = 0
    kv_bytes: int = 0
    planned_parameter_bytes: int = 0
    planned_kv_bytes: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Replica:
    """One copy of the model over its ranks; counters count since its epoch began."""

    index: int
    epoch: int
    state: str
    kv_blocks_total: int
    kv_blocks_referenced: int
    step: int
    counters: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A served model."""

    name: str
    source: str
    state: str
    dtype: str
    architecture: str
    max_context: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Everything that serves, at one moment."""

    version: str
    term: int
    coordinator_pid: int
    queued: int
    running: int
    parked: int
    models: tuple[Model, ...]
    replicas: tuple[Replica, ...]
    ranks: tuple[Rank, ...]


@dataclass(frozen=True, slots=True)
class ClusterEvent:
    """One decision or observation of the coordinator, in order of sequence."""

    sequence: int
    unix_s: float
    kind: str
    subject: str
    detail: Mapping[str, object]
