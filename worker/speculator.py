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
    """Of one scheduler; counters are its. new_drafter: of each choice, if not one by n-grams."""

    def __init__(
        self,
        limits: EngineLimits,
        cache: PrefixCache,
        counters: dict[str, int],
        new_drafter: Callable[[], Drafter] | None = None,
    ) -> None:
        self._most = limits.speculation_tokens
        self._places = min(decode_places(limits.max_running, limits.speculation_tokens), limits.max_step_tokens)
        self._block_tokens, self._depth = limits.block_tokens, limits.depth
        self._cache = cache
        self._counters = counters
        self._reading = Reading()
        self._new_drafter = new_drafter or partial(NgramDrafter, self._reading)

    def begin(self, sequence: Sequence) -> None:
        """A choice is new. What a constraint allows behind an id is known when that is drawn, so it gets no drafts."""
        if self._most and not sequence.constrained:
            sequence.speculation = Speculation(self._new_drafter())

    def awaits_id(self, sequence: Sequence, running: int) -> bool:
        """Whether a choice's last id is in flight, and what follows depends on it: by a constraint, or by drafts, for
        which there is a place beside one for each that runs."""
        if sequence.planned < len(sequence.ids):
            return False
        speculation = sequence.speculation
        return sequence.constrained or (
            speculation is not None and speculation.waits(sequence.ids, room=running < self._places)
        )

    def add_rows(self, draft: Draft, sequence: Sequence, running: int) -> None:
        """A choice's decode row, and drafts behind it if all ids before them are known. running: so many choices, each
        of which may need a row and a block."""
        without = (draft.step - sequence.drawn_step - 1) // self._depth
        draft.add_decode_row(sequence)
        speculation, first = sequence.speculation, sequence.planned
        if speculation is None:
            return
        if first > len(sequence.ids):
            speculation.ahead()
            return
        room = (len(sequence.blocks) + max(self._cache.free_blocks - running, 0)) * self._block_tokens
        places = min(self._places - len(draft.drafted), draft.budget) - running
        most = min(self._most, places, sequence.end - 1 - first, room - first)
        drafts = speculation.guess(sequence.ids, most, without, sequence.stop_ids)
        if drafts:
            while first + len(drafts) > len(sequence.blocks) * self._block_tokens:
                draft.add_block(sequence, self._cache.grow(sequence))
            draft.add_drafts(sequence, drafts)
            self._counters["drafted_tokens"] += len(drafts)

    def drawn(self, flight: Flight, result: StepResult) -> Iterator[tuple[Sequence, int, Logprob | None]]:
        """What the rows of a step have drawn for choices that go on; each is to be accepted before the next is asked
        for. A row behind a draft counts if the row before it has drawn just that."""
        self._reading.renew()
        wrong = rejected(flight.drafted, result.ids)
        for row, drawn in enumerate(zip(flight.sampled, result.ids, result.logprobs, strict=True)):
            if row in wrong or drawn[0].state is State.ENDED:
                continue
            if row in flight.drafted:
                drawn[0].accept_draft()
                self._counters["accepted_tokens"] += 1
            yield drawn
        for sequence in flight.verified:
            if sequence.speculation is not None:
                sequence.speculation.settle()
            if sequence.state is State.RUNNING:
                self._cache.shrink(sequence)
