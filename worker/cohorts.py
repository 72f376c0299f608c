"""Cohorts: which sequences decode together in a pipeline's slots, and how much of prompts goes beside them.

Lives in the leader, without torch, clock or I/O. Cohorts take turns, as many as steps pass through the pipeline at
once; slots of equal time leave no bubble, so their costs are fitted to what slots took. One stage has one cohort, and
its steps are filled to the token budget. It knows sequences, and nothing of requests and blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from parallel.cohorts import balance_cohorts
from parallel.slot_cost import ChunkLimits, SlotCostModel, SlotWork, decode_work, slot_target_s
from worker.draft import Draft, Slot
from worker.limits import EngineLimits
from worker.sequence import NO_COHORT, State
from worker.sequence import Sequence as Choice

GRANULE_TOKENS = 16


class Cohorts:
    """Of one replica."""

    def __init__(self, limits: EngineLimits) -> None:
        self._sizes = [0] * limits.depth
        self._turn = 0
        self._model = SlotCostModel()
        self._chunks = ChunkLimits(limits.max_step_tokens, min(GRANULE_TOKENS, limits.max_step_tokens))

    @property
    def several(self) -> bool:
        """Whether there is anything to balance."""
        return len(self._sizes) > 1

    def join(self, sequence: Choice) -> None:
        """It decodes from now on, in the smallest cohort."""
        assert sequence.cohort == NO_COHORT, f"in cohort {sequence.cohort} already"
        sequence.cohort = self._sizes.index(min(self._sizes))
        self._sizes[sequence.cohort] += 1

    def leave(self, sequence: Choice) -> None:
        if sequence.cohort != NO_COHORT:
            self._sizes[sequence.cohort] -= 1
            sequence.cohort = NO_COHORT

    def turns(self) -> Iterator[int]:
        """Cohorts in the order of their turns, the empty ones left out, but one of them if all are."""
        count = len(self._sizes)
        order = [(self._turn + ahead) % count for ahead in range(count)]
        return iter([cohort for cohort in order if self._sizes[cohort]] or order[:1])

    def took(self, cohort: int) -> None:
        """It had its turn. The last that is not empty ends the round, or empty ones would never be filled again."""
        self._turn = cohort + 1 if any(self._sizes[cohort + 1 :]) else 0

    def balance(self, running: Iterable[Choice]) -> None:
        """At the end of a round: those that decode are spread such that the cohorts cost alike."""
        if self._turn:
            return
        decoding = [sequence for sequence in running if sequence.cohort != NO_COHORT]
        idle_s = self._model.predict(SlotWork())
        costs = [self._model.predict(_row(sequence)) - idle_s or 1e-9 for sequence in decoding]
        current = [sequence.cohort for sequence in decoding]
        for sequence, cohort in zip(decoding, balance_cohorts(costs, current, len(self._sizes)), strict=True):
            self._sizes[sequence.cohort] -= 1
            self._sizes[cohort] += 1
            sequence.cohort = cohort

    def pace(self, draft: Draft, running: Sequence[Choice], prompts: Sequence[Choice]) -> None:
        """The step is one slot of the pipeline: these prompts get the time in it that makes the next ones alike. Where
        there is one cohort they get what is left."""
        if not self.several:
            return
        self.balance(running)
        draft.work = decode_work(row.first + 1 for row in draft.rows)
        if not prompts:
            return
        works = [SlotWork()] * len(self._sizes)
        for sequence in running:
            if sequence.cohort != NO_COHORT:
                works[sequence.cohort] += _row(sequence)
        waiting = sum(sequence.given - sequence.planned for sequence in prompts)
        target_s = slot_target_s(self._model, works, prompts[0].planned, waiting, self._chunks)
        draft.slot = Slot(self._model, target_s, self._chunks)

    def observe(self, work: SlotWork, slot_s: float) -> None:
        """What a step took, if that was measured; one that stood by while others computed tells nothing."""
        if self.several and slot_s > 0 and work.tokens:
            self._model = self._model.observe(work, slot_s)

    def check_integrity(self, running: Iterable[Choice]) -> None:
        """Each is where its members say."""
        found = [0] * len(self._sizes)
        for sequence in running:
            if sequence.cohort != NO_COHORT:
                assert sequence.state is State.RUNNING
                found[sequence.cohort] += 1
        assert found == self._sizes, f"cohorts of {found}, counted {self._sizes}"


def _row(sequence: Choice) -> SlotWork:
    return decode_work((sequence.planned + 1,))
