"""Cohorts: which decoding requests step together, so that every slot of the pipeline takes equally long.

Pure and torch-free, called by the leader's scheduler. A pipeline of p stages needs p cohorts (or p + 1) to keep all
stages busy, and a round takes p times the slowest one. Requests end and begin at random, so cohorts drift apart; here
some move. It knows costs, and no request, plan or clock.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

UNPLACED = -1  # cohort of a request that has none yet

TOLERANCE = 0.02  # of the mean load: a move costs its request one slot, so small differences are left alone


def balance_cohorts(
    costs: Sequence[float],
    current: Sequence[int],
    cohorts: int,
    *,
    tolerance: float = TOLERANCE,
    max_moves: int | None = None,
) -> tuple[int, ...]:
    """The cohort of each request, [requests]; costs > 0 in any unit, current in 0 .. cohorts - 1 or UNPLACED.

    1. Requests without a cohort, the costliest first, each go to the lightest (longest processing time first: Graham
       1969). A cohort that is no more, because there are fewer now, counts as none.
    2. While the heaviest exceeds the lightest by more than tolerance * mean, the request whose cost is nearest to half
       the gap moves from one to the other; none moves that costs as much as the gap. At most max_moves move.

    Unless max_moves ends it, the heaviest then exceeds the lightest by at most tolerance * mean, or by less than every
    cost in the heaviest, the first of several. Requests of equal cost move as few times as any rule could.
    """
    assert cohorts >= 1, f"{cohorts} cohorts"
    assert len(costs) == len(current), f"{len(costs)} costs of {len(current)} requests"
    placed = [cohort if 0 <= cohort < cohorts else UNPLACED for cohort in current]
    loads = [0.0] * cohorts
    members: list[list[tuple[float, int]]] = [[] for _ in range(cohorts)]  # (cost, request), ascending

    def put(request: int, cohort: int) -> None:
        placed[request] = cohort
        loads[cohort] += costs[request]
        insort(members[cohort], (costs[request], request))

    for request, cohort in enumerate(placed):
        if cohort != UNPLACED:
            put(request, cohort)
    homeless = (request for request, cohort in enumerate(placed) if cohort == UNPLACED)
    for request in sorted(homeless, key=lambda request: (-costs[request], request)):
        put(request, loads.index(min(loads)))
    mean = sum(loads) / cohorts
    moves = 0
    while max_moves is None or moves < max_moves:
        heaviest, lightest = loads.index(max(loads)), loads.index(min(loads))
        gap = loads[heaviest] - loads[lightest]
        mover = _nearest(members[heaviest], gap)
        if gap <= tolerance * mean or mover is None:
            break
        cost, request = members[heaviest].pop(mover)
        loads[heaviest] -= cost
        put(request, lightest)
        moves += 1  # each lessens the sum of squared loads, so this ends
    return tuple(placed)


def _nearest(members: list[tuple[float, int]], gap: float) -> int | None:
    """The index of the cost nearest to half the gap, among those below the gap; None if there is none."""
    above = bisect_left(members, (gap / 2, 0))
    near = [index for index in (above - 1, above) if 0 <= index < len(members)]
    best = min(near, key=lambda index: abs(members[index][0] - gap / 2), default=None)
    return best if best is not None and members[best][0] < gap * (1 - 1e-9) else None
