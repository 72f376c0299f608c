"""The ranks of a replica as its leader sees them: stages that take plans by the rule of the schedule, and data ranks.

Hidden states and ids travel as in `worker/runner.py`: the first stage knows the ids that were sampled only once they
have come back, and reads what it has. So a step that goes forward too early shows in its tokens, and where nobody says
that no plan comes, the last ids stay on their way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random

from parallel.schedule import Kind, next_op, stage_state
from tests.simulation.device import NOTHING, Device
from worker.limits import EngineLimits
from worker.plan import StepPlan, StepResult

Plans = tuple[StepPlan, ...]  # of one step, one for each data rank


class FirstStage:
    """The ids by slot that a data rank embeds: given ones, told ones, and those that came back."""

    def __init__(self) -> None:
        self._ids: dict[int, dict[int, int]] = {}
        self._admitted_at: dict[int, int] = {}

    def forward(self, plan: StepPlan) -> StepPlan:
        """The plan with the ids of its decode rows, as they are known here."""
        for admit in plan.admits:
            self._ids[admit.slot], self._admitted_at[admit.slot] = {}, plan.step
        for told in plan.told:
            self._ids[told.slot].update(enumerate(told.ids, told.first))
        rows = []
        for row in plan.rows:
            ids = self._ids[row.slot]
            given = (ids.get(row.first, NOTHING),) if row.given is None else row.given
            rows.append(row._replace(given=given))
        return replace(plan, rows=tuple(rows))

    def back(self, plan: StepPlan, ids: Sequence[int]) -> None:
        """Sampled ids have come back; a slot may have another owner by now."""
        sampled = [row for row in plan.rows if row.sampled]
        for row, token_id in zip(sampled, ids, strict=True):
            if self._admitted_at[row.slot] <= plan.step:
                self._ids[row.slot][row.first + row.tokens] = token_id


class Pipeline:
    """slot_s: draws how long a stage takes for a step. on_result(delay_s, result) is told of each, in their order.

    Every stage but the first follows the same stream of plans and never has to wait for anything but the stage before
    it, so its operations are computed with those of the first: all of them when a plan comes, with the times at which
    they end.
    """

    def __init__(
        self,
        limits: EngineLimits,
        noise: Random | None,
        slot_s: Callable[[], float],
        on_result: Callable[[float, StepResult], None],
    ) -> None:
        self._slot_s = slot_s
        self._on_result = on_result
        self._first = [FirstStage() for _ in range(limits.data)]
        self._devices = [Device(limits.block_tokens, noise) for _ in range(limits.data)]
        self._state = stage_state(0, limits.stages, limits.depth)
        self._free_at = [0.0] * limits.stages  # when each stage has done what it was told
        self._announced: deque[Plans] = deque()
        self._out: deque[tuple[float, Plans, list[StepResult]]] = deque()  # computed at, and not back
        self.most_out = 0

    def take(self, now: float, plans: Plans | None) -> None:
        """A step, or None where the stream of plans pauses."""
        self._free_at[0] = max(self._free_at[0], now)
        if plans is None:
            self._state = self._state.drain()
        else:
            self._announced.append(plans)
            self._state = self._state.announce(plans[0].after)
        while op := next_op(self._state):
            self._state = self._state.apply(op)
            if op.kind is Kind.FORWARD:
                self._forward(self._announced.popleft())
            else:
                self._back(now)

    def _forward(self, plans: Plans) -> None:
        embedded = [stage.forward(plan) for stage, plan in zip(self._first, plans, strict=True)]
        parts = [device.run(plan) for device, plan in zip(self._devices, embedded, strict=True)]
        arrived = 0.0
        for stage, free_at in enumerate(self._free_at):
            arrived = self._free_at[stage] = max(free_at, arrived) + self._slot_s()
        self._out.append((arrived, plans, parts))
        self.most_out = max(self.most_out, len(self._out))

    def _back(self, now: float) -> None:
        """The first stage waits for the oldest ids that are out, and the step has ended."""
        computed_at, plans, parts = self._out.popleft()
        ended_at = self._free_at[0] = max(self._free_at[0], computed_at)
        for stage, plan, part in zip(self._first, plans, parts, strict=True):
            stage.back(plan, part.ids)
        self._on_result(ended_at - now, joined(parts, self._slot_s()))


def joined(parts: Sequence[StepResult], slot_s: float) -> StepResult:
    """The results of all data ranks, one behind the other."""
    starts = [sum(len(part.ids) for part in parts[:lane]) for lane in range(len(parts))]
    return StepResult(
        parts[0].step,
        ids=tuple(token_id for part in parts for token_id in part.ids),
        logprobs=tuple(logprob for part in parts for logprob in part.logprobs),
        scores=tuple(scores for part in parts for scores in part.scores),
        faults=tuple((start + row, why) for start, part in zip(starts, parts, strict=True) for row, why in part.faults),
        slot_s=slot_s,
    )
