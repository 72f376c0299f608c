"""Constraints of the slots: every rank follows each answer with a matcher of its own, and fills masks for its rows.

One thread beside the runner's builds matchers, takes ids and fills masks, while the forward pass is launched and runs;
it alone touches matchers. They read every id after the prompt, given or drawn, so they stand right after a replay. A
matcher that breaks fails its row, not the step. Knows plans and ids, no torch and no kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Protocol

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from llguidance.numpy import fill_next_token_bitmask_par

from models.constraints import error_of
from worker.plan import Int32Array, PlanTables

BROKEN = "the constraint cannot be followed further: its grammar exceeds the limits of a matcher"
KEPT_GRAMMARS = 64  # the same few are asked for again and again, and by all choices of a request


class Sampled(Protocol):
    """A step that was launched."""

    def id_of(self, row: int) -> int:
        """The id of its sampled row; waits for the device."""
        ...


class Constraint:
    """The constraint of a slot's answer. error: why it broke here, if it has. drawn: step and row of its last id."""

    def __init__(self, grammar: str, prompt_tokens: int) -> None:
        self.grammar = grammar
        self.error = ""
        self.drawn: tuple[Sampled, int] | None = None
        self.matcher: LLMatcher | None = None
        self._position = prompt_tokens  # of the next id to take

    @property
    def reason(self) -> str:
        """Why it broke, here or on the rank that filled its mask."""
        return self.error or BROKEN

    def take(self, first: int, ids: Sequence[int], matcher: LLMatcher) -> None:
        """Ids of positions first and after; those of the prompt, and those taken before, change nothing."""
        if any(token < 0 for token in ids):  # the rank that filled its mask found it broken, or its scores are
            self.error = self.reason
        if self.error:
            return
        assert first <= self._position or not ids, f"ids of position {first} on, expected {self._position}"
        fresh = list(ids[self._position - first :])
        self._position += len(fresh)
        if fresh and not matcher.consume_tokens(fresh):
            self.error = f"the answer so far does not follow its constraint: {error_of(matcher)}"


@dataclass(frozen=True, slots=True)
class Masks:
    """bits [rows, words] int32: bit t % 32 of word t // 32 says whether token t may come next. failed: rows without."""

    bits: Int32Array
    failed: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Sequel:
    """Ids of an answer from position first on; drawn: the step, and its row, whose id is the one at that position."""

    constraint: Constraint
    first: int
    given: tuple[int, ...] = ()
    drawn: tuple[Sampled, int] | None = None

    def ids(self) -> tuple[int, ...]:
        if self.drawn is None:
            return self.given
        step, row = self.drawn
        return (step.id_of(row),)


class Matchers:
    """The constraints of one rank's slots. make_tokenizer is called once, when the first constraint is admitted."""

    def __init__(self, make_tokenizer: Callable[[], LLTokenizer], threads: int) -> None:
        self._make_tokenizer = make_tokenizer
        self._threads = threads
        self._worker = ThreadPoolExecutor(1, "matchers")
        self._slots: dict[int, Constraint] = {}
        self._built = lru_cache(KEPT_GRAMMARS)(self._build)  # a copy costs a tenth of it

    def close(self) -> None:
        """Begin nothing more; the thread ends behind what has begun."""
        self._worker.shutdown(wait=False)

    def begin(self, tables: PlanTables, slots: Sequence[int]) -> Future[Masks] | None:
        """Follow a plan, and fill a mask for the next id of each of these slots; None if no constraint is touched."""
        self._admit(tables)
        sequels = self._sequels(tables) if self._slots else []
        if not sequels:
            return None
        return self._worker.submit(self._follow, sequels, [self._slots[slot] for slot in slots])

    def of(self, slots: Sequence[int]) -> Mapping[int, Constraint]:
        """Constraints of these slots, by their place among them."""
        if not self._slots:
            return {}
        return {place: self._slots[slot] for place, slot in enumerate(slots) if slot in self._slots}

    def _admit(self, tables: PlanTables) -> None:
        if self._slots:
            for slot in tables.admits["slot"].tolist():
                self._slots.pop(slot, None)
        grammars = {rules.slot: rules.grammar for rules in tables.rules if rules.grammar}
        if grammars:
            for slot, prompt_tokens in tables.admits[["slot", "prompt_tokens"]].tolist():
                if slot in grammars:
                    self._slots[slot] = Constraint(grammars[slot], prompt_tokens)

    def _sequels(self, tables: PlanTables) -> list[_Sequel]:
        """What this plan adds to constrained slots. None is planned ahead, so drawn ids are known or on their way."""
        sequels, offset = [], 0
        for slot, first, tokens in tables.told.tolist():
            if (constraint := self._slots.get(slot)) is not None:
                told = tables.told_ids[offset : offset + tokens]
                sequels.append(_Sequel(constraint, first, tuple(told.tolist())))
            offset += tokens
        for slot, first, tokens, offset, _ in tables.rows.tolist():
            if (constraint := self._slots.get(slot)) is not None:
                given = tables.token_ids[offset : offset + tokens] if offset >= 0 else tables.token_ids[:0]
                drawn = constraint.drawn if offset < 0 else None
                sequels.append(_Sequel(constraint, first, tuple(given.tolist()), drawn))
        return sequels

    # In the worker's thread.

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        return self._make_tokenizer()

    @cached_property
    def _executor(self) -> LLExecutor:
        return LLExecutor(self._threads)

    def _matcher(self, constraint: Constraint) -> LLMatcher:
        if constraint.matcher is None:
            constraint.matcher = self._built(constraint.grammar).deep_copy()
        return constraint.matcher

    def _build(self, grammar: str) -> LLMatcher:
        return LLMatcher(self._tokenizer, grammar, log_level=0)

    def _follow(self, sequels: Sequence[_Sequel], masked: Sequence[Constraint]) -> Masks:
        for sequel in sequels:
            sequel.constraint.take(sequel.first, sequel.ids(), self._matcher(sequel.constraint))
        bits = np.empty((len(masked), -(-self._tokenizer.vocab_size // 32)), dtype=np.int32)
        matchers = [(self._matcher(constraint), row) for row, constraint in enumerate(masked)]
        if matchers:
            fill_next_token_bitmask_par(self._executor, matchers, bits)
        for constraint, (matcher, _) in zip(masked, matchers, strict=True):
            if matcher.is_error() and not constraint.error:
                constraint.error = f"the constraint cannot be followed further: {error_of(matcher)}"
        return Masks(bits, tuple(row for row, constraint in enumerate(masked) if constraint.error))
