"""Speculator: which rows of a step go on from drafts, and which of those turn out to be rows of the answer.

Lives in the leader, beside the scheduler, without torch, clock or I/O. Drafts take what others leave of a step's rows
and of the free blocks. What is guessed, and whether that pays, is each choice's own matter (`speculation.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from echelon.internal.link import Logprob
from worker.draft import Draft, Flight
from worker.limits import EngineLimits, decode_places
from worker.plan import StepResult
from worker.prefix_cache import PrefixCache
from worker.sequence import Sequence, State
from worker.speculation import Drafter, NgramDrafter, Reading, Speculation, rejected


class Speculator:
    """Of one scheduler; running and counters are its. new_drafter: of each choice, if not one by n-grams."""

    def __init__(
        self,
        limits: EngineLimits,
        cache: PrefixCache,
        running: list[Sequence],
        counters: dict[str, int],
        new_drafter: Callable[[], Drafter] | None = None,
    ) -> None:
        self._most, self._predicts = limits.speculation_tokens, limits.predicts
        self._places = min(decode_places(limits.max_running, limits.speculation_tokens), limits.max_step_tokens)
        self._block_tokens, self._depth = limits.block_tokens, limits.depth
        self._together = limits.speculation_tokens > 0 and limits.depth == limits.data == 1
        self._cache = cache
        self._running = running
        self._counted = 0, 1  # a step, and how many choices may have drafts in it
        self._counters = counters
        self._reading = Reading()
        self._new_drafter = new_drafter or partial(NgramDrafter, self._reading)

    def begin(self, sequence: Sequence) -> None:
        """A choice is new. What a constraint allows behind an id is known when that is drawn, so it gets no drafts."""
        if self._most and not sequence.constrained:
            sequence.speculation = Speculation(None if self._predicts else self._new_drafter())

    def holds(self) -> bool:
        """Whether half of the choices or more wait for ids in flight: all go on together, with the result.

        A step for the others would take about as long as one for all, and who waits would wait for it too. Of several
        stages or data ranks none is left without a step for that.
        """
        waiting = sum(map(self.awaits_id, self._running)) if self._together else 0
        return waiting > 0 and 2 * waiting >= len(self._running)

    def awaits_id(self, sequence: Sequence) -> bool:
        """Whether a choice's last id is in flight, and what follows depends on it: by a constraint, or by drafts, for
        which there is a place beside one for each that runs."""
        if sequence.planned < len(sequence.ids):
            return False
        speculation = sequence.speculation
        return sequence.constrained or (
            speculation is not None and speculation.waits(sequence.ids, room=len(self._running) < self._places)
        )

    def add_rows(self, draft: Draft, sequence: Sequence) -> None:
        """A choice's decode row, and drafts behind it if all ids before them are known.

        Each choice that runs may need a row and a block; the other rows are shared by those that may have drafts.
        """
        without = (draft.step - sequence.drawn_step - 1) // self._depth
        draft.add_decode_row(sequence)
        speculation, first, running = sequence.speculation, sequence.planned, len(self._running)
        if speculation is None:
            return
        if first > len(sequence.ids):
            speculation.ahead()
            return
        room = (len(sequence.blocks) + max(self._cache.free_blocks - running, 0)) * self._block_tokens
        places = min(self._places - len(draft.drafted), draft.budget) - running
        share = max((self._places - running) // self._keen(draft.step), 1)
        most = min(self._most, share, places, sequence.end - 1 - first, room - first)
        drafts = speculation.guess(sequence.ids, most, without, sequence.stop_ids)
        if drafts:
            while first + len(drafts) > len(sequence.blocks) * self._block_tokens:
                draft.add_block(sequence, self._cache.grow(sequence))
            draft.add_drafts(sequence, drafts)
            self._counters["drafted_tokens"] += len(drafts)

    def _keen(self, step: int) -> int:
        """How many choices may have drafts in a step: found when the first of them asks, which is one."""
        if self._counted[0] != step:
            later = (each for each in self._running if each.planned + 1 == len(each.ids))  # and it has moved on already
            keen = sum(each.speculation is not None and each.speculation.keen(each.ids) for each in later)
            self._counted = step, 1 + keen
        return self._counted[1]

    def drawn(self, flight: Flight, result: StepResult) -> Iterator[tuple[Sequence, int, Logprob | None]]:
        """What the rows of a step have drawn for choices that go on; each is to be accepted before the next is asked
        for. A row behind a draft counts if the row before it has drawn just that."""
        self._reading.renew()
        wrong = rejected(flight.drafted, result.ids)
        for row, drawn in enumerate(zip(flight.sampled, result.ids, result.logprobs, strict=True)):
            sequence = drawn[0]
            if row in wrong or sequence.state is State.ENDED:
                continue
            if row in flight.drafted:
                sequence.accept_draft()
                self._counters["accepted_tokens"] += 1
            if result.drafts and sequence.speculation is not None:
                sequence.speculation.predict(len(sequence.ids) + 1, result.drafts[row])
            yield drawn
        for sequence in flight.verified:
            if sequence.speculation is not None:
                sequence.speculation.settle()
            if sequence.state is State.RUNNING:
                self._cache.shrink(sequence)
