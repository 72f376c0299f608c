"""Plans through stages with bounded edges: whatever arrives, and whenever stages run, all of it comes to its end.

The engine is the real one, and each stage does what `next_op` says; but a stage is no more than a queue here, and one
after another is picked at random among those that can go on. So thousands of timings can be tried.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from echelon.internal.link import Abandon, Assign, Command, Fence
from parallel.schedule import Kind, Op, next_op, stage_state
from tests.unit.paged_device import STOP_ID, PagedDevice, answer, request
from worker.engine import Commanded, Completed, Drain, EngineCore, Event, LinkOpened, RunPlan, SendReport
from worker.limits import EngineLimits
from worker.plan import StepPlan, StepResult

FENCE = Fence(1, 0, 1)
EDGE_ROOM = 2  # hidden states between two stages
BLOCK_TOKENS = 4


@dataclass
class Stage:
    """What it was told and has not taken in, where it stands, and what lies on the edge behind it."""

    number: int
    stages: int
    depth: int
    inbox: deque[tuple[StepPlan, ...] | None] = field(default_factory=deque)
    edge: deque[int] = field(default_factory=deque)  # steps, to the next stage, or their ids back to the first
    forwarded: int = 0
    returned: int = 0

    def __post_init__(self) -> None:
        self.state = stage_state(self.number, self.stages, self.depth)

    @property
    def room(self) -> int:
        return self.depth if self.number == self.stages - 1 else EDGE_ROOM

    def take(self) -> None:
        plans = self.inbox.popleft()
        self.state = self.state.drain() if plans is None else self.state.announce(plans[0].after)


class Pipeline:
    """Stages, an engine, and a device for each data rank that computes a step when the last stage does."""

    def __init__(self, limits: EngineLimits, chance: Random) -> None:
        self.limits = limits
        self.core = EngineCore(FENCE, limits)
        self.stages = [Stage(number, limits.stages, limits.depth) for number in range(limits.stages)]
        self.ids: dict[tuple[str, int], list[int]] = {}
        self.counted: Counter[str] = Counter()
        self._chance = chance
        self._devices = [PagedDevice(limits.block_tokens) for _ in range(limits.data)]
        self._plans: dict[int, tuple[StepPlan, ...]] = {}
        self._results: dict[int, StepResult] = {}
        self._drawn: dict[tuple[int, int], int] = {}  # the step that drew the last id of a slot of a lane
        self._seq = 0
        self.do(LinkOpened(FENCE.term))

    def do(self, event: Event) -> None:
        for effect in self.core.step(0.0, event):
            match effect:
                case RunPlan(plans):
                    self._plans[plans[0].step] = plans
                    self._tell(plans)
                case Drain():
                    self.counted["drains"] += 1
                    self._tell(None)
                case SendReport(report):
                    self._seq = max(self._seq, report.report_seq)
                    for run in report.runs:
                        ids = self.ids.setdefault((run.request, run.choice), [])
                        assert run.first_token == len(ids)
                        ids += run.ids
        self.core.check_integrity()

    def command(self, *assigns: Assign, abandons: tuple[Abandon, ...] = ()) -> None:
        self.do(Commanded(Command(FENCE, self._seq, assigns, abandons)))

    def advance(self) -> bool:
        """Let one stage that can go on do so; False if none can."""
        ready = [stage for stage in self.stages if stage.inbox or self._possible(stage)]
        if not ready:
            return False
        stage = self._chance.choice(ready)
        op = self._possible(stage)
        if op is None or (stage.inbox and self._chance.random() < 0.5):
            stage.take()
        elif op.kind is Kind.FORWARD:
            self._forward(stage, op.microbatch + 1)
        else:
            self._back(stage, op.microbatch + 1)
        first = self.stages[0]
        self.counted["most out"] = max(self.counted["most out"], first.forwarded - first.returned)
        return True

    def finish(self) -> None:
        while self.advance():
            pass
        waiting = [(next_op(stage.state), stage) for stage in self.stages if next_op(stage.state)]
        assert not waiting and not self._plans, f"deadlock: {waiting}, steps {list(self._plans)} are under way"

    def _tell(self, plans: tuple[StepPlan, ...] | None) -> None:
        for stage in self.stages:
            stage.inbox.append(plans)

    def _possible(self, stage: Stage) -> Op | None:
        """Its next operation, if what that needs is there and what it makes has room."""
        op = next_op(stage.state)
        if op is None or stage.stages == 1:
            return op
        first, last = stage.number == 0, stage.number == stage.stages - 1
        if op.kind is Kind.FORWARD:
            arrived = first or self.stages[stage.number - 1].edge
            return op if arrived and (last or len(stage.edge) < stage.room) else None
        return op if (self.stages[-1].edge if first else len(stage.edge) < stage.room) else None

    def _forward(self, stage: Stage, step: int) -> None:
        if stage.number == 0:
            self._read_ids(step)
        else:
            assert self.stages[stage.number - 1].edge.popleft() == step, "edges are queues"
        if stage.number == stage.stages - 1:
            self._results[step] = self._compute(self._plans[step])
        else:
            stage.edge.append(step)
        stage.forwarded = step
        stage.state = stage.state.apply(Op(Kind.FORWARD, step - 1))

    def _back(self, stage: Stage, step: int) -> None:
        last = self.stages[-1]
        if stage is last and stage.stages > 1:
            stage.edge.append(step)
        if stage.number == 0:
            assert stage.stages == 1 or last.edge.popleft() == step, "edges are queues"
            stage.returned = step
        stage.state = stage.state.apply(Op(Kind.BACK, step - 1))
        if stage.number == 0:
            del self._plans[step]
            self.do(Completed(self._results.pop(step)))

    def _read_ids(self, step: int) -> None:
        """The first stage embeds the last ids of decode rows: they must have come back."""
        for lane, plan in enumerate(self._plans[step]):
            for row in plan.rows:
                drawn = self._drawn.get((lane, row.slot), 0) if row.given is None else 0
                assert drawn <= self.stages[0].returned, f"step {step} reads ids of step {drawn}, which are not here"
                if row.sampled:
                    self._drawn[lane, row.slot] = step

    def _compute(self, plans: tuple[StepPlan, ...]) -> StepResult:
        parts = [device.run(plan) for device, plan in zip(self._devices, plans, strict=True)]
        ids = tuple(token for part in parts for token in part.ids)
        slot_s = self._chance.choice((0.0, 0.01, 0.03, 1.0))
        return StepResult(parts[0].step, ids, (None,) * len(ids), slot_s=slot_s)


LIMITS = st.integers(1, 8).flatmap(
    lambda stages: st.builds(
        EngineLimits,
        max_running=st.integers(1, 6),
        kv_blocks=st.sampled_from((8, 9, 10, 12)),
        block_tokens=st.just(BLOCK_TOKENS),
        max_step_tokens=st.sampled_from((1, 5, 16, 64)),
        max_context=st.just(100),
        max_unacked_reports=st.just(1000),
        stages=st.just(stages),
        depth=st.integers(1, stages + 1),
        data=st.integers(1, 2),
    )
)


def test_any_arrivals_complete_without_deadlock() -> None:
    counted: Counter[str] = Counter()

    @settings(
        max_examples=150,
        phases=(Phase.generate,),  # add Phase.shrink to debug
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(limits=LIMITS, seed=st.integers(0, 2**32 - 1), count=st.integers(1, 16))
    def run(limits: EngineLimits, seed: int, count: int) -> None:
        chance = Random(seed)
        pipeline = Pipeline(limits, chance)
        assigns = [
            request(
                f"r{number}",
                range(20 + number % 2, 20 + chance.choice((2, 5, 12))),
                chance.randint(1, 20),
                stop_token_ids=(STOP_ID,) if number % 2 else (),
                grammar=chance.choice(("", "", "digits")),
            )
            for number in range(count)
        ]
        dropped = {assign.request for assign in assigns if chance.random() < 0.1}
        to_come = deque(assigns)
        while to_come:
            assign = to_come.popleft()
            pipeline.command(assign)
            for _ in range(chance.choice((0, 0, 0, 1, 10, 100))):
                pipeline.advance()
            if assign.request in dropped:
                pipeline.command(abandons=(Abandon(assign.request, assign.attempt),))
        pipeline.finish()
        for assign in assigns:
            ids = pipeline.ids.get((assign.request, 0), [])
            whole = answer(assign)
            assert ids == (whole[: len(ids)] if assign.request in dropped else whole)
        most_out = pipeline.counted.pop("most out")
        assert most_out <= (limits.depth if limits.stages > 1 else 1)
        counted["several out"] += most_out > 1
        counted["full"] += most_out == limits.depth > 2
        counted.update(pipeline.counted)
        counted.update(pipeline.core.stats().counters)

    run()
    expected = {"drains", "several out", "full", "preemptions", "chunked_prompts", "decode_rows"}
    assert {name for name, count in counted.items() if count} >= expected, counted


@pytest.mark.parametrize("stages", [2, 4])
def test_without_a_drain_the_last_ids_would_never_come_back(stages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the simulation can tell a deadlock."""
    original = EngineCore._plan_ahead

    def plan_ahead(self: EngineCore) -> list[object]:
        return [effect for effect in original(self) if not isinstance(effect, Drain)]

    monkeypatch.setattr(EngineCore, "_plan_ahead", plan_ahead)
    pipeline = Pipeline(EngineLimits(4, 30, BLOCK_TOKENS, 16, 100, stages=stages, depth=stages), Random(1))
    pipeline.command(request("a", [5, 6, 7], 5))
    with pytest.raises(AssertionError, match="deadlock"):
        pipeline.finish()
