"""Plans on the wire: what the leader wrote is what every rank reads, to the last bit of a temperature."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from hypothesis import given, settings
from hypothesis import strategies as st

from echelon.internal.link import Fence, Sampling
from worker.plan import Admit, PlanTables, Row, StepPlan, Told, decode, encode
from worker.plan_rules import Rules

T = TypeVar("T")

ids = st.integers(0, 2**31 - 1)
counts = st.integers(0, 2**31 - 1)
numbers = st.floats(0, 1e300)


def some(values: st.SearchStrategy[T], smallest: int = 0) -> st.SearchStrategy[tuple[T, ...]]:
    return st.lists(values, min_size=smallest, max_size=4).map(tuple)


samplings = st.builds(
    Sampling,
    temperature=numbers,
    top_p=numbers,
    top_k=counts,
    max_tokens=counts,
    seed=st.integers(-(2**63), 2**63 - 1),
    stop_token_ids=some(ids),
    min_p=numbers,
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    repetition_penalty=numbers,
    min_tokens=counts,
    logit_bias=some(st.tuples(ids, st.floats(-100, 100))),
    bad_words=some(some(ids, 1)),
    grammar=st.text(),
)
rows = st.builds(
    Row,
    slot=counts,
    first=counts,
    tokens=counts,
    given=st.none() | some(ids, 1),
    sampled=st.booleans(),
    logprobs=st.none() | st.integers(0, 20),
    scored=st.none() | st.integers(0, 20),
    next_id=st.none() | ids,
)
plans = st.builds(
    StepPlan,
    fence=st.builds(Fence, ids, ids, ids),
    step=st.integers(0, 2**63),
    admits=some(st.builds(Admit, slot=counts, choice=counts, prompt_tokens=counts, sampling=samplings)),
    blocks=some(st.tuples(counts, counts, counts)),
    rows=some(rows),
    told=some(st.builds(Told, slot=counts, first=counts, ids=some(ids))),
    rebalances=st.booleans(),
    captures=counts,
)


def parts(tables: PlanTables) -> Iterator[tuple[int, ...]]:
    """The ids of each told entry."""
    offset = 0
    for _, _, tokens in tables.told.tolist():
        yield tuple(tables.told_ids[offset : offset + tokens].tolist())
        offset += tokens
    assert offset == len(tables.told_ids)


@settings(deadline=None)
@given(plans)
def test_a_plan_arrives_as_it_was_written(plan: StepPlan) -> None:
    tables = decode(encode(plan))
    assert (tables.fence, tables.step) == (plan.fence, plan.step)
    assert (tables.rebalances, tables.captures) == (plan.rebalances, plan.captures)
    assert tables.blocks.tolist() == [list(change) for change in plan.blocks]
    assert tables.admits["slot"].tolist() == [admit.slot for admit in plan.admits]
    assert tables.admits["choice"].tolist() == [admit.choice for admit in plan.admits]
    assert tables.admits["prompt_tokens"].tolist() == [admit.prompt_tokens for admit in plan.admits]
    assert tables.admits.dtype.names is not None
    for name in ("seed", *tables.admits.dtype.names[4:]):
        assert tables.admits[name].tolist() == [getattr(admit.sampling, name) for admit in plan.admits], name
    assert list(parts(tables)) == [told.ids for told in plan.told]
    assert tables.told[:, :2].tolist() == [[told.slot, told.first] for told in plan.told]
    assert tables.scored.tolist() == [
        [index, row.scored, -1 if row.next_id is None else row.next_id]
        for index, row in enumerate(plan.rows)
        if row.scored is not None
    ]
    for row, (slot, first, tokens, offset, wanted) in zip(plan.rows, tables.rows.tolist(), strict=True):
        assert (slot, first, tokens) == (row.slot, row.first, row.tokens)
        assert (offset < 0) == (row.given is None)
        if row.given is not None:
            assert tuple(tables.token_ids[offset : offset + len(row.given)].tolist()) == row.given
        assert wanted == (-2 if not row.sampled else -1 if row.logprobs is None else row.logprobs)


@settings(deadline=None)
@given(plans)
def test_rules_come_for_the_admits_that_have_any(plan: StepPlan) -> None:
    expected = []
    for admit in plan.admits:
        asked = admit.sampling
        stop_ids = asked.stop_token_ids if asked.min_tokens else ()
        if stop_ids or asked.logit_bias or asked.bad_words or asked.grammar:
            expected.append(Rules(admit.slot, stop_ids, asked.logit_bias, asked.bad_words, asked.grammar))
    assert list(decode(encode(plan)).rules) == expected
