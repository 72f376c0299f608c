"""The fitted cost of slots: how soon it is right, what it withstands, and chunks that make slots equally long."""

from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.schedule import Kind, Op, inference
from parallel.slot_cost import (
    ChunkLimits,
    SlotCostModel,
    SlotWork,
    chunk_tokens,
    chunk_work,
    decode_work,
    slot_target_s,
)
from parallel.timeline import simulate

TRUE = SlotCostModel(coefficients=(2e-5, 3e-3, 1e-5, 3e-8, 2e-9))  # a GPU's: 20 µs a token, 3 ms a step, and attention
LIMITS = ChunkLimits(budget_tokens=2048)
WORK = st.builds(SlotWork, *(st.integers(0, 10_000) for _ in range(4)))


def mixed(chance: Random) -> SlotWork:
    """A slot as they come: up to 128 decode rows, and mostly a chunk."""
    decode = decode_work(chance.randrange(100, 4000) for _ in range(chance.randrange(128)))
    if decode.tokens and chance.random() < 0.4:
        return decode
    return decode + chunk_work(chance.randrange(16_000), chance.randrange(1, 2048))


def fitted(slots: int, seed: int = 0, slowdown: float = 1.0, model: SlotCostModel | None = None) -> SlotCostModel:
    """A model after slots with 5 % of noise, of which one in thirty takes ten seconds."""
    chance, model = Random(seed), model or SlotCostModel()
    for _ in range(slots):
        work = mixed(chance)
        measured_s = TRUE.predict(work) * slowdown * math.exp(chance.gauss(0, 0.05))
        model = model.observe(work, 10.0 if chance.random() < 1 / 30 else measured_s)
    return model


def worst_error(model: SlotCostModel, slowdown: float = 1.0) -> float:
    chance = Random(99)
    works = [mixed(chance) for _ in range(200)]
    return max(abs(model.predict(work) / (TRUE.predict(work) * slowdown) - 1) for work in works)


def test_works_add_up() -> None:
    assert decode_work([10, 20]) == SlotWork(tokens=2, rows=2, context_tokens=30)
    assert chunk_work(100, 3) == SlotWork(tokens=3, rows=1, pairs=101 + 102 + 103)
    assert chunk_work(0, 10) + chunk_work(10, 10) == SlotWork(20, 2, 0, chunk_work(0, 20).pairs)


@pytest.mark.parametrize("seed", range(5))
def test_the_model_is_right_after_a_hundred_slots_in_spite_of_hiccups(seed: int) -> None:
    assert worst_error(fitted(100, seed)) < 0.12
    assert worst_error(fitted(400, seed)) < 0.12


def test_the_model_follows_a_machine_that_becomes_slower() -> None:
    before = fitted(200)
    assert worst_error(before, slowdown=2.0) > 0.4
    assert worst_error(fitted(200, seed=1, slowdown=2.0, model=before), slowdown=2.0) < 0.12


def test_hiccups_alone_do_not_spoil_it() -> None:
    """An average would be off by a factor; the relative error makes them weigh nothing."""
    model = fitted(200)
    for _ in range(3):
        model = model.observe(chunk_work(0, 64), 100.0)
    assert worst_error(model) < 0.12


def test_what_recent_slots_do_not_show_is_not_forgotten() -> None:
    model, chance = fitted(200), Random(3)
    for _ in range(2000):
        work = decode_work(chance.randrange(100, 4000) for _ in range(chance.randrange(1, 128)))
        model = model.observe(work, TRUE.predict(work))
    chunk = chunk_work(8000, 1024)
    assert model.predict(chunk) == pytest.approx(TRUE.predict(chunk), rel=0.15)


@settings(deadline=None)
@given(st.lists(st.tuples(WORK, st.floats(1e-6, 100.0)), max_size=12), WORK, WORK)
def test_whatever_was_measured_more_work_never_costs_less(
    measured: list[tuple[SlotWork, float]], work: SlotWork, more: SlotWork
) -> None:
    model = SlotCostModel()
    for slot, seconds in measured:
        model = model.observe(slot, seconds)
    assert 0 <= model.predict(work) <= model.predict(work + more) < math.inf


@settings(deadline=None)
@given(WORK, st.floats(1e-5, 10.0))
def test_one_observation_is_repeated(work: SlotWork, seconds: float) -> None:
    assert SlotCostModel().observe(work, seconds).predict(work) == pytest.approx(seconds)


def test_impossible_times_are_refused() -> None:
    for seconds in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(AssertionError, match="a slot took"):
            SlotCostModel().observe(chunk_work(0, 1), seconds)


def test_before_anything_was_measured_chunks_fill_the_budget() -> None:
    model, decode = SlotCostModel(), decode_work([100] * 48)
    target_s = slot_target_s(model, [decode] * 4, 0, 100_000, LIMITS)
    assert chunk_tokens(model, decode, 0, 100_000, target_s, LIMITS) == 2000


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 200),
    st.integers(0, 100_000),
    st.integers(1, 100_000),
    st.floats(0.0, 0.2),
    st.sampled_from([1, 16, 256]),
)
def test_a_chunk_fills_its_slot_up_to_a_granule(
    rows: int, first: int, waiting: int, target_s: float, granule: int
) -> None:
    limits, decode = ChunkLimits(2048, granule), decode_work([1000] * rows)
    chunk = chunk_tokens(TRUE, decode, first, waiting, target_s, limits)
    room = min(waiting, 2048 - rows)
    assert min(granule, room) <= chunk <= room
    if chunk > granule:
        assert TRUE.predict(decode + chunk_work(first, chunk)) <= target_s + 1e-9, "it fits"
    if chunk < room:
        assert chunk % granule == 0
        assert TRUE.predict(decode + chunk_work(first, chunk + granule)) > target_s - 1e-9, "no more would"


def test_no_chunk_where_decode_rows_leave_no_budget() -> None:
    assert chunk_tokens(TRUE, decode_work([10] * 2048), 0, 50, 1.0, LIMITS) == 0


def test_chunks_shrink_as_the_prompt_grows() -> None:
    target_s = slot_target_s(TRUE, [SlotWork()] * 4, 0, 100_000, LIMITS)
    chunks = [chunk_tokens(TRUE, SlotWork(), first, 100_000, target_s, LIMITS) for first in (0, 8_000, 32_000, 64_000)]
    assert chunks[0] == 2048
    assert chunks == sorted(chunks, reverse=True) and chunks[-1] < 512


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 500), min_size=1, max_size=9), st.integers(0, 64_000), st.integers(1, 30_000))
def test_the_target_takes_what_waits_in_the_shortest_time(rows: list[int], first: int, waiting: int) -> None:
    cohorts = [decode_work([1000] * count) for count in rows]
    target_s = slot_target_s(TRUE, cohorts, first, waiting, LIMITS)

    def taken(seconds: float) -> float:
        fits = (min(2048 - c.tokens, TRUE.tokens_within(c, first, seconds)) for c in cohorts)
        return sum(max(0.0, fit) for fit in fits)

    heaviest_s = max(map(TRUE.predict, cohorts))
    longest_s = max(heaviest_s, TRUE.predict(chunk_work(0, 2048)))
    assert heaviest_s <= target_s <= longest_s + 1e-9
    if target_s < longest_s * (1 - 1e-3):
        assert taken(target_s) >= waiting
    if target_s > heaviest_s:
        assert taken(heaviest_s) < waiting and taken(target_s - longest_s / 1000) < waiting


def test_a_small_burst_is_spread_over_the_slots() -> None:
    """1,000 tokens are less than one budget of 2,048; one slot that takes them all would leave three stages empty."""
    limits = ChunkLimits(2048, 1)
    target_s = slot_target_s(TRUE, [SlotWork()] * 4, 0, 1000, limits)
    chunks = [chunk_tokens(TRUE, SlotWork(), first, 1000 - first, target_s, limits) for first in (0, 250, 500, 750)]
    assert all(230 <= chunk <= 260 for chunk in chunks), chunks


def test_prefill_beside_unequal_cohorts_makes_their_slots_equal() -> None:
    cohorts = [decode_work([2000] * rows) for rows in (7, 130, 20, 100)]
    target_s = slot_target_s(TRUE, cohorts, 0, 100_000, LIMITS)
    slots_s = [
        TRUE.predict(cohort + chunk_work(0, chunk_tokens(TRUE, cohort, 0, 100_000, target_s, LIMITS)))
        for cohort in cohorts
    ]
    assert max(slots_s) / min(slots_s) < 1.02
    assert max(map(TRUE.predict, cohorts)) / min(map(TRUE.predict, cohorts)) > 2


def bubble_of_a_long_prompt(model: SlotCostModel | None) -> float:
    """64 k tokens through four stages of the true machine, in chunks of the model or of one length."""
    chunks: list[SlotWork] = []
    first, prompt = 0, 64_000
    while first < prompt:
        tokens = min(2048, prompt - first)
        if model is not None:
            target_s = slot_target_s(model, [SlotWork()] * 4, first, prompt - first, LIMITS)
            tokens = chunk_tokens(model, SlotWork(), first, prompt - first, target_s, LIMITS)
        chunks.append(chunk_work(first, tokens))
        first += tokens

    def cost_s(stage: int, op: Op) -> float:
        return TRUE.predict(chunks[op.microbatch]) if op.kind is Kind.FORWARD else 0.0

    timeline = simulate(inference(4, [0] * len(chunks), 4), cost_s, queue_length=2)
    return timeline.bubble(*timeline.filled())


def test_fitted_chunks_leave_less_bubble_than_chunks_of_one_length() -> None:
    assert bubble_of_a_long_prompt(fitted(200)) < bubble_of_a_long_prompt(None) / 2


def test_limits_must_make_sense() -> None:
    with pytest.raises(AssertionError, match="granule and budget"):
        ChunkLimits(budget_tokens=8, granule_tokens=16)
