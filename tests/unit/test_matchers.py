"""Constraints of slots beside the runner: what plans without any cost, and what becomes of a slot taken again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from llguidance import LLTokenizer

from echelon.errors import ConfigError
from echelon.internal.link import Fence, Sampling
from models.constraints import compile_constraint, constraint_tokenizer
from tests.tiny import make_checkpoint
from worker.matchers import Matchers
from worker.plan import Admit, PlanTables, Row, StepPlan, decode, encode

END = 1
DIGITS = compile_constraint("regex", "[0-9]{2}")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> LLTokenizer:
    return constraint_tokenizer(make_checkpoint(tmp_path_factory.mktemp("llama")), 320, (END,))


class Drawn:
    """A step whose ids are known."""

    def __init__(self, *ids: int) -> None:
        self._ids = ids

    def id_of(self, row: int) -> int:
        return self._ids[row]


def tables(rows: Sequence[Row], grammars: dict[int, str] | None = None) -> PlanTables:
    """A plan that admits a slot for each grammar, after prompts of 3 tokens."""
    admits = [
        Admit(slot, 0, 3, Sampling(1.0, 1.0, 0, 9, 0, stop_token_ids=(END,), grammar=grammar))
        for slot, grammar in (grammars or {}).items()
    ]
    return decode(encode(StepPlan(Fence(1, 0, 1), 1, tuple(admits), rows=tuple(rows))))


def prompt(slot: int, *generated: int) -> Row:
    return Row(slot, 0, 3 + len(generated), (5, 6, 7, *generated), True)


def allowed(matchers: Matchers, plan: PlanTables, slots: Sequence[int]) -> list[set[int]]:
    following = matchers.begin(plan, slots)
    assert following is not None
    masks = following.result()
    assert masks.failed == ()
    return [set(np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")).tolist()) for bits in masks.bits]


def test_plans_without_constraints_start_nothing_and_read_no_vocabulary() -> None:
    def never() -> LLTokenizer:
        raise AssertionError("read without need")

    matchers = Matchers(never, threads=1)
    assert matchers.begin(tables([prompt(0)], {0: ""}), []) is None
    assert matchers.begin(tables([Row(0, 3, 1, None, True)]), []) is None
    assert matchers.of([0]) == {}


def test_a_slot_taken_again_without_a_constraint_is_followed_no_more(tokenizer: LLTokenizer) -> None:
    matchers = Matchers(lambda: tokenizer, threads=1)
    allowed(matchers, tables([prompt(2)], {2: DIGITS}), [2])
    assert set(matchers.of([0, 2])) == {1}
    assert matchers.begin(tables([prompt(2)], {2: ""}), []) is None
    assert matchers.of([0, 2]) == {}


def test_answers_to_one_grammar_go_their_own_ways(tokenizer: LLTokenizer) -> None:
    (one,), (letter,) = tokenizer.tokenize_str("1"), tokenizer.tokenize_str("x")
    matchers = Matchers(lambda: tokenizer, threads=1)
    begun = allowed(matchers, tables([prompt(0), prompt(1, one)], {0: DIGITS, 1: DIGITS}), [0, 1])
    assert one in begun[0] and END not in begun[0] and letter not in begun[0]
    step = Drawn(one, one)
    for row, constraint in matchers.of([0, 1]).items():
        constraint.drawn = (step, row)
    went_on = allowed(matchers, tables([Row(0, 3, 1, None, True), Row(1, 4, 1, None, True)]), [0, 1])
    assert one in went_on[0] and END not in went_on[0]
    assert went_on[1] == {END}
    again = allowed(matchers, tables([prompt(1)], {1: DIGITS}), [1])
    assert again[0] == begun[0]


def test_chunks_of_a_prompt_need_no_mask_and_a_replayed_answer_is_taken_once(tokenizer: LLTokenizer) -> None:
    (one,) = tokenizer.tokenize_str("1")
    matchers = Matchers(lambda: tokenizer, threads=1)
    first = matchers.begin(tables([Row(0, 0, 2, (5, 6), False)], {0: DIGITS}), [])
    assert first is not None and first.result().bits.shape[0] == 0
    assert allowed(matchers, tables([Row(0, 2, 2, (7, one), True)]), [0])[0] >= {one}
    assert allowed(matchers, tables([Row(0, 4, 1, (one,), True)]), [0]) == [{END}]


def test_a_directory_that_cannot_be_read_is_told_at_the_first_constraint(tmp_path: Path) -> None:
    matchers = Matchers(lambda: constraint_tokenizer(tmp_path, 320, (END,)), threads=1)
    following = matchers.begin(tables([prompt(0)], {0: DIGITS}), [0])
    assert following is not None
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        following.result()
