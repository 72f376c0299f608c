"""Any workload in too small a pool: every choice gets the ids that it gets alone, and nothing is kept in the end.

Any number of stages, of steps in flight and of data ranks. Plans run on devices that see only what plans tell, and
read what they computed before through block tables. What is to be shown has to happen: preemptions, hits, shared
prompts and the rest are counted over all examples.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import given as given_by
from hypothesis import strategies as st

from echelon.internal.link import Assign, Fence, Finish, Progress
from tests.unit.paged_device import STOP_ID, PagedDevice, answer, prompt_scores, request
from worker.draft import SCORED_STEP_TOKENS
from worker.lanes import Lanes
from worker.limits import EngineLimits, decode_places, refusal
from worker.plan import StepPlan, StepResult, lane_of
from worker.scheduler import Scheduler
from worker.sequence import Outcome

FENCE = Fence(1, 0, 1)
PROMPTS = (tuple(range(20, 40)), (*range(20, 26), *range(50, 64)))  # they begin alike


@dataclass
class Book:
    """What is known of a request outside: each choice's ids, all that it will have, and which ended or are unwanted."""

    assign: Assign
    ids: dict[int, list[int]]
    whole: dict[int, list[int]]
    over: set[int] = field(default_factory=set)
    prompted: bool = False
    released: bool = False


class Workbench:
    """Lanes, their devices and the plans between them; checks all that each of them says."""

    def __init__(self, limits: EngineLimits) -> None:
        self.limits = limits
        self.lanes = Lanes(limits, lambda: self.guess)
        self.devices = [PagedDevice(limits.block_tokens) for _ in range(limits.data)]
        self.plans: deque[tuple[StepPlan, ...]] = deque()
        self.planned_steps = 0
        self.drawn: dict[tuple[int, int], int] = {}  # the step that drew the last id of a slot of a lane
        self.books: dict[str, Book] = {}
        self.counted: Counter[str] = Counter()

    def add(self, assign: Assign) -> None:
        if not refusal(assign, self.limits):
            ids = {progress.choice: list(progress.generated) for progress in assign.choices}
            self.books[assign.request] = Book(assign, ids, {choice: answer(assign, choice) for choice in ids})
            self.take(self.lanes.add(assign))

    def again(self, name: str) -> None:
        """A newer attempt at what has not ended, with the ids that are known."""
        book = self.books[name]
        left = tuple(Progress(choice, tuple(ids)) for choice, ids in book.ids.items() if choice not in book.over)
        if self.lanes.held_attempt(name) is not None:
            self.take(self.lanes.release(name))
        if left:
            book.assign = replace(book.assign, attempt=book.assign.attempt + 1, choices=left)
            book.prompted = book.released = False
            self.take(self.lanes.add(book.assign))

    def release(self, name: str, choice: int | None) -> None:
        if self.lanes.held_attempt(name) is not None:
            book = self.books[name]
            book.over |= set(book.ids) if choice is None else {choice} & set(book.ids)
            self.take(self.lanes.release(name, choice))

    def schedule(self) -> None:
        if len(self.plans) >= self.limits.depth + 2:
            return
        if plans := self.lanes.schedule(FENCE):
            self.check_step(plans)
            self.plans.append(plans)
        else:
            self.check_nothing_can_run()

    def guess(self, ids: Sequence[int], most: int) -> tuple[int, ...]:
        """Now and then nothing, or wrong in any place, but mostly what will be drawn."""
        known, luck = tuple(ids), random.Random(sum(ids))
        for book in self.books.values():
            for whole in book.whole.values():
                coming = (*book.assign.prompt, *whole)
                if coming[: len(known)] == known and luck.random() < 0.9:
                    guessed = (*coming, STOP_ID, 1, 2, 3)[len(known) : len(known) + most]
                    return tuple(token if luck.random() < 0.8 else token + 1 for token in guessed)
        return ()

    def check_nothing_can_run(self) -> None:
        """Without a step, all that run wait for an id in flight, or half of them do."""
        running = [sequence for scheduler in self.lanes.schedulers for sequence in scheduler._running]
        waiting = [sequence for sequence in running if sequence.planned >= len(sequence.ids)]
        assert all(sequence.constrained or self.limits.speculation_tokens for sequence in waiting)
        together = self.limits.speculation_tokens and self.limits.depth == self.limits.data == 1
        assert 2 * len(waiting) >= len(running) if together else waiting == running
        assert self.plans or not running
        self.counted["waited for ids"] += bool(running)

    def complete(self) -> None:
        if self.plans:
            plans = self.plans.popleft()
            parts = [device.run(plan) for device, plan in zip(self.devices, plans, strict=True)]
            result = StepResult(
                parts[0].step,
                ids=tuple(token for part in parts for token in part.ids),
                logprobs=tuple(logprob for part in parts for logprob in part.logprobs),
                scores=tuple(scores for part in parts for scores in part.scores),
                slot_s=parts[0].step * 7 % 11 * 0.01,  # any times at all, some not measured
            )
            self.take(self.lanes.commit(result))
            self.counted["completed"] += 1

    def check_step(self, plans: tuple[StepPlan, ...]) -> None:
        """All lanes have one, with equal numbers; the step waits for the ids that it reads, and for no later ones."""
        self.planned_steps += 1
        assert len(plans) == self.limits.data and any(plan.rows for plan in plans)
        shapes = tuple(map(lane_of, plans)) if len(plans) > 1 else ()
        read = [0]
        for lane, plan in enumerate(plans):
            self.check_plan(plan)
            assert plan.step == self.planned_steps and plan.lanes == shapes
            read += [self.drawn[lane, row.slot] for row in plan.rows if row.given is None]
            self.counted["stood by"] += not plan.rows
            self.counted["admitted without a row"] += len(plan.admits) > sum(row.given is not None for row in plan.rows)
        assert [plan.after for plan in plans] == [max(read)] * len(plans) and max(read) < self.planned_steps
        for lane, plan in enumerate(plans):
            self.drawn |= {(lane, row.slot): plan.step for row in plan.rows if row.sampled}

    def check_plan(self, plan: StepPlan) -> None:
        assert sum(row.tokens for row in plan.rows) <= self.limits.max_step_tokens
        assert sum(row.tokens for row in plan.rows if row.scored is not None) <= SCORED_STEP_TOKENS
        drafts = {(told.slot, told.first + place) for told in plan.told if told.first for place in range(len(told.ids))}
        slots = [row.slot for row in plan.rows if (row.slot, row.first) not in drafts]
        assert len(set(slots)) == len(slots) <= self.limits.max_running
        assert len(plan.rows) == len(slots) + len(drafts), "each draft has a row"
        places = decode_places(self.limits.max_running, self.limits.speculation_tokens)
        assert sum(row.given is None for row in plan.rows) <= places
        for before, row in pairwise(plan.rows):
            if (row.slot, row.first) in drafts:
                assert (before.slot, before.first + 1, row.given) == (row.slot, row.first, None)
        assert all(count <= self.limits.speculation_tokens for count in Counter(slot for slot, _ in drafts).values())
        decodes = [row.given is None for row in plan.rows]
        assert decodes == sorted(decodes, reverse=True), "decode rows come first"
        assert all(row.sampled for row in plan.rows if row.given is None)
        if self.limits.depth == 1:  # several are paced: who is admitted may wait for his first chunk
            assert {admit.slot for admit in plan.admits} <= set(slots)
        assert all(0 <= block < self.limits.kv_blocks for _, _, block in plan.blocks)

    def take(self, outcome: Outcome) -> None:
        for told in outcome.prompted:
            book = self.books[told.request]
            assert told.attempt == book.assign.attempt and not book.prompted, "told twice"
            assert told.prompt_logprobs == prompt_scores(book.assign)
            assert 0 <= told.cached_tokens < len(book.assign.prompt) + 1
            book.prompted = True
        for run in outcome.runs:
            book = self.books[run.request]
            assert run.attempt == book.assign.attempt and run.choice not in book.over and not book.released
            ids, whole = book.ids[run.choice], book.whole[run.choice]
            assert run.first_token == len(ids) and (book.prompted or not run.ids)
            ids += run.ids
            assert ids == whole[: len(ids)]
            assert (run.finish is not None) == (len(ids) == len(whole))
            if run.finish:
                assert (run.finish is Finish.STOP) == (ids[-1] in book.assign.sampling.stop_token_ids)
                book.over.add(run.choice)
        for released in outcome.released:
            book = self.books[released.request]
            if released.attempt == book.assign.attempt:
                assert not book.released
                book.released = True
        self.lanes.check_integrity()

    def finish(self) -> None:
        """Whatever is left comes to its end, with the device one plan behind those in flight."""
        while not self.lanes.idle or self.plans:
            for _ in range(self.limits.depth + 1 - len(self.plans)):
                self.schedule()
            assert self.plans, "it is stuck"
            self.complete()
        for book in self.books.values():
            assert book.released and book.over == set(book.ids)
        assert self.lanes.blocks_referenced == 0
        self.counted.update(self.lanes.counters)
        self.counted["cached_at_the_end"] += self.lanes.blocks_cached


BOUNDS = st.builds(
    EngineLimits,
    max_running=st.integers(1, 4),
    kv_blocks=st.integers(5, 14),
    block_tokens=st.integers(1, 4),
    max_step_tokens=st.integers(1, 12),
    max_context=st.just(100),
    stages=st.integers(1, 4),
    depth=st.integers(1, 4),
    data=st.integers(1, 3),
    speculation_tokens=st.sampled_from((0, 1, 3)),
)


@st.composite
def assignments(draw: st.DrawFn, number: int) -> Assign:
    stop = draw(st.booleans())
    return request(
        f"r{number}",
        draw(st.sampled_from(PROMPTS))[: draw(st.integers(1, 16))],
        draw(st.integers(1, 10)),
        choices=[Progress(choice) for choice in sorted(draw(st.sets(st.integers(0, 3), min_size=1, max_size=3)))],
        priority=draw(st.sampled_from((0, 0, 0, -1, 1))),
        salt=draw(st.sampled_from(("", "", "", "tenant"))),
        stop_token_ids=(STOP_ID,) if stop else (),
        min_tokens=draw(st.integers(0, 3)),
        logprobs=draw(st.sampled_from((None, 1))),
        prompt_logprobs=draw(st.sampled_from((None, None, 0, 2))),
        grammar=draw(st.sampled_from(("", "", "digits"))),
    )


def test_every_choice_gets_the_ids_it_gets_alone_and_nothing_is_kept() -> None:
    counted: Counter[str] = Counter()

    @settings(
        max_examples=300,
        phases=(Phase.generate,),  # add Phase.shrink to debug
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given_by(
        limits=BOUNDS,
        assigns=st.tuples(*(assignments(number) for number in range(6))),
        acts=st.lists(st.tuples(st.integers(0, 11), st.integers(0, 5), st.integers(0, 4)), min_size=20, max_size=60),
    )
    def run(limits: EngineLimits, assigns: tuple[Assign, ...], acts: list[tuple[int, int, int]]) -> None:
        bench = Workbench(limits)
        to_add = deque(assigns)
        for act, number, choice in acts:
            name = f"r{number}"
            if act <= 2 and to_add:
                bench.add(to_add.popleft())
            elif act <= 6:
                bench.schedule()
            elif act <= 9:
                bench.complete()
            elif act == 10 and name in bench.books:
                bench.release(name, choice if choice < 4 else None)
            elif act == 11 and name in bench.books:
                bench.again(name)
        for assign in to_add:
            bench.add(assign)
        bench.finish()
        counted.update(bench.counted)

    run()
    happened = {name for name, count in counted.items() if count}
    expected = (
        "preemptions recomputed_tokens cache_hits cached_tokens shared_prefix_tokens replayed_requests chunked_prompts"
    )
    also = {"stood by", "admitted without a row", "waited for ids", "drafted_tokens", "accepted_tokens"}
    assert happened >= {*expected.split(), *also}, f"not all was tried: {counted}"


@pytest.mark.parametrize("kv_blocks", [6, 7, 9, 12])
@pytest.mark.parametrize("constrained", [False, True])
def test_a_pool_for_one_serves_many_by_preemption(kv_blocks: int, constrained: bool) -> None:
    """All at once, every one of them as large as the smallest pool."""
    bench = Workbench(EngineLimits(6, kv_blocks, 4, 64, 100))
    for number in range(5):
        prompt = range(100 * number, 100 * number + 3)
        bench.add(request(f"r{number}", prompt, 21, priority=number % 2, grammar="digits" if constrained else ""))
    bench.finish()
    assert bench.counted["preemptions"] >= 3
    assert bench.counted["completed"] <= 5 * 21 * (2 if constrained else 1) + 10, "it does not go in circles"


def test_a_corrupted_cached_block_changes_what_comes_after_it() -> None:
    """So the ids really come from the blocks that were found, not from somewhere else."""

    def ids_after(corrupt: bool) -> list[int]:
        scheduler, device = Scheduler(EngineLimits(2, 16, 4, 64, 100)), PagedDevice(4, check=False)
        ids: list[int] = []
        for name in "ab":
            scheduler.add(request(name, PROMPTS[0][:11], 5, seed=1))
            while not scheduler.idle:
                plan = scheduler.schedule(FENCE)
                assert plan is not None
                ids += [token_id for run in scheduler.commit(device.run(plan)).runs for token_id in run.ids]
            if corrupt and name == "a":
                (place,) = [place for place, (token_id, _) in device.memory.items() if token_id == PROMPTS[0][2]]
                device.memory[place] = (99, 99)
        assert scheduler.counters["cached_tokens"] == 8
        return ids

    whole = ids_after(corrupt=False)
    assert whole[:5] == whole[5:]
    assert ids_after(corrupt=True) != whole and ids_after(corrupt=True)[:5] == whole[:5]
