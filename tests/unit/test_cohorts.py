"""Cohorts: how even they become, how few requests move for it, and what a round gains."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.cohorts import TOLERANCE, UNPLACED, balance_cohorts
from parallel.timeline import ideal_round_s

COSTS = st.lists(st.floats(0.01, 100.0), max_size=60)


def loads(costs: list[float], placed: tuple[int, ...], cohorts: int) -> list[float]:
    return [sum(cost for cost, cohort in zip(costs, placed, strict=True) if cohort == c) for c in range(cohorts)]


def moves(before: list[int] | tuple[int, ...], after: tuple[int, ...]) -> int:
    return sum(old not in (UNPLACED, new) for old, new in zip(before, after, strict=True))


@settings(deadline=None)
@given(COSTS, st.integers(1, 9), st.floats(0.0, 0.5), st.randoms(use_true_random=False))
def test_cohorts_differ_by_the_tolerance_or_by_less_than_a_request(
    costs: list[float], cohorts: int, tolerance: float, chance: Random
) -> None:
    current = [chance.randrange(-1, cohorts) for _ in costs]
    placed = balance_cohorts(costs, current, cohorts, tolerance=tolerance)
    assert len(placed) == len(costs) and all(0 <= cohort < cohorts for cohort in placed)
    after = loads(costs, placed, cohorts)
    first = after.index(max(after))  # of several as heavy, the one that gives nothing up ends it
    heaviest = [cost for cost, cohort in zip(costs, placed, strict=True) if cohort == first]
    gap = max(after) - min(after)
    assert gap <= max(tolerance * sum(after) / cohorts, min(heaviest, default=0.0)) + 1e-6
    assert balance_cohorts(costs, placed, cohorts, tolerance=tolerance) == placed, "what is balanced stays"


@settings(deadline=None)
@given(st.lists(st.integers(0, 8), max_size=80), st.integers(1, 9))
def test_requests_of_equal_cost_move_as_few_times_as_any_rule_could(current: list[int], cohorts: int) -> None:
    current = [cohort % cohorts for cohort in current]
    placed = balance_cohorts([1.0] * len(current), current, cohorts, tolerance=0.0)
    small, larger = divmod(len(current), cohorts)
    sizes = sorted((current.count(cohort) for cohort in range(cohorts)), reverse=True)
    goals = [small + 1] * larger + [small] * (cohorts - larger)
    assert sorted((placed.count(cohort) for cohort in range(cohorts)), reverse=True) == goals
    assert moves(current, placed) == sum(max(0, size - goal) for size, goal in zip(sizes, goals, strict=True))


@settings(deadline=None)
@given(COSTS, st.integers(1, 6), st.integers(0, 5), st.randoms(use_true_random=False))
def test_no_more_move_than_may_and_the_rest_is_no_worse(
    costs: list[float], cohorts: int, max_moves: int, chance: Random
) -> None:
    current = [chance.randrange(cohorts) for _ in costs]
    placed = balance_cohorts(costs, current, cohorts, tolerance=0.0, max_moves=max_moves)
    assert moves(current, placed) <= max_moves
    assert max(loads(costs, placed, cohorts)) <= max(loads(costs, tuple(current), cohorts)) + 1e-6


def test_new_requests_go_where_there_is_least() -> None:
    assert balance_cohorts([5, 3, 2, 1], [0, 1, UNPLACED, UNPLACED], 3, tolerance=10.0) == (0, 1, 2, 2)
    assert balance_cohorts([1] * 4, [UNPLACED] * 4, 4) == (0, 1, 2, 3), "a burst does not land in one cohort"


def test_a_cohort_that_is_no_more_gives_its_requests_away() -> None:
    assert balance_cohorts([1, 1, 1, 1], [0, 1, 2, 3], 2) == (0, 1, 0, 1)
    assert balance_cohorts([], [], 4) == ()


def test_the_costliest_are_placed_first() -> None:
    assert balance_cohorts([1, 1, 2], [UNPLACED] * 3, 2, tolerance=10.0) == (1, 1, 0)


def test_the_request_that_moves_is_the_one_that_makes_two_cohorts_equal() -> None:
    assert balance_cohorts([9, 5, 2, 6], [0, 0, 0, 1], 2, tolerance=0.0) == (0, 1, 0, 1)


def test_differences_within_the_tolerance_are_left_alone() -> None:
    costs, current = [10.0, 10.0, 0.4, 0.4], [0, 1, 0, 0]
    assert balance_cohorts(costs, current, 2, tolerance=0.1) == (0, 1, 0, 0)
    assert balance_cohorts(costs, current, 2, tolerance=0.01) == (0, 1, 0, 1)


def test_one_request_that_outweighs_all_others_stays() -> None:
    assert balance_cohorts([10, 1, 1], [0, 0, 1], 2, tolerance=0.0) == (0, 1, 1)
    assert balance_cohorts([10, 1], [0, 1], 2, tolerance=0.0) == (0, 1), "moving it would only turn them round"


def test_drifted_cohorts_are_made_equal_and_the_round_is_shorter() -> None:
    """7, 13, 2 and 10 requests, which vLLM users reported of cohorts that nobody balances."""
    current = [0] * 7 + [1] * 13 + [2] * 2 + [3] * 10
    placed = balance_cohorts([1.0] * 32, current, 4)
    assert [placed.count(cohort) for cohort in range(4)] == [8, 8, 8, 8]
    assert moves(current, placed) == 7
    before, after = ([float(sizes.count(c)) for c in range(4)] for sizes in (current, placed))
    assert (ideal_round_s(before, 4), ideal_round_s(after, 4)) == (52, 32)


def test_a_stream_of_requests_stays_balanced_with_few_moves() -> None:
    """200 requests of random lengths that end and begin: each round's cohorts are even, few requests move."""
    chance = Random(0)
    costs = {request: chance.uniform(1, 4) for request in range(200)}
    placed = dict.fromkeys(costs, UNPLACED)
    moved = ended = 0
    for tick in range(300):
        for request in [request for request in costs if chance.random() < 0.02]:
            del costs[request], placed[request]
            new = 1000 * (tick + 1) + request % 1000
            costs[new], placed[new] = chance.uniform(1, 4), UNPLACED
            ended += 1
        before = list(placed.values())
        after = balance_cohorts(list(costs.values()), before, 4)
        moved += moves(before, after)
        placed = dict(zip(costs, after, strict=True))
        each = loads(list(costs.values()), after, 4)
        assert max(each) - min(each) <= TOLERANCE * sum(each) / 4 + 1e-9
        costs = {request: cost + 0.01 for request, cost in costs.items()}
    assert ended > 900, "the stream is a stream"
    assert moved < ended, "less than one move for each request that came"


def test_costs_and_cohorts_belong_together() -> None:
    with pytest.raises(AssertionError, match="2 costs of 1 requests"):
        balance_cohorts([1, 2], [0], 2)
