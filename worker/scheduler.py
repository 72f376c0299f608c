"""The scheduler: continuous batching of a replica's requests into immutable step plans.

Lives in the leader, without torch, clock or I/O. `schedule` fills a step's token budget with decode rows first and
chunks of prompts after them; `commit` takes the ids of the oldest plan and says what they mean. Plans are made ahead
of results: a decode row needs no id, because the ranks keep the last one they sampled. Ranks run plans in order, so
slot and blocks of an ended request go to the next plan at once, even while an older plan still has a row of it; the
id of that row is dropped. Knows nothing of links, reports and acknowledgements.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from echelon.internal.link import Assign, Fence, Finish, Logprob, TokenRun
from worker.block_pool import BlockPool
from worker.plan import Admit, Row, StepPlan, StepResult

COUNTERS = ("steps", "prefill_chunks", "chunked_prompts", "decode_rows", "replayed_requests")


NO_SLOT = -1  # of a request that waits for one


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What one replica holds at once (slots, blocks), computes at once (tokens), and leaves unacknowledged at most."""

    max_running: int
    kv_blocks: int
    block_tokens: int
    max_step_tokens: int
    max_context: int
    max_unacked_reports: int = 1024

    def __post_init__(self) -> None:
        for name in self.__slots__:
            assert getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}"


@dataclass(slots=True, eq=False)
class Sequence:
    """One attempt at a request: what is known of its ids, what it holds, and how far plans have taken it."""

    assign: Assign
    given: tuple[int, ...]  # prompt and replayed ids: prefilled, never sampled
    generated: int  # committed ids, replayed ones included
    max_tokens: int
    end: int  # prompt + max_tokens: no id is drawn for this position or a later one
    stop_ids: frozenset[int]
    logprobs: int | None
    reserved: int  # blocks that it may come to hold
    slot: int = NO_SLOT
    planned: int = 0  # positions computed by the plans made so far
    blocks: list[int] = field(default_factory=list)
    released: bool = False

    @property
    def prefilled(self) -> bool:
        return self.planned >= len(self.given)

    @property
    def drawn(self) -> bool:
        """The plans made so far draw its last id."""
        return self.planned + 1 >= self.end

    def finish(self, last_id: int) -> Finish | None:
        """Whether the choice ends with this id: by an end token, else by its limit."""
        if last_id in self.stop_ids:
            return Finish.STOP
        return Finish.LENGTH if self.generated >= self.max_tokens else None


@dataclass(slots=True)
class Draft:
    """A plan in the making."""

    budget: int
    admits: list[Admit] = field(default_factory=list)
    blocks: list[tuple[int, int, int]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    sampled: list[Sequence] = field(default_factory=list)


def blocks_needed(assign: Assign, block_tokens: int) -> int:
    """Blocks reserved for a request from its admission to its end, so that nothing that runs can starve."""
    return -(-(len(assign.prompt) + assign.sampling.max_tokens) // block_tokens)


def refusal(assign: Assign, limits: EngineLimits) -> str:
    """Why a request can never run within these limits; empty if it can."""
    prompt, new = len(assign.prompt), assign.sampling.max_tokens
    if not prompt or new < 1:
        return f"prompt of {prompt} tokens and max_tokens {new}: both must be at least 1"
    if prompt + new > limits.max_context:
        return f"prompt {prompt} + max_tokens {new} = {prompt + new} tokens exceed max_context {limits.max_context}"
    if (blocks := blocks_needed(assign, limits.block_tokens)) > limits.kv_blocks:
        return f"{prompt + new} tokens need {blocks} blocks of {limits.block_tokens}; the cache has {limits.kv_blocks}"
    return ""


class Scheduler:
    """Holds every request from `add` until its last id is committed or `release`; first come, first served."""

    def __init__(self, limits: EngineLimits) -> None:
        self._limits = limits
        self._pool = BlockPool(limits.kv_blocks)
        self._unreserved = limits.kv_blocks
        self._free_slots = list(reversed(range(limits.max_running)))
        self._held: dict[str, Sequence] = {}
        self._waiting: deque[Sequence] = deque()  # only the head can have begun its prefill
        self._decoding: list[Sequence] = []  # prefilled, with ids left to draw
        self._in_flight: deque[tuple[int, list[Sequence]]] = deque()  # step, and whose ids it samples
        self._step = 0
        self.counters = dict.fromkeys(COUNTERS, 0)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._held.values())

    @property
    def plans_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def idle(self) -> bool:
        return not self._held

    @property
    def blocks_referenced(self) -> int:
        return self._pool.referenced_blocks

    def held_attempt(self, request: str) -> int | None:
        """The attempt that is held of a request, if one is."""
        return self._held[request].assign.attempt if request in self._held else None

    def add(self, assign: Assign) -> TokenRun | None:
        """Queue a request. If its replayed ids end it already, nothing is left to do: the empty run says how."""
        assert assign.request not in self._held, f"{assign.request} is held"
        assert not (reason := refusal(assign, self._limits)), reason
        sequence = Sequence(
            assign=assign,
            given=assign.prompt + assign.choices[0].generated,
            generated=len(assign.choices[0].generated),
            max_tokens=assign.sampling.max_tokens,
            end=len(assign.prompt) + assign.sampling.max_tokens,
            stop_ids=frozenset(assign.sampling.stop_token_ids),
            logprobs=assign.sampling.logprobs,
            reserved=blocks_needed(assign, self._limits.block_tokens),
        )
        if assign.choices[0].generated:
            self.counters["replayed_requests"] += 1
            if finish := sequence.finish(assign.choices[0].generated[-1]):
                return TokenRun(assign.request, 0, assign.attempt, sequence.generated, (), finish=finish)
        self._held[assign.request] = sequence
        self._waiting.append(sequence)
        return None

    def schedule(self, fence: Fence) -> StepPlan | None:
        """The next step, or None if there is nothing to compute."""
        draft = Draft(self._limits.max_step_tokens)
        self._decode(draft)
        self._prefill(draft)
        if not draft.rows:
            return None
        self._step += 1
        self._in_flight.append((self._step, draft.sampled))
        return StepPlan(fence, self._step, tuple(draft.admits), tuple(draft.blocks), tuple(draft.rows))

    def commit(self, result: StepResult) -> list[TokenRun]:
        """The ids of the oldest plan, without those of requests that ended since; a finish marks a request's last."""
        step, sampled = self._in_flight.popleft()
        assert result.step == step, f"results come in order: expected step {step}, got {result.step}"
        self.counters["steps"] += 1
        return [
            self._accept(sequence, token_id, logprob)
            for sequence, token_id, logprob in zip(sampled, result.ids, result.logprobs, strict=True)
            if not sequence.released
        ]

    def release(self, request: str) -> None:
        """Let go of all that a request holds, whatever it is doing."""
        sequence = self._held.pop(request)
        sequence.released = True
        if sequence.slot != NO_SLOT:
            self._pool.free(sequence.blocks)
            self._free_slots.append(sequence.slot)
            self._unreserved += sequence.reserved
        if not sequence.prefilled:
            self._waiting.remove(sequence)
        elif not sequence.drawn:
            self._decoding.remove(sequence)

    def check_integrity(self) -> None:
        """Slots, blocks and reservations are all free or held by exactly one request."""
        slots, unreserved = list(self._free_slots), self._unreserved
        for sequence in self:
            if sequence.slot != NO_SLOT:
                slots.append(sequence.slot)
                unreserved += sequence.reserved
            assert len(sequence.blocks) <= sequence.reserved, f"{sequence.assign.request} exceeds its reservation"
        assert sorted(slots) == list(range(self._limits.max_running)), f"slots {sorted(slots)}"
        assert unreserved == self._limits.kv_blocks, f"{unreserved} blocks free or reserved"
        self._pool.check_integrity(sequence.blocks for sequence in self)

    def _decode(self, draft: Draft) -> None:
        """One row for each request that generates. They fit: the step in which a prompt ends has a token for it too."""
        assert len(self._decoding) <= draft.budget, f"{len(self._decoding)} decode rows, budget {draft.budget}"
        for sequence in self._decoding:
            position = sequence.planned
            self._extend(draft, sequence, position + 1)
            draft.rows.append(Row(sequence.slot, position, 1, None, True, sequence.logprobs))
        draft.sampled += self._decoding
        draft.budget -= len(self._decoding)
        self.counters["decode_rows"] += len(self._decoding)
        self._decoding = [sequence for sequence in self._decoding if not sequence.drawn]

    def _prefill(self, draft: Draft) -> None:
        """Chunks of prompts with what is left of the budget; only the last chunk can stop short of its prompt's end."""
        while draft.budget and self._waiting and self._admit(draft, self._waiting[0]):
            sequence = self._waiting[0]
            first = sequence.planned
            chunk = sequence.given[first : first + draft.budget]
            self._extend(draft, sequence, first + len(chunk))
            logprobs = sequence.logprobs if sequence.prefilled else None
            draft.rows.append(Row(sequence.slot, first, len(chunk), chunk, sequence.prefilled, logprobs))
            draft.budget -= len(chunk)
            self.counters["prefill_chunks"] += 1
            self.counters["chunked_prompts"] += first == 0 and not sequence.prefilled
            if sequence.prefilled:
                self._waiting.popleft()
                draft.sampled.append(sequence)
                if not sequence.drawn:
                    self._decoding.append(sequence)

    def _admit(self, draft: Draft, sequence: Sequence) -> bool:
        """Whether the request has a slot, or there is one for it now, with blocks enough until its end."""
        if sequence.slot != NO_SLOT:
            return True
        if not self._free_slots or sequence.reserved > self._unreserved:
            return False
        self._unreserved -= sequence.reserved
        sequence.slot = self._free_slots.pop()
        assign = sequence.assign
        draft.admits.append(Admit(sequence.slot, 0, len(assign.prompt), assign.sampling))
        return True

    def _extend(self, draft: Draft, sequence: Sequence, planned: int) -> None:
        """Plan the positions before `planned`, with blocks for them to lie in."""
        sequence.planned = planned
        while len(sequence.blocks) * self._limits.block_tokens < planned:
            block = self._pool.allocate()
            draft.blocks.append((sequence.slot, len(sequence.blocks), block))
            sequence.blocks.append(block)

    def _accept(self, sequence: Sequence, token_id: int, logprob: Logprob | None) -> TokenRun:
        """The run of one new id; releases the request if that ends it."""
        assign, first = sequence.assign, sequence.generated
        sequence.generated += 1
        finish = sequence.finish(token_id)
        if finish:
            self.release(assign.request)
        logprobs = () if logprob is None else (logprob,)
        return TokenRun(assign.request, 0, assign.attempt, first, (token_id,), logprobs, finish)
