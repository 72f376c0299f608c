"""A model without arithmetic: the next token hashes all earlier ones, read back through the block tables.

So a block that two requests share, a row at a wrong place or a token of another attempt shows in every later token.
With `noise`, one prefix has several valid next tokens, as on a device whose kernels differ between prefill and decode:
the same request run twice gives different answers, each consistent in itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from worker.plan import StepPlan, StepResult

BASES = 1024
VARIANTS = 4
STOP_BASES = range(20)
STOP_IDS = tuple(base * VARIANTS + variant for base in STOP_BASES for variant in range(VARIANTS))

# Fragments of UTF-8, characters cut apart among them.
_PIECES = (
    b"a",
    b" the",
    b"\xc3",
    b"\xa9",
    b"\xe2\x82",
    b"\xac",
    b"\xf0\x9f",
    b"\x8e\x89",
    b"\xff",
    b"z ",
    b"\xe2",
    b"\n",
)


def follows(context: Sequence[int], token_id: int) -> bool:
    """Whether the model may have given this token after these."""
    return hash(tuple(context)) % BASES == token_id // VARIANTS


def ends(ids: Sequence[int], max_tokens: int) -> bool:
    """Whether these ids are a whole answer: one end token, at the end, or the limit."""
    return bool(ids) and (ids[-1] in STOP_IDS or len(ids) == max_tokens) and not set(ids[:-1]) & set(STOP_IDS)


def decode(ids: Sequence[int]) -> str:
    return b"".join(_PIECES[token_id % len(_PIECES)] for token_id in ids).decode("utf-8", "replace")


@dataclass(slots=True)
class Slot:
    """Request state as ranks keep it."""

    table: dict[int, int] = field(default_factory=dict)
    last: int = -1


class Device:
    """Runs plans in order, on paged memory."""

    def __init__(self, block_tokens: int, noise: Random | None) -> None:
        self._block_tokens = block_tokens
        self._noise = noise
        self._memory: dict[tuple[int, int], int] = {}
        self._slots: dict[int, Slot] = {}

    def run(self, plan: StepPlan) -> StepResult:
        for admit in plan.admits:
            self._slots[admit.slot] = Slot()
        for slot, index, block in plan.blocks:
            self._slots[slot].table[index] = block
        ids: list[int] = []
        for row in plan.rows:
            state = self._slots[row.slot]
            for position, token_id in enumerate((state.last,) if row.given is None else row.given, row.first):
                self._memory[self._place(state, position)] = token_id
            if row.sampled:
                end = row.first + row.tokens
                context = tuple(self._memory[self._place(state, position)] for position in range(end))
                variant = self._noise.randrange(VARIANTS) if self._noise else 0
                state.last = hash(context) % BASES * VARIANTS + variant
                ids.append(state.last)
        return StepResult(plan.step, tuple(ids), (None,) * len(ids))

    def _place(self, state: Slot, position: int) -> tuple[int, int]:
        return state.table[position // self._block_tokens], position % self._block_tokens
