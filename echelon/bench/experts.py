"""How many experts of a layer the rows of a step touch, from what the ranks of a stage have counted.

In the user's terminal. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def distinct(chosen: Iterable[list[list[int]]]) -> float | None:
    """Experts of a layer that were chosen in a step, on average; chosen: of each rank. None where none was."""
    ranks = [steps for steps in chosen if steps]
    if not ranks:
        return None
    together = [[_any(layers) for layers in zip(*step, strict=True)] for step in zip(*ranks, strict=True)]
    counts = [experts.bit_count() for step in together for experts in step]
    return sum(counts) / len(counts) if counts else None


def expected_distinct(loads: Sequence[Sequence[int]], experts_per_token: int, rows: int) -> float:
    """Of a layer in a step of so many rows, each of which chooses by itself; loads: of layers, rows by expert."""
    counts = []
    for load in loads:
        if total := sum(load):
            shares = (min(1.0, experts_per_token * chosen / total) for chosen in load)
            counts.append(sum(1 - (1 - share) ** rows for share in shares))
    return sum(counts) / len(counts)


def _any(masks: tuple[int, ...]) -> int:
    found = 0
    for mask in masks:
        found |= mask
    return found
