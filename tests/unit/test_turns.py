"""Cohorts in the scheduler: who decodes when, which ids a step waits for, and what of prompts goes beside."""

from __future__ import annotations

from collections import deque
from random import Random

import pytest

from echelon.internal.link import Assign, Fence
from tests.unit.paged_device import PagedDevice, answer, request
from worker.draft import Slot
from worker.limits import EngineLimits
from worker.plan import StepPlan, StepResult
from worker.scheduler import Scheduler

FENCE = Fence(1, 0, 1)
BLOCK_TOKENS = 4


def asked(name: str, prompt: int = 1, max_tokens: int = 60, *, grammar: str = "") -> Assign:
    """No two prompts begin alike."""
    return request(name, range(100 * ord(name), 100 * ord(name) + prompt), max_tokens, grammar=grammar)


class Bench:
    """A scheduler with several steps in flight, a device, and the requests that plans are about."""

    def __init__(self, depth: int, *, max_running: int = 12, max_step_tokens: int = 64) -> None:
        limits = EngineLimits(max_running, 400, BLOCK_TOKENS, max_step_tokens, 400, stages=depth, depth=depth)
        self.scheduler = Scheduler(limits)
        self.max_step_tokens = max_step_tokens
        self.ids: dict[str, list[int]] = {}
        self._device = PagedDevice(BLOCK_TOKENS)
        self._plans: deque[StepPlan] = deque()
        self._names: dict[int, str] = {}  # of slots
        self._seeds: dict[int, str] = {}
        self._drawn: dict[int, int] = {}  # the step that drew the last id of a slot

    def add(self, *assigns: Assign) -> None:
        for assign in assigns:
            self._seeds[assign.sampling.seed] = assign.request
            self.ids[assign.request] = []
            self.scheduler.add(assign)

    def plan(self) -> StepPlan | None:
        """The next step, checked: within the budget, with something to do, and behind the ids that it reads."""
        plan = self.scheduler.schedule(FENCE)
        self.scheduler.check_integrity()
        if plan is None:
            return None
        assert 0 < sum(row.tokens for row in plan.rows) <= self.max_step_tokens
        self._names |= {admit.slot: self._seeds[admit.sampling.seed] for admit in plan.admits}
        read = [self._drawn[row.slot] for row in plan.rows if row.given is None]
        assert plan.after == max(read, default=0) < plan.step
        self._drawn |= {row.slot: plan.step for row in plan.rows if row.sampled}
        self._plans.append(plan)
        return plan

    def planned(self) -> StepPlan:
        plan = self.plan()
        assert plan is not None
        return plan

    def decoded(self) -> str:
        """Whose rows the next step has, as one-letter names; it has no chunks."""
        plan = self.planned()
        assert all(row.given is None for row in plan.rows)
        return "".join(sorted(self._names[row.slot] for row in plan.rows))

    def chunks(self) -> dict[str, int]:
        """The next step's tokens of prompts."""
        return {self._names[row.slot]: row.tokens for row in self.planned().rows if row.given is not None}

    def commit(self, slot_s: float = 0.0) -> None:
        result = self._device.run(self._plans.popleft())
        result = StepResult(result.step, result.ids, result.logprobs, result.scores, slot_s=slot_s)
        for run in self.scheduler.commit(result).runs:
            self.ids[run.request] += run.ids

    def commit_all(self, slot_s: float = 0.0) -> None:
        while self._plans:
            self.commit(slot_s)

    def sizes(self, depth: int) -> list[int]:
        """How many rows the next steps of one round have."""
        return [len(self.planned().rows) for _ in range(depth)]


def decoding(bench: Bench, names: str) -> None:
    """Requests whose prompts are computed, in one step and thus spread over the cohorts in this order."""
    bench.add(*map(asked, names))
    while any(row.given is not None for row in bench.planned().rows):
        bench.commit_all()
    bench.commit_all()


@pytest.mark.parametrize("gone", ["adgj", "behk", "cfil", "adgjbehk", "behkcfil", "abcdefghijk"])
def test_when_a_cohort_ends_others_take_its_slots(gone: str) -> None:
    """Whichever it is: else a stage would stand idle for as long as nobody new comes."""
    bench = Bench(3)
    decoding(bench, "abcdefghijkl")
    for name in gone:
        bench.scheduler.release(name)
    for _ in range(6):
        bench.planned()
        bench.commit_all()
    left = 12 - len(gone)
    sizes = bench.sizes(min(3, left))
    assert sum(sizes) == left and max(sizes) - min(sizes) <= 1, sizes


@pytest.mark.parametrize("seed", range(6))
def test_cohorts_stay_even_as_requests_come_and_go(seed: int) -> None:
    chance, depth, names = Random(seed), 2 + seed % 3, deque("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    bench = Bench(depth, max_running=60)
    while names:
        bench.add(asked(names.popleft(), chance.randint(1, 9)))
        for name in [assign.request for assign in bench.scheduler if chance.random() < 0.08]:
            bench.scheduler.release(name)
        for _ in range(chance.randint(0, 3)):
            bench.plan()
            if chance.random() < 0.7:
                bench.commit_all()
    bench.commit_all()
    for _ in range(4 * depth):
        bench.planned()
        bench.commit_all()
    sizes = bench.sizes(depth)
    assert sum(sizes) == len(bench.scheduler) and max(sizes) - min(sizes) <= 1, sizes


def test_cohorts_take_turns_and_empty_ones_are_passed_over() -> None:
    bench = Bench(4)
    decoding(bench, "ab")
    assert "".join(bench.decoded() for _ in range(8)) in ("abababab", "babababa")


def test_a_new_request_joins_the_smallest_cohort() -> None:
    bench = Bench(3)
    decoding(bench, "abcdefgh")
    assert sorted(bench.sizes(3)) == [2, 3, 3]
    bench.add(asked("i"))
    bench.planned()
    bench.commit_all()
    for _ in range(3):
        bench.planned()
        bench.commit_all()
    assert bench.sizes(3) == [3, 3, 3]


def test_who_waits_for_an_id_in_flight_keeps_nobody_else_waiting() -> None:
    """Constrained rows need their last id; their cohort's turn goes to the next one, and comes back."""
    bench = Bench(2)
    bench.add(asked("a", grammar="digits"), asked("b"))
    assert [bench.chunks() for _ in range(2)] == [{"a": 1}, {"b": 1}]
    assert [bench.decoded() for _ in range(3)] == ["b"] * 3
    bench.commit()
    assert {bench.decoded(), bench.decoded()} == {"a", "b"}
    assert [bench.decoded() for _ in range(3)] == ["b"] * 3
    bench.commit_all()
    assert {bench.decoded(), bench.decoded()} == {"a", "b"}


def test_a_step_of_constrained_rows_alone_waits() -> None:
    bench = Bench(2)
    bench.add(asked("a", grammar="digits"), asked("b", grammar="digits"))
    assert [bench.chunks() for _ in range(2)] == [{"a": 1}, {"b": 1}]
    assert bench.plan() is None
    bench.commit()
    assert bench.decoded() == "a" and bench.plan() is None
    bench.commit()
    assert bench.decoded() == "b" and bench.plan() is None


def test_a_step_waits_for_the_ids_that_it_reads_and_for_no_later_ones() -> None:
    bench = Bench(3)
    decoding(bench, "abc")
    plans = [bench.planned() for _ in range(6)]
    assert [plan.after - plan.step for plan in plans[3:]] == [-3] * 3, "each cohort reads its own last round"
    bench.add(asked("d", 30))
    beside = bench.planned()
    assert beside.after == beside.step - 3, "a chunk reads no id"


def test_chunks_alone_wait_for_nothing() -> None:
    bench = Bench(3)
    bench.add(asked("a", 150))
    assert [bench.planned().after for _ in range(3)] == [0] * 3


def test_a_prompt_alone_is_spread_over_the_stages() -> None:
    """It would fit into one step, and the other stages would have nothing to do meanwhile."""
    bench = Bench(3)
    bench.add(asked("a", 48))
    assert [bench.chunks() for _ in range(3)] == [{"a": 16}] * 3
    whole = Bench(1)
    whole.add(asked("a", 48))
    assert whole.chunks() == {"a": 48}


def test_a_prompt_longer_than_the_pipeline_fills_the_budget() -> None:
    bench = Bench(3)
    bench.add(asked("a", 150), asked("b", 150))
    assert bench.chunks() == {"a": 64}


def test_a_prompt_goes_on_however_heavy_decoding_is() -> None:
    bench = Bench(2)
    decoding(bench, "abcdef")
    for step in range(40):  # a decoding row costs as much as hundreds of a prompt's tokens
        bench.planned()
        bench.commit_all(slot_s=1.0 + step % 3 * 0.01)
    bench.add(asked("x", 60), asked("y", 60))
    chunks = []
    while not bench.ids["y"]:
        chunks.append(bench.chunks())
        bench.commit_all(slot_s=1.0)
    computing = chunks[: max(index for index, chunk in enumerate(chunks) if chunk) + 1]
    assert all(computing), "no step without a chunk while a prompt waits"
    for name in "xy":
        assert sum(chunk.get(name, 0) for chunk in chunks) == 60


def test_who_was_admitted_without_room_for_a_chunk_begins_in_a_later_step() -> None:
    """A slot's time is full after the first prompt; the second has its slot and blocks, and ranks are told at once."""
    bench = Bench(3)
    assigns = [asked("a", 48, 4), asked("b", 48, 4)]
    bench.add(*assigns)
    first = bench.planned()
    assert len(first.admits) == 2 and [row.tokens for row in first.rows] == [32]
    while not bench.scheduler.idle:
        while bench.plan():
            pass
        bench.commit()
    assert bench.ids == {assign.request: answer(assign) for assign in assigns}


def test_a_plan_that_admits_somebody_is_never_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside nothing else the first prompt has a token's room at least, whatever a slot is believed to cost."""
    targets: list[float] = []

    def tokens(self: Slot, beside: object, first: int, waiting: int, original: object = Slot.tokens) -> int:
        targets.append(self.target_s)
        return original(Slot(self.model, 0.0, self.limits), beside, first, waiting)  # type: ignore[operator, no-any-return]

    monkeypatch.setattr(Slot, "tokens", tokens)
    bench = Bench(2)
    bench.add(asked("a", 40), asked("b", 40))
    admitted = set()
    for _ in range(6):
        admitted |= {admit.slot for admit in bench.planned().admits}
        bench.commit_all()
    assert targets and len(admitted) == 2
