"""Stages cut by cost: which run of layers each stage of a pipeline computes.

Pure and torch-free; read by the planner and by every rank, which must agree. A round of a pipeline lasts as long as
its slowest stage makes it, and layers do not cost the same: the embedding lies on the first stage, the head on the
last, and a layer of experts is not a dense one. It knows no model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Bounds = tuple[int, ...]  # the first layer of each stage, and behind them the number of layers


def cut(costs: Sequence[float], stages: int, first: float = 0, last: float = 0) -> tuple[range, ...]:
    """The layers of each stage, in order, at least one each, such that the slowest stage is as fast as can be.

    costs: of each layer, in any unit; first and last: what the first and the last stage compute besides. Of the cuts
    with that slowest stage, the most even one: the least sum of squares of the stages' costs, then earlier stages
    shorter. Exact, by two dynamic programs over (stage, layers so far), in O(stages * layers^2). Raises AssertionError
    for fewer layers than stages, or costs that are negative or not finite.
    """
    layers = len(costs)
    assert 1 <= stages <= layers, f"{layers} layers make no {stages} stages of at least one"
    assert all(0 <= cost < math.inf for cost in (*costs, first, last)), f"costs {costs}, {first} and {last}"
    runs = [[math.fsum(costs[start:end]) for end in range(layers + 1)] for start in range(layers)]

    def cost(stage: int, start: int, end: int) -> float:
        return runs[start][end] + (first if stage == 0 else 0) + (last if stage == stages - 1 else 0)

    slowest, _ = _best(layers, stages, cost, max)

    def square(stage: int, start: int, end: int) -> float:
        return taken**2 if (taken := cost(stage, start, end)) <= slowest else math.inf

    _, bounds = _best(layers, stages, square, lambda so_far, added: so_far + added)
    return tuple(map(range, bounds, bounds[1:]))


def _best(
    layers: int, stages: int, price: Callable[[int, int, int], float], join: Callable[[float, float], float]
) -> tuple[float, Bounds]:
    """The least joined price(stage, start, end) of all ways to cut, and the first of the ways that have it."""
    best: dict[int, tuple[float, Bounds]] = {0: (0.0, (0,))}  # layers so far: what their stages cost, and their bounds
    for stage in range(stages):
        behind = stages - 1 - stage
        ends = range(stage + 1, layers - behind + 1) if behind else (layers,)
        best = {
            end: min(
                (join(so_far, price(stage, start, end)), (*bounds, end))
                for start, (so_far, bounds) in best.items()
                if start < end
            )
            for end in ends
        }
    return best[layers]
