"""The expert balancer: complete and exact placements, how near to the bound, and how little moves."""

from __future__ import annotations

import math
from itertools import product
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.balance import (
    TOLERANCE,
    ExpertLayout,
    ExpertPlacement,
    first_placement,
    imbalance,
    imbalance_bound,
    place_experts,
    transfers,
)
from parallel.packing import replicate

# DeepSeek's example (README of github.com/deepseek-ai/EPLB): two layers, 12 experts in 4 groups, 16 slots on 8 ranks of
# 2 nodes, and the placement that it prints.
EPLB_LOADS = (
    (90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86),
    (20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27),
)
EPLB_SLOTS = (
    (5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1),
    (7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1),
)
LARGE = ExpertLayout(256, 32, 9)  # DeepSeek-V3 on 32 ranks, one redundant expert on each


@st.composite
def layouts(draw: st.DrawFn) -> ExpertLayout:
    nodes, per_node = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    groups, size = nodes * draw(st.integers(1, 3)), draw(st.integers(1, 6))
    held = groups // nodes * size
    slots = draw(st.integers(-(-held // per_node), held))
    return ExpertLayout(groups * size, nodes * per_node, slots, groups, nodes)


LOADS = st.one_of(st.just(0.0), st.floats(0.001, 1000.0))


@st.composite
def layouts_and_loads(draw: st.DrawFn) -> tuple[ExpertLayout, list[list[float]]]:
    layout = draw(layouts())
    return layout, draw(
        st.lists(st.lists(LOADS, min_size=layout.experts, max_size=layout.experts), min_size=1, max_size=4)
    )


def check(placement: ExpertPlacement, layout: ExpertLayout) -> None:
    """Exact slots, every expert somewhere and nowhere twice on a rank, every group on one node."""
    assert [len(rank) for rank in placement.slots] == [layout.slots_per_rank] * layout.ranks
    assert {expert for rank in placement.slots for expert in rank} == set(range(layout.experts))
    assert all(len(set(rank)) == len(rank) for rank in placement.slots)
    if layout.nodes > 1:
        size, ranks = layout.experts // layout.groups, layout.ranks // layout.nodes
        homes = {(expert // size, index // ranks) for index, rank in enumerate(placement.slots) for expert in rank}
        assert len(homes) == layout.groups


@given(st.data())
def test_the_first_placement_has_every_expert_in_its_place(data: st.DataObject) -> None:
    ranks, held = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    layout = ExpertLayout(ranks * held, ranks, data.draw(st.integers(held, ranks * held)))
    placement = first_placement(layout)
    check(placement, layout)
    assert [expert for rank in placement.slots for expert in rank[:held]] == list(range(layout.experts))
    counts = [len(slots) for slots in placement.physical(layout.experts)]
    assert max(counts) <= 1 + -(-(layout.slots_per_rank - held) // held)  # copies are of different experts


def shifted(loads: list[float], drift: float, chance: Random) -> list[float]:
    return [load * math.exp(chance.gauss(0, drift)) for load in loads]


@settings(max_examples=150, deadline=None)
@given(layouts_and_loads())
def test_every_placement_is_complete_and_no_better_than_the_bound(
    case: tuple[ExpertLayout, list[list[float]]],
) -> None:
    """Also after any change of loads, and then no worse than a fresh one by more than the tolerance."""
    layout, windows = case
    placement: ExpertPlacement | None = None
    for loads in windows:
        fresh = place_experts(loads, layout)
        placement = place_experts(loads, layout, placement)
        for found in (fresh, placement):
            check(found, layout)
            assert imbalance(found, loads) >= imbalance_bound(loads, layout) - 1e-9
        if layout.nodes == 1:
            assert max(placement.rank_loads(loads)) <= (1 + TOLERANCE) * max(fresh.rank_loads(loads)) + 1e-9


@settings(max_examples=150, deadline=None)
@given(layouts_and_loads())
def test_no_rank_exceeds_the_mean_by_more_than_the_heaviest_replica(
    case: tuple[ExpertLayout, list[list[float]]],
) -> None:
    layout, (loads, *_) = case
    layout = ExpertLayout(layout.experts, layout.ranks, layout.slots_per_rank)
    placement = place_experts(loads, layout)
    replica = max(load / len(slots) for load, slots in zip(loads, placement.physical(layout.experts), strict=True))
    assert max(placement.rank_loads(loads)) <= sum(loads) / layout.ranks + replica + 1e-9


@settings(deadline=None)
@given(st.lists(LOADS, min_size=1, max_size=5), st.integers(0, 4), st.integers(1, 4))
def test_no_other_replication_has_a_lighter_heaviest_replica(loads: list[float], extra: int, most: int) -> None:
    slots = min(len(loads) + extra, len(loads) * most)
    counts = replicate(loads, slots, most)
    assert sum(counts) == slots and all(1 <= count <= most for count in counts)

    def heaviest(choice: tuple[int, ...]) -> float:
        return max(load / count for load, count in zip(loads, choice, strict=True))

    every = [choice for choice in product(range(1, most + 1), repeat=len(loads)) if sum(choice) == slots]
    assert heaviest(tuple(counts)) == min(map(heaviest, every))


@pytest.mark.parametrize("layer", [0, 1])
def test_as_good_as_eplb_on_its_own_example(layer: int) -> None:
    loads, layout = EPLB_LOADS[layer], ExpertLayout(12, 8, 2, groups=4, nodes=2)
    slots = EPLB_SLOTS[layer]
    theirs = ExpertPlacement(tuple(zip(slots[::2], slots[1::2], strict=True)))
    check(theirs, layout)
    assert imbalance(place_experts(loads, layout), loads) <= imbalance(theirs, loads)
    assert imbalance(place_experts(loads, ExpertLayout(12, 8, 2)), loads) < imbalance(theirs, loads), "nodes cost"


def test_replicas_make_skewed_experts_even() -> None:
    """64 experts on 8 ranks, popularity by Zipf's law: in order, well packed, and with one replica a rank."""
    loads = [(rank + 1) ** -0.8 for rank in range(64)]
    Random(0).shuffle(loads)
    in_order = ExpertPlacement(tuple(tuple(range(rank * 8, rank * 8 + 8)) for rank in range(8)))
    packed, replicated = (ExpertLayout(64, 8, slots) for slots in (8, 9))
    assert imbalance(in_order, loads) > 2
    assert imbalance(place_experts(loads, packed), loads) < 1.45
    assert imbalance(place_experts(loads, replicated), loads) < 1.001 < imbalance_bound(loads, packed)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("drift", [0.05, 0.2, 0.6])
def test_shifting_loads_stay_near_the_bound_with_fewer_moves_than_a_fresh_start(drift: float, seed: int) -> None:
    chance = Random(seed)
    loads = [chance.paretovariate(1.5) for _ in range(256)]
    placement = place_experts(loads, LARGE)
    for _ in range(5):
        loads = shifted(loads, drift, chance)
        fresh, before = place_experts(loads, LARGE), placement
        placement = place_experts(loads, LARGE, before)
        assert imbalance(placement, loads) <= (1 + TOLERANCE) * max(
            imbalance(fresh, loads), imbalance_bound(loads, LARGE)
        )
        assert imbalance(placement, loads) <= 1.05 * imbalance_bound(loads, LARGE)
        assert len(before.moved(placement)) < len(before.moved(fresh)) / 2


def test_loads_that_barely_change_move_nothing() -> None:
    chance = Random(0)
    loads = [chance.paretovariate(1.5) for _ in range(256)]
    placement = place_experts(loads, LARGE)
    for _ in range(10):
        assert place_experts(shifted(loads, 0.01, chance), LARGE, placement) == placement


def test_one_expert_that_becomes_hot_moves_little() -> None:
    loads = [1.0] * 256
    placement = place_experts(loads, LARGE)
    loads[17] = 50.0
    after = place_experts(loads, LARGE, placement)
    assert imbalance(placement, loads) > 3
    assert imbalance(after, loads) < 1.05 * imbalance_bound(loads, LARGE)
    assert len(placement.moved(after)) < 60


def test_nodes_keep_their_groups_while_they_are_balanced() -> None:
    chance, layout = Random(1), ExpertLayout(64, 16, 5, groups=8, nodes=4)
    placement = place_experts([1.0] * 64, layout)
    for _ in range(5):
        loads = shifted([1.0] * 64, 0.005, chance)
        assert place_experts(loads, layout) != placement, "on a fresh start groups would go to other nodes"
        assert place_experts(loads, layout, placement) == placement


def test_two_hot_groups_do_not_stay_on_one_node() -> None:
    layout = ExpertLayout(64, 16, 5, groups=8, nodes=4)
    placement = place_experts([1.0] * 64, layout)
    first = {expert // 8 for rank in placement.slots[:4] for expert in rank}
    hot = [8.0 if expert // 8 in first else 1.0 for expert in range(64)]
    after = place_experts(hot, layout, placement)
    check(after, layout)
    assert not any(
        first <= {expert // 8 for rank in after.slots[n : n + 4] for expert in rank} for n in range(0, 16, 4)
    )
    assert imbalance(placement, hot) == pytest.approx(4 * 128 / 176)
    assert imbalance(after, hot) < imbalance(placement, hot) / 1.5


def test_physical_slots_and_loads_of_ranks() -> None:
    placement = ExpertPlacement(((0, 1), (0, 2)))
    assert placement.physical(3) == ((0, 2), (1,), (3,))
    assert placement.rank_loads([4.0, 1.0, 3.0]) == [3.0, 5.0]
    assert imbalance(placement, [4.0, 1.0, 3.0]) == 5 / 4
    assert imbalance(placement, [0.0, 0.0, 0.0]) == 1.0
    assert placement.moved(ExpertPlacement(((0, 2), (0, 1)))) == (1, 3)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ((9, 4, 2), r"9 experts in 4 \* 2 = 8 slots"),
        ((8, 4, 9), "9 slots a rank for the 8 experts"),
        ((8, 3, 4, 2, 2), "3 ranks over 2 nodes"),
        ((9, 4, 4, 3, 2), "3 groups over 2 nodes"),
        ((9, 4, 4, 2, 2), "9 experts in 2 groups"),
    ],
)
def test_layouts_that_cannot_be_are_refused(layout: tuple[int, ...], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        ExpertLayout(*layout)


def test_a_placement_of_another_layout_is_refused() -> None:
    placement = place_experts([1.0] * 8, ExpertLayout(8, 4, 2))
    with pytest.raises(AssertionError, match="another layout"):
        place_experts([1.0] * 8, ExpertLayout(8, 2, 4), placement)


@settings(max_examples=100)
@given(layouts_and_loads())
def test_transfers_change_one_placement_into_the_next(drawn: tuple[ExpertLayout, list[list[float]]]) -> None:
    layout, windows = drawn
    before = place_experts([1.0] * layout.experts, layout)
    slots = [expert for rank in before.slots for expert in rank]
    after = place_experts(windows[0], layout, before)
    moves = transfers(before, after)
    changed = list(slots)
    for source, target in moves:
        changed[target] = slots[source]
        held = before.slots[target // layout.slots_per_rank]
        assert source // layout.slots_per_rank == target // layout.slots_per_rank or slots[source] not in held
    assert changed == [expert for rank in after.slots for expert in rank]
    assert tuple(target for _, target in moves) == before.moved(after)


def test_replicas_share_what_is_sent() -> None:
    before = ExpertPlacement(((0, 1), (0, 2), (3, 1), (4, 2)))
    after = ExpertPlacement(((0, 1), (0, 2), (3, 0), (4, 0)))
    assert transfers(before, after) == ((0, 5), (2, 7))
