"""How many experts of a layer the rows of a step touch, from what the ranks of a stage have counted.

In the user's terminal. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable


def distinct(chosen: Iterable[list[list[int]]]) -> float | None:
    """Experts of a layer that were chosen in a step, on average; chosen: of each rank. None where none was."""
    ranks = [steps for steps in chosen if steps]
    if not ranks:
        return None
    together = [[_any(layers) for layers in zip(*step, strict=True)] for step in zip(*ranks, strict=True)]
    counts = [experts.bit_count() for step in together for experts in step]
    return sum(counts) / len(counts) if counts else None


def _any(masks: tuple[int, ...]) -> int:
    found = 0
    for mask in masks:
        found |= mask
    return found
