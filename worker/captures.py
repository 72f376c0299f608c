"""Captures: before which step ranks capture which CUDA graph, where an epoch serves before it has them.

Lives in the leader, beside the lanes, without torch, clock or I/O. Ranks of a stage meet inside a graph, so they must
capture the same one at the same plan: plans say so, as they say where experts move. Steps without a graph go eagerly.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from worker.plan import StepPlan

PACE_STEPS = 4  # from one capture to the next, at least: it takes as long as several steps, and streams wait for it


class Captures:
    """Of graphs of these numbers of rows, each once. depth: how many steps pass through the pipeline at once.

    The largest comes first, for all others find room in what it needs; from then on each step of decode rows has some
    graph. Then that of the steps that run now, then the largest that is left.
    """

    def __init__(self, sizes: Sequence[int], depth: int = 1) -> None:
        self._sizes = sorted(sizes)
        self._left = set(sizes)
        self._due_step = 0
        # A capture waits for the device: two stages that did so for different ones could wait for each other.
        self._pace_steps = max(PACE_STEPS, depth)

    @property
    def left(self) -> bool:
        """Whether there is any to come."""
        return bool(self._left)

    def before(self, plans: Sequence[StepPlan]) -> int:
        """Rows of the graph that is captured before a step, of which these are the plans of the data ranks; 0: none.

        Only where a graph would serve it: while prompts are computed, what they wait for is nothing that graphs bring.
        """
        rows = graph_rows(plans) if self._left else 0
        if not rows or plans[0].step < self._due_step:
            return 0
        self._due_step = plans[0].step + self._pace_steps
        return self._take(rows)

    def at_leisure(self) -> int:
        """Rows of the graph that is captured while there is nothing to compute; 0: none is left."""
        return self._take(self._sizes[-1]) if self._left else 0

    def _take(self, rows: int) -> int:
        """The next one, where steps have so many rows."""
        place = bisect_left(self._sizes, rows)
        serving = self._sizes[min(place, len(self._sizes) - 1)]
        begun = len(self._left) < len(self._sizes)
        size = serving if begun and serving in self._left else max(self._left)
        self._left.remove(size)
        return size


def graph_rows(plans: Sequence[StepPlan]) -> int:
    """Rows of the busiest data rank, if all rows of all of them decode and are sampled; else 0: as ranks judge it
    (`worker.decode_graphs.decode_rows`)."""
    alone = all(row.given is None and row.sampled for plan in plans for row in plan.rows)
    return max(len(plan.rows) for plan in plans) if alone else 0
