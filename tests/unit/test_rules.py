"""Rules and sampling together, from plans to ids: every row gets what the plain reference says, in any company."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from echelon.internal.link import Fence, Sampling
from tests.unit.sampling_reference import Scores, choose, ruled
from worker import sampler
from worker.batch import apply_and_build
from worker.plan import Admit, Row, StepPlan, Told, decode, encode
from worker.slots import SlotState

FENCE = Fence(1, 0, 1)
VOCABULARY = 24
CONTEXT = 40
SLOTS = 8
CPU = torch.device("cpu")
DEVICES = [CPU, *([torch.device("cuda")] if torch.cuda.is_available() else [])]
PLAIN = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=99, seed=5)

ids_of = st.integers(0, VOCABULARY - 1)


@dataclass(frozen=True, slots=True)
class Asked:
    """A row: what has been said so far, how its next id is to be drawn, and from which logits (drawn by `logits`)."""

    prompt: tuple[int, ...]
    generated: tuple[int, ...]
    sampling: Sampling
    choice: int = 0
    logits: int = 0

    @property
    def ids(self) -> tuple[int, ...]:
        return self.prompt + self.generated

    @property
    def scores(self) -> Scores:
        """Rounded: equal logits are common."""
        return np.random.default_rng(self.logits).normal(0, 2, VOCABULARY).round(1)

    @property
    def ruled(self) -> Scores:
        return ruled(self.scores, self.ids, len(self.prompt), self.sampling)

    @property
    def expected(self) -> int:
        return choose(self.scores, self.ids, len(self.prompt), self.sampling, self.choice)


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_p=st.sampled_from([1.0, 0.9, 0.4]),
    top_k=st.sampled_from([0, 0, 1, 3, 10]),
    max_tokens=st.just(99),
    seed=st.integers(-(2**63), 2**63 - 1),
    stop_token_ids=st.lists(ids_of, max_size=3).map(tuple),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 0.3, 1.0]),
    presence_penalty=st.sampled_from([0.0, 0.0, 1.5, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.7, -0.3]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.6]),
    min_tokens=st.integers(0, 6),
    logit_bias=st.dictionaries(ids_of, st.floats(-9, 9), max_size=4).map(lambda biases: tuple(biases.items())),
    bad_words=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3).map(tuple), max_size=5).map(tuple),
)
asked_rows = st.builds(
    Asked,
    prompt=st.lists(ids_of, min_size=1, max_size=12).map(tuple),
    generated=st.lists(st.integers(0, 5), max_size=8).map(tuple),
    sampling=samplings,
    choice=st.integers(0, 3),
    logits=st.integers(0, 10**6),
)


def plans(asked: list[Asked], slots: list[int], decoded: bool) -> list[StepPlan]:
    """Histories told, chunked or given in one; then a step that samples every row, decode rows for those decoded."""
    admits = tuple(
        Admit(slot, one.choice, len(one.prompt), one.sampling) for slot, one in zip(slots, asked, strict=True)
    )
    told: list[tuple[int, tuple[int, ...]]] = []
    chunks: list[tuple[int, tuple[int, ...]]] = []
    last = []
    for place, (slot, one) in enumerate(zip(slots, asked, strict=True)):
        ids = one.ids
        begin = (0, len(ids) // 2, len(ids) - 1)[place % 3]
        if decoded:
            begin = len(ids)
        (told if place % 2 else chunks).append((slot, ids[:begin]))
        last.append(
            Row(slot, len(ids) - 1, 1, None, True) if decoded else Row(slot, begin, len(ids) - begin, ids[begin:], True)
        )
    rows = tuple(Row(slot, 0, len(ids), ids, False) for slot, ids in chunks if ids)
    return [
        StepPlan(FENCE, 1, admits, (), rows, tuple(Told(slot, 0, ids) for slot, ids in told if ids)),
        StepPlan(FENCE, 2, rows=tuple(last)),
    ]


def drawn(
    asked: list[Asked],
    slots: list[int],
    *,
    ranks: int = 1,
    piece_rows: int = 64,
    decoded: bool = False,
    device: torch.device = CPU,
) -> list[int]:
    """The ids of these rows in this order, sampled by several ranks and joined. Scores are checked on the way."""
    logits = torch.from_numpy(np.stack([one.scores for one in asked])).to(device)
    found: list[int] = []
    for rank in range(ranks):
        state = SlotState(SLOTS, CONTEXT, 4, device)
        state.history.fill_(7)  # what earlier owners left
        for plan in plans(asked, slots, decoded):
            batch = apply_and_build(decode(encode(plan)), state, rank, ranks, piece_rows)
        share = logits[batch.share.rows]
        for part in batch.ruled:
            scores = share[part.rows].clone()
            for rule in part.rules:
                scores = rule(scores)
            for row, changed in zip(part.rows.tolist(), scores.tolist(), strict=True):
                assert changed == asked[batch.share.start + row].ruled.tolist()
        found += sampler.sample(share, batch.sampling, batch.paths, batch.ruled).ids.tolist()
    return found


@settings(max_examples=150, deadline=None)
@pytest.mark.parametrize("device", DEVICES, ids=str)
@given(data=st.data())
def test_every_row_gets_what_the_reference_says_in_any_company_order_and_share(
    device: torch.device, data: st.DataObject
) -> None:
    asked = data.draw(st.lists(asked_rows, min_size=1, max_size=SLOTS))
    slots = data.draw(st.permutations(range(SLOTS)))[: len(asked)]
    ranks, piece_rows = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    decoded = data.draw(st.booleans())
    found = drawn(asked, slots, ranks=ranks, piece_rows=piece_rows, decoded=decoded, device=device)
    assert found == [one.expected for one in asked]


def one(sampling: Sampling, generated: tuple[int, ...] = (), prompt: tuple[int, ...] = (9,), logits: int = 1) -> Asked:
    return Asked(prompt, generated, sampling, logits=logits)


GREEDY = replace(PLAIN, temperature=0.0)
BEST = int(one(GREEDY).scores.argmax())
SECOND = int(one(GREEDY).scores.argsort()[-2])


def greedy_id(**rules: object) -> int:
    """What a greedy row draws under these rules, where BEST and SECOND are the likeliest."""
    asked = one(replace(GREEDY, **rules))  # type: ignore[arg-type]
    return drawn([asked], [0])[0]


def test_the_likeliest_tokens_are_as_these_tests_say() -> None:
    assert greedy_id() == BEST
    assert greedy_id(logit_bias=((BEST, -100.0),)) == SECOND
    assert greedy_id(logit_bias=((3, 100.0),)) == 3


def test_stop_ids_come_back_with_the_token_that_makes_the_answer_long_enough() -> None:
    sampling = replace(GREEDY, min_tokens=2, stop_token_ids=(BEST,))
    rows = [one(sampling, (5,) * count) for count in range(4)]
    assert drawn(rows, [0, 1, 2, 3]) == [SECOND, SECOND, BEST, BEST]


def test_a_bad_word_is_kept_from_its_last_token_and_must_lie_in_the_answer_alone() -> None:
    sampling = replace(GREEDY, bad_words=((4, 5, BEST),))
    for prompt, generated, banned in [
        ((9,), (4, 5), True),
        ((9,), (1, 4, 5), True),
        ((4,), (5,), False),  # begins in the prompt
        ((4, 5), (), False),
        ((9,), (4, 5, 1), False),
        ((9,), (5,), False),
    ]:
        assert drawn([one(sampling, generated, prompt)], [2]) == [SECOND if banned else BEST], (prompt, generated)
    assert greedy_id(bad_words=((BEST,),)) == SECOND


def test_a_ban_that_would_leave_nothing_is_not_applied() -> None:
    everything = tuple((token,) for token in range(VOCABULARY))
    assert greedy_id(bad_words=everything) == BEST
    assert greedy_id(bad_words=everything[:BEST] + everything[BEST + 1 :]) == BEST
    assert greedy_id(min_tokens=1, stop_token_ids=tuple(range(VOCABULARY))) == BEST
    others = tuple(word for word in everything if word != (BEST,))
    assert greedy_id(bad_words=others, min_tokens=1, stop_token_ids=(BEST,)) == BEST


@pytest.mark.parametrize("rule", [{"presence_penalty": 2.0}, {"frequency_penalty": 2.0}, {"repetition_penalty": 50.0}])
def test_penalties_see_the_answer_and_repetition_the_prompt_too(rule: dict[str, float]) -> None:
    sampling = replace(GREEDY, logit_bias=((SECOND, 1.0),), **rule)  # type: ignore[arg-type]
    top = drawn([one(replace(sampling, **dict.fromkeys(rule, 1.0 if "repetition_penalty" in rule else 0.0)))], [0])[0]  # type: ignore[arg-type]
    in_prompt, in_answer = one(sampling, (), (top,)), one(sampling, (top,), (9,))
    found = drawn([in_prompt, in_answer], [3, 1])
    assert found[1] != top
    assert (found[0] != top) == ("repetition_penalty" in rule)


def test_rows_without_rules_take_the_paths_they_took_and_leave_the_rules_when_these_are_over() -> None:
    state = SlotState(SLOTS, CONTEXT, 4, torch.device("cpu"))
    briefly = replace(PLAIN, min_tokens=1, stop_token_ids=(3,))
    admits = (Admit(0, 0, 1, PLAIN), Admit(1, 0, 1, briefly), Admit(2, 0, 1, replace(PLAIN, logit_bias=((1, 1.0),))))

    def paths(plan: StepPlan) -> tuple[list[int], list[list[int]]]:
        batch = apply_and_build(decode(encode(plan)), state, 0, 1, 64)
        return batch.paths.plain.tolist(), [part.rows.tolist() for part in batch.ruled]

    given = tuple(Row(slot, 0, 1, (4,), True) for slot in range(3))
    assert paths(StepPlan(FENCE, 1, admits, rows=given)) == ([0], [[1, 2]])
    later = tuple(Row(slot, 1, 1, None, True) for slot in range(3))
    assert paths(StepPlan(FENCE, 2, rows=later)) == ([0, 1], [[2]])
    assert paths(StepPlan(FENCE, 3, (Admit(2, 0, 1, PLAIN),), rows=later)) == ([0, 1, 2], [])
