"""Packing with replicas: things of known load into bins that hold equally many, none of them twice.

Pure and torch-free; the steps of which the expert balancer is made (balance.py). Bins are lists whose positions are
physical slots, so a step that changes little moves little. It knows nothing of experts, nodes and ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from heapq import heapify, heapreplace

Bins = list[list[int]]  # [bins][room]: the thing at each position

HOLE = -1
SAME = 1e-9  # differences below this share of a gap are rounding, not gain


def replicate(loads: Sequence[float], slots: int, most: int) -> list[int]:
    """How many replicas of each thing fill the slots so that the heaviest replica is lightest; at most `most` each.

    Each slot that is left goes to the thing whose replicas are heaviest. No other choice gets the heaviest replica as
    low with as few slots, so greedy is exact here.
    """
    assert len(loads) <= slots <= len(loads) * most, f"{len(loads)} things, at most {most} times, in {slots} slots"
    counts = [1] * len(loads)
    heaviest = [(-load, 1, thing) for thing, load in enumerate(loads)]
    heapify(heaviest)
    for _ in range(slots - len(loads)):
        while counts[heaviest[0][2]] == most:
            heapreplace(heaviest, (1.0, 0, heaviest[0][2]))  # behind all that can still be replicated
        thing = heaviest[0][2]
        counts[thing] += 1
        heapreplace(heaviest, (-loads[thing] / counts[thing], counts[thing], thing))
    return counts


def pack(loads: Sequence[float], counts: Sequence[int], bins: int, room: int) -> Bins:
    """counts[i] replicas of each thing in bins of equal room: heaviest first, each to the lightest bin that takes it.

    Longest processing time first with equally many in each bin, as EPLB packs. EPLB may put two replicas of an expert
    on one rank, where the second is of no use; here none shares a bin with another of its kind.
    """
    assert sum(counts) == bins * room, f"{sum(counts)} replicas in {bins} bins of {room}"
    shares = [load / count for load, count in zip(loads, counts, strict=True)]
    packed: Bins = [[] for _ in range(bins)]
    weights = [0.0] * bins
    for thing in sorted(range(len(loads)), key=lambda thing: (-shares[thing], thing)):
        for _ in range(counts[thing]):
            roomy = [index for index in range(bins) if len(packed[index]) < room]
            fitting = [index for index in roomy if thing not in packed[index]]
            index = (
                min(fitting, key=weights.__getitem__)
                if fitting
                else _make_room(packed, weights, shares, roomy[0], thing)
            )
            packed[index].append(thing)
            weights[index] += shares[thing]
    return packed


def _make_room(packed: Bins, weights: list[float], shares: Sequence[float], roomy: int, thing: int) -> int:
    """Only bins that hold the thing have room: move one of another bin there, and return that other bin.

    There is one: a bin without the thing is full, so it holds something that the roomy bin does not.
    """
    movable = [
        (abs(shares[other] - shares[thing]), index, other)
        for index, held in enumerate(packed)
        if thing not in held
        for other in held
        if other not in packed[roomy]
    ]
    _, index, other = min(movable)
    packed[index].remove(other)
    packed[roomy].append(other)
    weights[index] -= shares[other]
    weights[roomy] += shares[other]
    return index


def heaviest(bins: Bins, loads: Sequence[float]) -> float:
    """The load of the heaviest bin; replicas share their thing's load equally."""
    shares = _shares(bins, loads)
    return max(sum(shares[thing] for thing in held) for held in bins)


def swapped(bins: Bins, loads: Sequence[float], goal: float) -> Bins:
    """The bins after swaps between the heaviest and a lighter one, until the heaviest is at most goal or none helps.

    Each swap is the one that comes nearest to making the two equal, tried with the lightest bin first.
    """
    bins = [list(held) for held in bins]
    shares = _shares(bins, loads)
    weights = [sum(shares[thing] for thing in held) for held in bins]
    while max(weights) > goal:
        heavy = weights.index(max(weights))
        for light in sorted(range(len(bins)), key=weights.__getitem__):
            gap = weights[heavy] - weights[light]
            if swap := _best_swap(bins[heavy], bins[light], shares, gap):
                _, mine, other = swap
                moved = shares[bins[heavy][mine]] - shares[bins[light][other]]
                bins[heavy][mine], bins[light][other] = bins[light][other], bins[heavy][mine]
                weights[heavy] -= moved
                weights[light] += moved
                break
        else:
            break
    return bins


def _best_swap(
    heavy: list[int], light: list[int], shares: Sequence[float], gap: float
) -> tuple[float, int, int] | None:
    """(distance from equal, position in heavy, position in light), or None if no swap narrows the gap."""
    mine = [(position, thing) for position, thing in enumerate(heavy) if thing not in light]
    others = [(position, thing) for position, thing in enumerate(light) if thing not in heavy]
    swaps = (
        (abs(shares[thing] - shares[other] - gap / 2), position, place)
        for position, thing in mine
        for place, other in others
        if gap * SAME < shares[thing] - shares[other] < gap * (1 - SAME)
    )
    return min(swaps, default=None)


def recounted(bins: Bins, loads: Sequence[float], counts: Sequence[int]) -> Bins | None:
    """The bins with counts[i] replicas of each thing, all else in its place; None if that cannot be had so.

    Surplus replicas leave the heaviest bins, missing ones go to the lightest that were left, heaviest first.
    """
    bins = [list(held) for held in bins]
    shares = [load / count for load, count in zip(loads, counts, strict=True)]
    weights = [sum(shares[thing] for thing in held) for held in bins]
    having = Counter(thing for held in bins for thing in held)
    for thing, count in enumerate(counts):
        for _ in range(having[thing] - count):
            index = max((i for i, held in enumerate(bins) if thing in held), key=weights.__getitem__)
            bins[index][bins[index].index(thing)] = HOLE
            weights[index] -= shares[thing]
    missing = [thing for thing, count in enumerate(counts) for _ in range(count - having[thing])]
    for thing in sorted(missing, key=lambda thing: (-shares[thing], thing)):
        fitting = [index for index, held in enumerate(bins) if HOLE in held and thing not in held]
        if not fitting:
            return None
        index = min(fitting, key=weights.__getitem__)
        bins[index][bins[index].index(HOLE)] = thing
        weights[index] += shares[thing]
    return bins


def renumbered(bins: Bins, before: Bins) -> Bins:
    """The same bins in the order, and things in the positions, in which most stay where they were before.

    Bins are paired greedily by how many things they share with a bin of before.
    """
    pairs = sorted(
        (-len(set(held) & set(old)), index, place)
        for index, held in enumerate(bins)
        for place, old in enumerate(before)
    )
    order: dict[int, int] = {}
    for _, index, place in pairs:
        if index not in order.values() and place not in order:
            order[place] = index
    placed: Bins = []
    for place, old in enumerate(before):
        held = bins[order[place]]
        new = iter([thing for thing in held if thing not in old])
        placed.append([thing if thing in held else next(new) for thing in old])
    return placed


def _shares(bins: Bins, loads: Sequence[float]) -> list[float]:
    """The load of one replica of each thing."""
    having = Counter(thing for held in bins for thing in held)
    return [load / having[thing] for thing, load in enumerate(loads)]
