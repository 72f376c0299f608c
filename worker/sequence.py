"""Request and Sequence: what the scheduler knows of an attempt at a request, and of each of its choices.

Lives in the leader, without torch, clock or I/O; records with their arithmetic, changed by the scheduler and, where
blocks are concerned, by the prefix cache. A sequence goes WAITING -> RUNNING -> DRAWN -> ENDED; preemption takes it
from RUNNING back to WAITING, and it can end in any state.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from echelon.internal.link import Assign, Finish, Logprob, Progress, Prompted, Released, TokenRun
from worker.speculation import Speculation

NO_SLOT = -1
NO_COHORT = -1
SPOILT = (
    "the model's scores for this request are not finite (NaN or infinite), so no token can be drawn; change the "
    "prompt, or serve with a dtype of a larger range"
)


class State(enum.Enum):
    """WAITING: holds nothing. RUNNING: holds a slot and blocks. DRAWN: plans draw its last id, it holds nothing."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    DRAWN = enum.auto()
    ENDED = enum.auto()


@dataclass(slots=True)
class Outcome:
    """What has become of requests: new ids, prompts that are computed, attempts of which nothing is held any more."""

    runs: list[TokenRun] = field(default_factory=list)
    prompted: list[Prompted] = field(default_factory=list)
    released: list[Released] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Request:
    """One attempt at a request, from the assignment until its last held choice has ended."""

    assign: Assign
    arrival: int
    hashes: list[bytes]  # of the full blocks of its prompt, all choices' beginning
    choices: dict[int, Sequence] = field(default_factory=dict)  # those that have not ended
    cached_tokens: int | None = None  # of the prompt, found in the cache when its first choice began
    prompted: bool = False  # the prompt's end has been told
    scored: int = 0  # leading positions of the prompt whose scores plans have asked for
    scores: list[Logprob] = field(default_factory=list)  # of the prompt's tokens but the first, as far as they came
    computing_step: int = 0  # the last step that computes full blocks of the prompt

    @property
    def unscored(self) -> bool:
        """Log-probabilities of its prompt are asked, and not all planned."""
        return self.assign.sampling.prompt_logprobs is not None and self.scored < len(self.assign.prompt) - 1

    def spoilt(self) -> Released:
        """Its scores are not finite. What others have computed for it may be why: then it is to begin anew without."""
        if self.cached_tokens:
            return Released(self.assign.request, self.assign.attempt)
        return Released(self.assign.request, self.assign.attempt, SPOILT, "NON_FINITE")

    def tell_prompted(self) -> Prompted:
        """Its prompt is computed; to be told once, before its first new id."""
        self.prompted = True
        scores, self.scores = tuple(self.scores), []
        return Prompted(self.assign.request, self.assign.attempt, self.cached_tokens or 0, scores)


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice of a request: what is known of its ids, what it holds, and how far plans have taken it."""

    request: Request
    assign: Assign
    choice: int
    order: tuple[int, int, int]  # what is lower goes first, and is preempted last
    ids: list[int]  # prompt and committed ids
    given: int  # positions to prefill; more than there are ids while some to be prefilled again are still in flight
    prompt_tokens: int
    end: int  # no id is drawn for this position or a later one
    stop_ids: frozenset[int]
    logprobs: int | None
    constrained: bool  # a row of it can be planned only when its last id is committed
    hashes: list[bytes]  # of its full blocks, as far as they were needed
    state: State = State.WAITING
    slot: int = NO_SLOT
    cohort: int = NO_COHORT  # those that decode have one
    drawn_step: int = 0  # the last step that draws an id of it
    planned: int = 0  # positions whose keys and values are in its blocks once all plans have run
    cached: int = 0  # of these, found in the cache when it last began
    computed: int = 0  # the most that were planned before a preemption
    blocks: list[int] = field(default_factory=list)
    kept: int = 0  # leading blocks whose content can be found in the cache
    due_at: int = 0  # number of ids with which there is more to do than to tell them
    speculation: Speculation | None = None

    @classmethod
    def of(cls, request: Request, progress: Progress) -> Sequence:
        """A choice with the ids it already has."""
        assign = request.assign
        ids = [*assign.prompt, *progress.generated]
        return cls(
            request=request,
            assign=assign,
            choice=progress.choice,
            order=(assign.priority, request.arrival, progress.choice),
            ids=ids,
            given=len(ids),
            prompt_tokens=len(assign.prompt),
            end=len(assign.prompt) + assign.sampling.max_tokens,
            stop_ids=frozenset(assign.sampling.stop_token_ids),
            logprobs=assign.sampling.logprobs,
            constrained=bool(assign.sampling.grammar),
            hashes=list(request.hashes),
        )

    @property
    def generated(self) -> int:
        """Committed ids, replayed ones included."""
        return len(self.ids) - self.prompt_tokens

    @property
    def reusable(self) -> int:
        """Leading positions that need not be computed if they are in the cache.

        The last is always computed, for what it draws; of a prompt whose tokens are scored, what is not scored yet.
        """
        return min(self.given - 1, self.request.scored) if self.request.unscored else self.given - 1

    def accept_draft(self) -> None:
        """The last id was drafted before it was drawn, so a row went on from it: what that row drew is to follow."""
        assert self.speculation is not None, "it has drafts"
        self.speculation.came_true()
        if self.state is State.RUNNING:
            self.planned = len(self.ids)
        else:  # preempted meanwhile: what the row draws will be known
            self.given = len(self.ids) + 1

    def finish(self) -> Finish | None:
        """Whether the choice ends with its last id: by an end token, else by its limit."""
        if self.ids[-1] in self.stop_ids and self.generated > self.assign.sampling.min_tokens:
            return Finish.STOP
        return Finish.LENGTH if len(self.ids) >= self.end else None
