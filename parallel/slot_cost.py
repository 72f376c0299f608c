"""The cost of a slot: a model fitted online to measured steps, and chunks of prompts cut so that slots last alike.

Pure and torch-free, in the leader. A slot is one micro-batch on one stage: a decode cohort, and a chunk of prefill
beside it. Slots of equal time leave no bubble; a fixed number of tokens does not give them, since attention costs more
the further a prompt has come. Until steps were measured a slot costs its tokens, and chunks fill the token budget.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

FORGETTING = 0.98  # per observation: the fit follows about the last 50 slots
SWEEPS = 2  # over the coefficients at each observation; they go on from where they stood
TARGET_HALVINGS = 12  # of the range of slot times: a four-thousandth of it is finer than any chunk


@dataclass(frozen=True, slots=True)
class SlotWork:
    """What one micro-batch computes: what its time depends on.

    tokens: through the linear layers. rows: sequences. context_tokens: keys and values read by decode rows, which is
    bound by memory. pairs: of a query and a key in chunks, which is bound by arithmetic.
    """

    tokens: int = 0
    rows: int = 0
    context_tokens: int = 0
    pairs: int = 0

    def __add__(self, other: SlotWork) -> SlotWork:
        return SlotWork(
            self.tokens + other.tokens,
            self.rows + other.rows,
            self.context_tokens + other.context_tokens,
            self.pairs + other.pairs,
        )


def decode_work(contexts: Iterable[int]) -> SlotWork:
    """One token for each sequence, contexts[i] tokens long."""
    lengths = tuple(contexts)
    return SlotWork(tokens=len(lengths), rows=len(lengths), context_tokens=sum(lengths))


def chunk_work(first: int, tokens: int) -> SlotWork:
    """Positions first .. first + tokens - 1 of a prompt; each sees those before it and itself."""
    return SlotWork(tokens=tokens, rows=1, pairs=tokens * first + tokens * (tokens + 1) // 2)


def _features(work: SlotWork) -> tuple[float, ...]:
    """tokens, 1, rows, context_tokens, pairs; tokens first, so that they explain what little is known at the start."""
    return (float(work.tokens), 1.0, float(work.rows), float(work.context_tokens), float(work.pairs))


@dataclass(frozen=True, slots=True)
class SlotCostModel:
    """seconds = coefficients . features, all >= 0; one model for each stage, or for the slowest.

    Least squares of the relative error, predicted / measured - 1, with forgetting: a slot that took ten times too long,
    because something was compiled or the host was busy, weighs a hundredth. moments: sums over observations of
    f_i f_j / s^2 [5][5]; targets: of f_i / s [5]. Coefficients that recent slots say nothing about keep their value.
    """

    coefficients: tuple[float, ...] = (1.0, 0.0, 0.0, 0.0, 0.0)
    moments: tuple[tuple[float, ...], ...] = ((0.0,) * 5,) * 5
    targets: tuple[float, ...] = (0.0,) * 5
    observations: int = 0

    def predict(self, work: SlotWork) -> float:
        """Seconds; before the first observation in a unit in which a token costs 1."""
        return sum(c * f for c, f in zip(self.coefficients, _features(work), strict=True))

    def observe(self, work: SlotWork, seconds: float) -> SlotCostModel:
        """The model after a slot was measured: coordinate descent on the normal equations, from where it stood."""
        assert seconds > 0 and math.isfinite(seconds), f"a slot took {seconds} s"
        scaled = [feature / seconds for feature in _features(work)]
        moments = tuple(
            tuple(FORGETTING * moment + own * other for moment, other in zip(row, scaled, strict=True))
            for row, own in zip(self.moments, scaled, strict=True)
        )
        targets = tuple(FORGETTING * target + own for target, own in zip(self.targets, scaled, strict=True))
        coefficients = list(self.coefficients)
        for _ in range(SWEEPS):
            for index, row in enumerate(moments):
                if row[index] > 0:
                    fitted = sum(moment * c for moment, c in zip(row, coefficients, strict=True))
                    coefficients[index] = max(0.0, coefficients[index] + (targets[index] - fitted) / row[index])
        return replace(
            self,
            coefficients=tuple(coefficients),
            moments=moments,
            targets=targets,
            observations=self.observations + 1,
        )

    def tokens_within(self, beside: SlotWork, first: int, target_s: float) -> float:
        """How many tokens of a prompt, from position first, fit beside other work in a slot of target_s."""
        return self.tokens_in(target_s - self.predict(beside + SlotWork(rows=1)), first)

    def tokens_in(self, spare_s: float, first: int) -> float:
        """How many tokens of a prompt, from position first, are computed in what other work leaves of a slot.

        a n + q (n first + n (n + 1) / 2) = spare_s, solved for n; infinite if tokens cost nothing, 0 if none is left.
        """
        per_token, _, _, _, per_pair = self.coefficients
        linear = per_token + per_pair * (first + 0.5)
        if spare_s <= 0:
            return 0.0
        if linear <= 0:
            return math.inf
        return 2 * spare_s / (linear + math.sqrt(linear**2 + 2 * per_pair * spare_s))


@dataclass(frozen=True, slots=True)
class ChunkLimits:
    """budget_tokens: computed in one slot at most. granule_tokens: chunks are multiples of it, and not shorter."""

    budget_tokens: int
    granule_tokens: int = 16

    def __post_init__(self) -> None:
        assert 1 <= self.granule_tokens <= self.budget_tokens, f"granule and budget of {self}"


def chunk_tokens(
    model: SlotCostModel, beside: SlotWork, first: int, waiting: int, target_s: float, limits: ChunkLimits
) -> int:
    """How many of a prompt's `waiting` tokens, from position first, go into a slot beside its decode rows.

    As many as fit into target_s, in whole granules unless the prompt or the budget ends; at least one granule, so that
    a prompt goes on however heavy the cohort is; never more than the token budget leaves.
    """
    room = min(waiting, limits.budget_tokens - beside.tokens)
    fitting = model.tokens_within(beside, first, target_s)
    if fitting >= room:
        return max(0, room)
    granules = max(1, int(fitting) // limits.granule_tokens)
    return max(0, min(room, granules * limits.granule_tokens))


def slot_target_s(
    model: SlotCostModel, cohorts: Sequence[SlotWork], first: int, waiting: int, limits: ChunkLimits
) -> float:
    """The time that all slots of the next round should take, for `waiting` prompt tokens, the first at position first.

    1. No slot is shorter than the heaviest cohort: up to there prefill costs the round nothing.
    2. No slot is longer than that, or than a whole budget of a prompt's first tokens, if that is longer.
    3. Between the two, the shortest time in which the cohorts' slots take all that waits: a burst that is smaller than
       one budget is spread over the stages instead of filling one slot and leaving the others empty.
    """
    shortest = max((model.predict(cohort) for cohort in cohorts), default=0.0)
    longest = max(shortest, model.predict(chunk_work(0, limits.budget_tokens)))
    rooms = [limits.budget_tokens - cohort.tokens for cohort in cohorts]
    others_s = [model.predict(cohort + SlotWork(rows=1)) for cohort in cohorts]

    def taken(target_s: float) -> float:
        fitting = [model.tokens_in(target_s - other_s, first) for other_s in others_s]
        return sum(max(0.0, min(room, fit)) for room, fit in zip(rooms, fitting, strict=True))

    if taken(shortest) >= waiting:
        return shortest
    for _ in range(TARGET_HALVINGS):
        middle = (shortest + longest) / 2
        shortest, longest = (shortest, middle) if taken(middle) >= waiting else (middle, longest)
    return longest
