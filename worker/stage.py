"""Stage: a rank's part in the pipeline, which operation when, by the one rule of parallel/schedule.py.

In every rank's runner thread. The order follows from the stream of plans alone, so that all ranks of a replica know it
without a word. Knows no socket; what an operation does is the runner's business.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from parallel.degrees import Place
from parallel.schedule import Kind, Op, next_op, stage_state
from worker.pending import Queued
from worker.plan import PlanTables
from worker.runner import Runner


class Stage:
    """Takes the stream of plans and does the operations that each makes possible.

    alone: a stage that is first and last has nothing to send back, so only forwards are done.
    """

    def __init__(self, runner: Runner, place: Place, depth: int) -> None:
        self.runner = runner
        self._alone = place.first_stage and place.last_stage
        self._state = stage_state(place.pipeline_rank, place.degrees.pipeline, depth)
        self._announced: deque[PlanTables] = deque()

    def take(self, tables: PlanTables | None) -> Iterator[tuple[Op, Queued]]:
        """A plan, or None where the stream pauses; the operations, as they are queued on the device."""
        if tables is None:
            self._state = self._state.drain()
        else:
            self._announced.append(tables)
            self._state = self._state.announce(tables.after)
        while op := next_op(self._state):
            if op.kind is Kind.FORWARD:
                yield op, self.runner.forward(self._announced.popleft())
            elif not self._alone:
                yield op, self.runner.back()
            self._state = self._state.apply(op)
