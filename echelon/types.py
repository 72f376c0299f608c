"""The nouns a user is answered with: completions, stream events, jobs and the cluster.

Frozen values without behaviour, shared by the SDK and the coordinator. They know no protobuf type and no
transport: `echelon/convert.py` translates. Units stand in the names; times are unix seconds.
"""

from __future__ import annotations

import enum
import operator
from dataclasses import astuple, dataclass

from echelon.cluster_types import Cluster as Cluster
from echelon.cluster_types import ClusterEvent as ClusterEvent
from echelon.cluster_types import ExpertLoad as ExpertLoad
from echelon.cluster_types import Model as Model
from echelon.cluster_types import Rank as Rank
from echelon.cluster_types import Replica as Replica
from echelon.cluster_types import Spare as Spare
from echelon.cluster_types import SpareDevice as SpareDevice


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
