"""Draft: a step plan in the making, and what the scheduler has to remember of it until its result comes.

Lives in the leader. It turns sequences into rows within a step's budgets and moves their `planned` on. Who gets a row
is the scheduler's decision; where keys and values lie is the prefix cache's. Drafted ids are guesses (`speculator.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from echelon.internal.link import Fence
from parallel.slot_cost import ChunkLimits, SlotCostModel, SlotWork, chunk_tokens, chunk_work
from worker.plan import Admit, Row, StepPlan, StepResult, Told
from worker.sequence import Request, Sequence
from worker.speculation import rejected

SCORED_STEP_TOKENS = 256  # of scored prompts in one step: each of these tokens needs its own logits


@dataclass(frozen=True, slots=True)
class Slot:
    """How long a step should take, by what steps were measured to cost."""

    model: SlotCostModel
    target_s: float
    limits: ChunkLimits

    def tokens(self, beside: SlotWork, first: int, waiting: int) -> int:
        """Of a prompt's tokens that wait, from position first on, what still fits beside other work of the step.

        0 if nothing does, unless no other prompt is in the step: one has to go on however heavy the cohort is.
        """
        fitting = chunk_tokens(self.model, beside, first, waiting, self.target_s, self.limits)
        alone = beside.pairs == 0
        return fitting if alone or self.model.tokens_within(beside, first, self.target_s) >= 1 else 0


class Flight(NamedTuple):
    """A plan without its result yet: whose ids it samples, whose prompts it scores and computes, and how much."""

    step: int
    sampled: list[Sequence]
    scored: list[Request]
    prefilled: list[Sequence]
    work: SlotWork
    drafted: Mapping[int, int]  # of the sampled rows that go on from one, which id

    @property
    def requests(self) -> set[str]:
        """That have a row in it."""
        return {sequence.assign.request for sequence in (*self.sampled, *self.prefilled)}

    @property
    def verified(self) -> list[Sequence]:
        """That have drafts in it."""
        return [self.sampled[row] for row in self.drafted if row - 1 not in self.drafted]

    def spoilt(self, result: StepResult) -> list[Sequence]:
        """Whose scores are not finite; what is drawn behind a draft that did not come true concerns nobody."""
        wrong = rejected(self.drafted, result.ids)
        return [self.sampled[row] for row in result.non_finite if row not in wrong]


@dataclass(slots=True)
class Draft:
    """Budgets are tokens that the step can still compute. predicts: the model reads the id behind each token, too."""

    step: int
    budget: int
    predicts: bool = False
    scored_budget: int = SCORED_STEP_TOKENS
    admits: list[Admit] = field(default_factory=list)
    blocks: list[tuple[int, int, int]] = field(default_factory=list)
    told: list[Told] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    sampled: list[Sequence] = field(default_factory=list)
    scored: list[Request] = field(default_factory=list)
    prefilled: list[Sequence] = field(default_factory=list)  # a chunk of each
    drawn: list[Sequence] = field(default_factory=list)  # the last id of each
    drafted: dict[int, int] = field(default_factory=dict)  # as Flight has them
    after: int = 0  # the last step whose ids it reads
    slot: Slot | None = None  # None: chunks fill the budget
    work: SlotWork = field(default_factory=SlotWork)

    def plan(self, fence: Fence) -> StepPlan:
        """The finished plan."""
        admits, blocks, rows, told = tuple(self.admits), tuple(self.blocks), tuple(self.rows), tuple(self.told)
        return StepPlan(fence, self.step, admits, blocks, rows, told, self.after)

    def flight(self) -> Flight:
        """What its result will be about."""
        return Flight(self.step, self.sampled, self.scored, self.prefilled, self.work, self.drafted)

    def admit(self, sequence: Sequence) -> None:
        """A sequence has a slot now, and the blocks that it begins with; of what is cached, ranks are told the ids."""
        self.admits.append(Admit(sequence.slot, sequence.choice, sequence.prompt_tokens, sequence.assign.sampling))
        self.blocks += [(sequence.slot, index, block) for index, block in enumerate(sequence.blocks)]
        if sequence.cached:
            self.told.append(Told(sequence.slot, 0, tuple(sequence.ids[: sequence.cached])))

    def add_decode_row(self, sequence: Sequence) -> None:
        """The id that was drawn last, whatever it is, and the next one drawn."""
        position = sequence.planned
        self.rows.append(Row(sequence.slot, position, 1, None, True, sequence.logprobs))
        self.budget -= 1
        if sequence.drawn_step > self.after:
            self.after = sequence.drawn_step
        sequence.drawn_step = self.step
        sequence.planned = position + 1
        self.sampled.append(sequence)
        if position + 2 >= sequence.end:
            self.drawn.append(sequence)

    def add_block(self, sequence: Sequence, block: int) -> None:
        """The last of a sequence's blocks is new."""
        self.blocks.append((sequence.slot, len(sequence.blocks) - 1, block))

    def add_drafts(self, sequence: Sequence, drafts: Iterable[int]) -> None:
        """Behind the decode row of a sequence, one for each draft: they are told, and draw what follows if they come
        true. So far nothing of the sequence has moved on."""
        first = sequence.planned
        self.told.append(Told(sequence.slot, first, tuple(drafts)))
        for position, draft in enumerate(drafts, first):
            self.drafted[len(self.sampled)] = draft
            self.rows.append(Row(sequence.slot, position, 1, None, True, sequence.logprobs))
            self.sampled.append(sequence)
            self.budget -= 1

    def room(self, sequence: Sequence) -> int:
        """How many positions of what is given can be computed now."""
        first, waiting = sequence.planned, sequence.given - sequence.planned
        return min(self.budget, waiting if self.slot is None else self.slot.tokens(self.work, first, waiting))

    def add_chunk(self, sequence: Sequence) -> Row:
        """The next positions of what is given, as many as the budgets allow; the last of them draws an id."""
        request, ids, first = sequence.request, sequence.ids, sequence.planned
        tokens = self.room(sequence)
        scored, next_id = None, None
        if request.unscored and first < request.scored:  # computed again, scored before
            tokens = min(tokens, request.scored - first)
        elif request.unscored:
            tokens = min(tokens, self.scored_budget, sequence.prompt_tokens - first)
            request.scored = first + tokens
            scored = sequence.assign.sampling.prompt_logprobs
            next_id = ids[first + tokens] if first + tokens < sequence.prompt_tokens else None
            self.scored.append(request)
            self.scored_budget -= tokens
        end = sequence.planned = first + tokens
        sampled = end == sequence.given
        logprobs = sequence.logprobs if sampled else None
        row = Row(sequence.slot, first, tokens, tuple(ids[first:end]), sampled, logprobs, scored, next_id)
        self.rows.append(row)
        self.budget -= tokens
        self.work += chunk_work(first, tokens)
        self.prefilled.append(sequence)
        if not sampled and self.predicts and sequence.speculation is not None:
            self.told.append(Told(sequence.slot, end, (ids[end],)))
        if sampled:
            sequence.drawn_step = self.step
            self.sampled.append(sequence)
            if end + 1 >= sequence.end:
                self.drawn.append(sequence)
        return row
