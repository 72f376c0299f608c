"""The nouns a user is answered with: completions, stream events, jobs and the cluster.

Frozen values without behaviour, shared by the SDK and the coordinator. They know no protobuf type and no
transport: `echelon/convert.py` translates. Units stand in the names; times are unix seconds.
"""

from __future__ import annotations

import enum
import operator
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field


class FinishReason(enum.Enum):
    """Why an answer ended: at an end token or a stop string, or at its token limit."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The natural logarithm of a token's probability, and the likeliest alternatives by falling probability."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one completion; completion_tokens are those of all its choices.

    cached_tokens of the prompt were found in the prefix cache; recomputed_tokens were prefilled again after a fault.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    recomputed_tokens: int = 0
    cached_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(*map(operator.add, astuple(self), astuple(other)))


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds from arrival: until first assigned, until the first token, until the end."""

    queue_s: float = 0.0
    ttft_s: float = 0.0
    total_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One of the answers to a prompt. matched_stop: the stop string that ended it, if one did."""

    index: int = 0
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] = ()
    matched_stop: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """What a request was answered: its choices by index, and the first of them at hand.

    prompt_logprobs: of every prompt token but the first, if they were asked for.
    """

    request_id: str
    model: str
    choices: tuple[Choice, ...]
    usage: Usage = Usage()
    timing: Timing = Timing()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        return self.choices[0].finish_reason

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...]:
        return self.choices[0].logprobs


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
class Spare:
    """A process that waits to become a rank of a replica. state: warming or warm."""

    replica: int
    rank: int
    pid: int
    node_id: str
    state: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Replica:
    """One copy of the model over its ranks; counters count since its epoch began. reason: why it does not serve."""

    index: int
    epoch: int
    state: str
    kv_blocks_total: int
    kv_blocks_referenced: int
    step: int
    kv_blocks_cached: int = 0
    counters: Mapping[str, int] = field(default_factory=dict)
    reason: str = ""


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
    """Everything that serves, at one moment. journal: durable, off, or "not durable: " and why."""

    version: str
    term: int
    coordinator_pid: int
    queued: int
    running: int
    parked: int
    models: tuple[Model, ...]
    replicas: tuple[Replica, ...]
    ranks: tuple[Rank, ...]
    spares: tuple[Spare, ...] = ()
    journal: str = "durable"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertLoad:
    """How often the experts of a layer were chosen since the replica's epoch began.

    rows: by expert. slots: the experts of each rank that holds whole ones, some perhaps on several; () where every rank
    holds a part of each.
    """

    replica: int
    epoch: int
    layer: int
    rows: tuple[int, ...]
    slots: tuple[tuple[int, ...], ...] = ()

    @property
    def max_over_mean(self) -> float:
        """Of the experts; 1 if none was chosen."""
        return _max_over_mean(self.rows)

    @property
    def rank_rows(self) -> tuple[float, ...]:
        """Of each rank that holds whole experts: its experts' rows, divided among the ranks that hold the same one."""
        held = [sum(expert in rank for rank in self.slots) for expert in range(len(self.rows))]
        return tuple(sum(self.rows[expert] / held[expert] for expert in set(rank)) for rank in self.slots)

    @property
    def rank_max_over_mean(self) -> float:
        """Of the ranks; 1 where all have alike many rows."""
        return _max_over_mean(self.rank_rows)


def _max_over_mean(rows: Sequence[float]) -> float:
    total = sum(rows)
    return max(rows) * len(rows) / total if total else 1.0


@dataclass(frozen=True, slots=True)
class ClusterEvent:
    """One decision or observation of the coordinator, in order of sequence."""

    sequence: int
    unix_s: float
    kind: str
    subject: str
    detail: Mapping[str, object]
