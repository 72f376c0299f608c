"""Stages cut by cost: the slowest is as fast as can be, and no cut of the same kind is more even."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.partition import cut

COSTS = st.floats(0, 1e6) | st.integers(0, 5).map(float)


def stage_costs(costs: Sequence[float], stages: Sequence[range], first: float, last: float) -> list[float]:
    taken = [math.fsum(costs[layer] for layer in stage) for stage in stages]
    taken[0] += first
    taken[-1] += last
    return taken


def every_cut(layers: int, stages: int) -> Iterator[tuple[range, ...]]:
    for inner in itertools.combinations(range(1, layers), stages - 1):
        bounds = (0, *inner, layers)
        yield tuple(map(range, bounds, bounds[1:]))


@given(st.lists(COSTS, min_size=1, max_size=9), st.integers(1, 9), COSTS, COSTS)
def test_no_other_cut_has_a_faster_slowest_stage_or_is_more_even(
    costs: list[float], stages: int, first: float, last: float
) -> None:
    stages = min(stages, len(costs))
    found = cut(costs, stages, first, last)
    assert [layer for stage in found for layer in stage] == list(range(len(costs)))
    assert len(found) == stages and all(found)
    others = [stage_costs(costs, other, first, last) for other in every_cut(len(costs), stages)]
    slowest = min(map(max, others))
    mine = stage_costs(costs, found, first, last)
    assert max(mine) == slowest
    evenest = min(math.fsum(cost**2 for cost in other) for other in others if max(other) == slowest)
    assert math.fsum(cost**2 for cost in mine) == pytest.approx(evenest, rel=1e-12)


def test_equal_layers_are_dealt_out_evenly_whatever_the_unit() -> None:
    for unit in (1, 0.1, 3e-7):
        assert [len(stage) for stage in cut([unit] * 10, 4)] == [2, 2, 3, 3]


def test_a_head_takes_layers_off_the_last_stage() -> None:
    assert [len(stage) for stage in cut([1.0] * 36, 4, first=0.0, last=4.0)] == [10, 10, 10, 6]


def test_an_embedding_takes_layers_off_the_first() -> None:
    assert [len(stage) for stage in cut([1.0] * 10, 3, first=2.0)] == [2, 4, 4]


def test_stages_that_cannot_be_faster_are_even_all_the_same() -> None:
    assert [len(stage) for stage in cut([9, 1, 1, 1, 1], 3)] == [1, 2, 2]


def test_a_large_model_over_many_stages() -> None:
    costs = [1.0] * 3 + [1.5] * 125
    found = cut(costs, 64, first=0.5, last=2.0)
    assert max(stage_costs(costs, found, 0.5, 2.0)) == pytest.approx(3.5)
    assert sum(map(len, found)) == 128


@pytest.mark.parametrize(
    ("costs", "stages", "first"), [([1.0], 2, 0.0), ([1.0], 0, 0.0), ([-1.0], 1, 0.0), ([1.0], 1, math.inf)]
)
def test_what_cannot_be_cut_is_a_bug_of_the_caller(costs: list[float], stages: int, first: float) -> None:
    with pytest.raises(AssertionError):
        cut(costs, stages, first)
