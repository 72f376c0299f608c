"""The scheduler: continuous batching of a replica's requests into immutable step plans.

Lives in the leader, without torch, clock or I/O. `schedule` fills a step's token budget with decode rows, then chunks
of prompts; `commit` takes the ids of the oldest plan. Plans are made ahead of results: a decode row needs no id, the
ranks keep the last they sampled. As they run plans in order, what a sequence gives back serves the next plan at once;
ids of it in older plans are accepted if it was preempted, dropped if it ended. Knows no link, report, acknowledgement.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Iterator

from echelon.internal.block_hash import chain, root_hash
from echelon.internal.link import Assign, Fence, Finish, Logprob, Released, TokenRun
from worker import counters
from worker.cohorts import Cohorts
from worker.draft import Draft, Flight
from worker.limits import EngineLimits, refusal
from worker.plan import StepPlan, StepResult
from worker.prefix_cache import PrefixCache
from worker.queues import ORDER, check_queue, check_slots, dequeue, enqueue
from worker.sequence import NO_SLOT, Outcome, Request, Sequence, State
from worker.speculation import Drafter
from worker.speculator import Speculator


class Scheduler:
    """Holds every request from `add` until its last choice ends or is released; by priority, then first come first.

    Blocks are given as they are needed. When none is left, the running sequence that is last in that order gives
    back all it holds and waits to be computed again: the first one always goes on, so all come to their end.
    """

    def __init__(self, limits: EngineLimits, new_drafter: Callable[[], Drafter] | None = None) -> None:
        self._limits = limits
        self._cache = PrefixCache(limits.kv_blocks, limits.block_tokens)
        self._cohorts = Cohorts(limits)
        self._free_slots = list(reversed(range(limits.max_running)))
        self._held: dict[str, Request] = {}
        self._waiting: list[Sequence] = []  # in order
        self._running: list[Sequence] = []  # in order
        self._in_flight: deque[Flight] = deque()
        self._step, self._arrivals = 0, itertools.count()
        self.counters = dict.fromkeys(counters.NAMES, 0)
        self._speculator = Speculator(limits, self._cache, self._running, self.counters, new_drafter)

    def __iter__(self) -> Iterator[Assign]:
        return (request.assign for request in self._held.values())

    def __len__(self) -> int:
        return len(self._held)

    @property
    def flights(self) -> tuple[Flight, ...]:
        """The plans without their results yet, the oldest first."""
        return tuple(self._in_flight)

    @property
    def idle(self) -> bool:
        return not self._held

    @property
    def blocks_referenced(self) -> int:
        return self._cache.referenced_blocks

    @property
    def blocks_cached(self) -> int:
        return self._cache.cached_blocks

    def held_attempt(self, request: str) -> int | None:
        """The attempt that is held of a request, if one is."""
        return self._held[request].assign.attempt if request in self._held else None

    def add(self, assign: Assign) -> Outcome:
        """Queue the choices of a request. One that its replayed ids end already gets an empty run that says how."""
        assert assign.request not in self._held, f"{assign.request} is held"
        assert not (reason := refusal(assign, self._limits)), reason
        hashes = chain(root_hash(assign.cache_salt), assign.prompt, self._limits.block_tokens)
        request = self._held[assign.request] = Request(assign, next(self._arrivals), hashes)
        self.counters["replayed_requests"] += any(progress.generated for progress in assign.choices)
        request.choices = {progress.choice: Sequence.of(request, progress) for progress in assign.choices}
        outcome = Outcome()
        for sequence in list(request.choices.values()):
            enqueue(self._waiting, sequence)
            self._speculator.begin(sequence)
            if sequence.generated and (finish := sequence.finish()):
                run = TokenRun(assign.request, sequence.choice, assign.attempt, sequence.generated, (), finish=finish)
                outcome.runs.append(run)
                self._end(sequence, outcome)
        return outcome

    @property
    def waiting_tokens(self) -> int:
        """Given, and not planned yet."""
        return sum(max(sequence.given - sequence.planned, 0) for sequence in (*self._waiting, *self._running))

    def cached_tokens(self, assign: Assign) -> int:
        """Of a prompt, found in the cache now."""
        return self._cache.known(chain(root_hash(assign.cache_salt), assign.prompt, self._limits.block_tokens))

    def stand_by(self, fence: Fence) -> StepPlan:
        """A step without anything to compute, because others have."""
        return self._give_out(Draft(self._step + 1, 0), fence)

    def schedule(self, fence: Fence) -> StepPlan | None:
        """The next step, or None if there is nothing to compute before another result."""
        if self._speculator.holds():
            return None
        draft = Draft(self._step + 1, self._limits.max_step_tokens, self._limits.predicts)
        prefilling = self._decode_next(draft, draft.step - self._limits.depth)
        self._cohorts.pace(draft, self._running, prefilling + self._waiting[: len(self._free_slots)])
        self._prefill(draft, prefilling)
        if not draft.rows:  # whatever could run reads ids that are still on their way
            self._decode_next(draft, draft.step)
        return self._give_out(draft, fence) if draft.rows else None

    def commit(self, result: StepResult) -> Outcome:
        """What the oldest plan brought, without the ids of sequences that ended since."""
        flight = self._in_flight.popleft()
        assert result.step == flight.step, f"results come in order: expected step {flight.step}, got {result.step}"
        self.counters["steps"] += 1
        self._cohorts.observe(flight.work, result.slot_s)
        for request, scores in zip(flight.scored, result.scores, strict=True):
            request.scores += scores
        outcome = Outcome()
        for row, why in result.faults:
            self._fail(flight.sampled[row], why, outcome)
        for sequence in flight.spoilt(result):
            self._spoil(sequence, outcome)
        for drawn in self._speculator.drawn(flight, result):
            self._accept(*drawn, outcome)
        return outcome

    def release(self, request: str, choice: int | None = None) -> Outcome:
        """Let go of a choice of a request, or of all that it holds, whatever they are doing."""
        outcome = Outcome()
        choices = self._held[request].choices
        for sequence in [choices[each] for each in choices if choice is None or each == choice]:
            self._end(sequence, outcome)
        return outcome

    def check_integrity(self) -> None:
        """Slots and blocks are all free or held by those that run, and every sequence is where its state says."""
        sequences = [choice for request in self._held.values() for choice in request.choices.values()]
        check_queue(self._waiting, State.WAITING, sequences)
        check_queue(self._running, State.RUNNING, sequences)
        check_slots(self._free_slots, sequences, self._limits.max_running)
        self._cohorts.check_integrity(self._running)
        self._cache.check_integrity(sequences)

    def _decode_next(self, draft: Draft, drawn_by: int) -> list[Sequence]:
        """The cohort whose turn it is, or the next that can, but nobody whose last id is drawn after step drawn_by:
        it could not have come back, and the pipeline would wait for it. Returns those that prefill.
        """
        for cohort in self._cohorts.turns():
            prefilling = self._decode(draft, cohort, drawn_by)
            if draft.rows:
                self._cohorts.took(cohort)
                break
        return prefilling

    def _decode(self, draft: Draft, cohort: int, drawn_by: int) -> list[Sequence]:
        """One row for each sequence of the cohort that generates and can; returns those that prefill."""
        prefilling: list[Sequence] = []
        for sequence in self._running:  # the last ones may leave meanwhile
            if sequence.planned < sequence.given:
                prefilling.append(sequence)
                continue
            if sequence.cohort != cohort or sequence.drawn_step > drawn_by or self._speculator.awaits_id(sequence):
                continue
            full = sequence.planned == len(sequence.blocks) * self._limits.block_tokens
            if not draft.budget or (full and not self._grow(draft, sequence)):
                break
            self._speculator.add_rows(draft, sequence)
        self.counters["decode_rows"] += len(draft.rows) - len(draft.drafted)
        return prefilling

    def _grow(self, draft: Draft, sequence: Sequence) -> bool:
        """A block for the sequence's next position, preempting if none is free. False: it was the last itself."""
        while not self._cache.free_blocks:
            last = self._running[-1]
            assert len(self._running) > 1, f"{last.request.assign.request} does not fit alone"
            self._preempt(last)
            if last is sequence:
                return False
        draft.add_block(sequence, self._cache.grow(sequence))
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """It is to be prefilled again up to its last id, once that is committed: ids in flight are drawn already."""
        sequence.given = max(sequence.given, sequence.planned + 1)
        self._give_back(sequence, State.WAITING)
        enqueue(self._waiting, sequence)
        self.counters["preemptions"] += 1

    def _prefill(self, draft: Draft, prefilling: list[Sequence]) -> None:
        """Chunks of prompts with what is left of the budget. Who has to wait for slot or blocks is not overtaken."""
        admitting = True
        for sequence in heapq.merge(prefilling, tuple(self._waiting), key=ORDER):
            if not draft.budget:
                break
            if sequence.request.unscored and not draft.scored_budget:
                continue
            if sequence.state is State.WAITING:
                if sequence.request.computing_step == draft.step:
                    continue  # the prompt that it shares can be found from the next step on
                if not (admitting := admitting and self._admit(draft, sequence)):
                    continue
            if not draft.room(sequence):
                break
            self._add_chunk(draft, sequence)

    def _admit(self, draft: Draft, sequence: Sequence) -> bool:
        """Give it a slot and blocks for what is given, unless ids of it are in flight or others would soon lack blocks:
        one is left for each that runs, and lasts for as many steps as a block has tokens."""
        waits = not self._free_slots or len(sequence.ids) < sequence.given
        if waits or not self._cache.begin(sequence, spare=len(self._running)):
            return False
        dequeue(self._waiting, sequence)
        enqueue(self._running, sequence)
        sequence.state, sequence.due_at, sequence.slot = State.RUNNING, 0, self._free_slots.pop()
        draft.admit(sequence)
        counters.count_beginning(self.counters, sequence)
        return True

    def _add_chunk(self, draft: Draft, sequence: Sequence) -> None:
        """The next positions of what is given; while they fill blocks of the prompt, other choices wait for these."""
        row = draft.add_chunk(sequence)
        if row.sampled:
            self._cohorts.join(sequence)
        if row.first // self._limits.block_tokens < (sequence.prompt_tokens - 1) // self._limits.block_tokens:
            sequence.request.computing_step = draft.step
        counters.count_chunk(self.counters, sequence, row)

    def _give_out(self, draft: Draft, fence: Fence) -> StepPlan:
        self._step = draft.step
        self._in_flight.append(draft.flight())
        for sequence in draft.prefilled:
            self._cache.keep(sequence)
        for sequence in draft.drawn:
            self._give_back(sequence, State.DRAWN)
        return draft.plan(fence)

    def _give_back(self, sequence: Sequence, state: State) -> None:
        """Slot and blocks of a running sequence, to those that the next plan is for."""
        dequeue(self._running, sequence)
        self._cohorts.leave(sequence)
        self._cache.end(sequence)
        self._free_slots.append(sequence.slot)
        sequence.slot, sequence.state = NO_SLOT, state

    def _accept(self, sequence: Sequence, token_id: int, logprob: Logprob | None, outcome: Outcome) -> None:
        """One new id of a choice, told as a run; the choice may end with it."""
        assign, ids = sequence.assign, sequence.ids
        first = len(ids) - sequence.prompt_tokens
        ids.append(token_id)
        due = len(ids) >= sequence.due_at or token_id in sequence.stop_ids
        finish = self._attend(sequence, outcome) if due else None
        told = (token_id,), () if logprob is None else (logprob,)
        outcome.runs.append(TokenRun(assign.request, sequence.choice, assign.attempt, first, *told, finish))
        if finish:
            self._end(sequence, outcome)

    def _attend(self, sequence: Sequence, outcome: Outcome) -> Finish | None:
        """What few ids bring: the first of a prompt, one that fills a block, one that may be the last."""
        if not sequence.request.prompted:
            outcome.prompted.append(sequence.request.tell_prompted())
        self._cache.keep(sequence)
        sequence.due_at = min((sequence.kept + 1) * self._limits.block_tokens, sequence.end)
        return sequence.finish()

    def _fail(self, sequence: Sequence, why: str, outcome: Outcome) -> None:
        """No id can be drawn for it: its request cannot be answered, the other choices neither."""
        if sequence.state is not State.ENDED:
            assign = sequence.assign
            self.release(assign.request)
            outcome.released.append(Released(assign.request, assign.attempt, why, "CONSTRAINT_FAILED"))

    def _spoil(self, sequence: Sequence, outcome: Outcome) -> None:
        """Its scores are not finite, nor may be what it has left in the cache."""
        if sequence.state is not State.ENDED:
            self._cache.forget(sequence.request.choices.values())
            outcome.released.append(sequence.request.spoilt())
            self.release(sequence.assign.request)

    def _end(self, sequence: Sequence, outcome: Outcome) -> None:
        """Forget a choice, and its request with its last one."""
        if sequence.state is State.RUNNING:
            self._give_back(sequence, State.ENDED)
        elif sequence.state is State.WAITING:
            dequeue(self._waiting, sequence)
        sequence.state = State.ENDED
        request = sequence.request
        del request.choices[sequence.choice]
        if not request.choices:
            del self._held[request.assign.request]
            outcome.released.append(Released(request.assign.request, request.assign.attempt))
