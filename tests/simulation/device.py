"""The fake device of a replica: runs plans in order on paged memory, which it reads and writes through block tables.

A block keeps of each token a key that tells everything before it, as keys and values do. So a block that two requests
share, one that was given away, a row at a wrong place or a token of another attempt shows in every later token.
With `noise`, one prefix has several valid next tokens, as on a device whose kernels differ between prefill and decode:
the same request run twice gives different answers, each consistent in itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

from echelon.internal.link import Logprob
from tests.simulation.model import BREAKS, BREAKS_AT, ROOT_KEY, VARIANTS, base_of, logprob_of, next_key
from worker.plan import NO_ID, Admit, Row, StepPlan, StepResult

NOTHING = -1  # where nobody wrote


@dataclass(slots=True)
class Slot:
    """State of a choice as ranks keep it: its block table, and its ids by position, the last one sampled."""

    admit: Admit
    table: dict[int, int] = field(default_factory=dict)
    ids: dict[int, int] = field(default_factory=dict)


class Device:
    """Runs plans in order, on paged memory."""

    def __init__(self, block_tokens: int, noise: Random | None) -> None:
        self._block_tokens = block_tokens
        self._noise = noise
        self._memory: dict[tuple[int, int], int] = {}
        self._slots: dict[int, Slot] = {}

    def run(self, plan: StepPlan) -> StepResult:
        for admit in plan.admits:
            self._slots[admit.slot] = Slot(admit)
        for slot, index, block in plan.blocks:
            self._slots[slot].table[index] = block
        for told in plan.told:
            self._slots[told.slot].ids.update(enumerate(told.ids, told.first))
        ids: list[int] = []
        logprobs: list[Logprob | None] = []
        scores: list[tuple[Logprob, ...]] = []
        faults: list[tuple[int, str]] = []
        drawn: list[tuple[Slot, int, int]] = []  # to stand at these positions when all rows, drafts' too, are computed
        for row in plan.rows:
            state = self._slots[row.slot]
            self._compute(state, row)
            if row.scored is not None:
                scores.append(self._score(state, row, row.scored))
            if row.sampled and self._breaks(state.admit, row.first + row.tokens):
                faults.append((len(ids), "no token is allowed"))
                ids.append(NO_ID)
                logprobs.append(None)
            elif row.sampled:
                keys, token_id = self._sample(state, row.first + row.tokens)
                ids.append(token_id)
                drawn.append((state, row.first + row.tokens, token_id))
                logprobs.append(None if row.logprobs is None else logprob_of(keys, token_id, row.logprobs))
        for state, position, token_id in drawn:
            state.ids[position] = token_id
        return StepResult(plan.step, tuple(ids), tuple(logprobs), tuple(scores), tuple(faults))

    def _breaks(self, admit: Admit, position: int) -> bool:
        return admit.sampling.grammar == BREAKS and position - admit.prompt_tokens >= BREAKS_AT

    def _compute(self, state: Slot, row: Row) -> None:
        given = (state.ids.get(row.first, NOTHING),) if row.given is None else row.given
        assert row.tokens == len(given) > 0, row
        key = self._key(state, row.first - 1) if row.first else ROOT_KEY
        for position, token_id in enumerate(given, row.first):
            state.ids[position] = token_id
            key = self._memory[self._place(state, position)] = next_key(key, token_id)

    def _score(self, state: Slot, row: Row, alternatives: int) -> tuple[Logprob, ...]:
        """Of the prompt's tokens that follow those of the row."""
        assert row.given is not None, "a decode row scores no prompt"
        following = row.given[1:] if row.next_id is None else (*row.given[1:], row.next_id)
        keys = self._keys(state, row.first + row.tokens)
        return tuple(
            logprob_of(keys[:position], token_id, alternatives)
            for position, token_id in enumerate(following, row.first + 1)
        )

    def _sample(self, state: Slot, end: int) -> tuple[list[int], int]:
        """The id of position `end`, and the keys of those before it."""
        keys = self._keys(state, end)
        ids = [state.ids.get(position, NOTHING) for position in range(end)]
        admit = state.admit
        base = base_of(keys, ids, admit.prompt_tokens, admit.sampling.seed, admit.choice)
        variant = self._noise.randrange(VARIANTS) if self._noise else 0
        return keys, base * VARIANTS + variant

    def _keys(self, state: Slot, end: int) -> list[int]:
        """Those of the positions before `end`, through the block table."""
        memory, table, size = self._memory, state.table, self._block_tokens
        return [memory.get((table.get(at // size, NOTHING), at % size), NOTHING) for at in range(end)]

    def _key(self, state: Slot, position: int) -> int:
        return self._memory.get(self._place(state, position), NOTHING)

    def _place(self, state: Slot, position: int) -> tuple[int, int]:
        return state.table.get(position // self._block_tokens, NOTHING), position % self._block_tokens
