"""Thousands of simulated lives hold every promise; with one line of the core broken, some life shows it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from coordinator.answer_text import AnswerText
from coordinator.jobs import events as job_events
from coordinator.jobs.events import StoredJob
from coordinator.jobs.runner import JobRunner
from coordinator.replica import events as replica_events
from coordinator.replica.attempt import Attempt, RankState
from coordinator.replica.core import ReplicaCore
from coordinator.replica.events import PersistEpoch, ReplicaDown
from coordinator.requests import waiting
from coordinator.requests.core import CoordinatorCore
from coordinator.requests.events import Append, Effect
from coordinator.requests.life import Life, Phase
from coordinator.requests.lives import Lives
from coordinator.requests.router import Link, Router
from echelon.errors import OverloadedError
from echelon.internal import block_hash
from echelon.internal.link import Abandon, Fence, Progress, TokenRun
from tests.simulation.run import MUST_HAPPEN, Simulation
from worker import draft, lanes, prefix_cache, scheduler
from worker.block_pool import BlockPool
from worker.cohorts import Cohorts
from worker.draft import Draft
from worker.engine import Drain, EngineCore
from worker.lanes import Lanes
from worker.plan import Admit, StepPlan, StepResult, Told
from worker.scheduler import Scheduler
from worker.sequence import NO_COHORT, Outcome, Request, Sequence

SEEDS = 2000
BATCHES = 8


@pytest.mark.parametrize("batch", range(BATCHES))
def test_promises_hold(batch: int) -> None:
    happened: Counter[str] = Counter()
    for seed in range(batch, SEEDS, BATCHES):
        simulation = Simulation(seed)
        try:
            simulation.run()
        except Exception as error:
            error.add_note(f"run it again by: python -m tests.simulation --seed {seed}")
            raise
        happened += simulation.coverage()
    never = [name for name in MUST_HAPPEN if not happened[name]]
    assert not never, f"never tried: {never} in {happened}"
    assert happened["answers"] > SEEDS / BATCHES
    assert happened["jobs.results"] > SEEDS / BATCHES


def without(patch: pytest.MonkeyPatch, owner: type, method: str, kind: type) -> None:
    """The method's effects but those of this kind."""
    original = getattr(owner, method)

    def filtered(*arguments: Any) -> list[Any]:
        return [effect for effect in original(*arguments) if not isinstance(effect, kind)]

    patch.setattr(owner, method, filtered)


def deliver_before_journal(patch: pytest.MonkeyPatch) -> None:
    original = Lives.take_effects

    def take_effects(self: Lives, sends: list[Effect]) -> list[Effect]:
        return sorted(original(self, sends), key=lambda effect: isinstance(effect, Append))

    patch.setattr(Lives, "take_effects", take_effects)


def any_attempt(patch: pytest.MonkeyPatch) -> None:
    def current(self: CoordinatorCore, request_id: str, attempt: int) -> Life | None:
        life = self._lives.get(request_id)
        return life if life and life.phase is Phase.RUNNING else None

    patch.setattr(CoordinatorCore, "_current", current)


def any_first_token(patch: pytest.MonkeyPatch) -> None:
    original = Lives.accept

    def accept(self: Lives, now: float, life: Life, run: TokenRun) -> None:
        original(self, now, life, run._replace(first_token=len(life.entry.answers[run.choice].ids)))

    patch.setattr(Lives, "accept", accept)


def no_replay(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Lives, "interrupt", lambda self, now, life, reason: None)


def no_credit_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Link, "release", lambda self, request_id, attempt: None)


def nothing_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Lives, "forget", lambda self, life: None)


def epoch_not_persisted(patch: pytest.MonkeyPatch) -> None:
    """Before a coordinator has died nobody reads it back; the launch has to show it."""
    without(patch, ReplicaCore, "_fence", PersistEpoch)


def launch_before_death(patch: pytest.MonkeyPatch) -> None:
    original = ReplicaCore._fence

    def fence(self: ReplicaCore, now: float, reason: str, suspect: int | None = None) -> list[replica_events.Effect]:
        return original(self, now, reason, suspect) + self._answered(now, replica_events.Killed(self._epoch))

    patch.setattr(ReplicaCore, "_fence", fence)


def any_incarnation(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Attempt, "find", lambda self, index, incarnation: self.everyone.get(index))


def formed_before_all_retired(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RankState, "idle", property(lambda self: self.hello is not None))


def another_layout_adopted(patch: pytest.MonkeyPatch) -> None:
    """Its ranks would compute what they were told for the other."""
    original = ReplicaCore._attached

    def attached(
        self: ReplicaCore, now: float, event: replica_events.Attached, rank: RankState
    ) -> list[replica_events.Effect]:
        return original(self, now, replace(event, layout=self._layout), rank)

    patch.setattr(ReplicaCore, "_attached", attached)


def relayout_not_told(patch: pytest.MonkeyPatch) -> None:
    without(patch, ReplicaCore, "_relayout", ReplicaDown)


def deaths_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ReplicaCore, "_lost", lambda self, now, index, reason: [])


def never_down(patch: pytest.MonkeyPatch) -> None:
    without(patch, ReplicaCore, "_fence", ReplicaDown)


def shown_before_durable(patch: pytest.MonkeyPatch) -> None:
    original = JobRunner.step

    def step(self: JobRunner, now: float, event: job_events.Event) -> list[job_events.Effect]:
        effects = original(self, now, event)
        for effect in effects:
            if isinstance(effect, job_events.Persist) and isinstance(effect.write, job_events.ItemInterrupted):
                self._commit(now, effect.write, [])
        return effects

    patch.setattr(JobRunner, "step", step)


def done_items_start_again(patch: pytest.MonkeyPatch) -> None:
    original = JobRunner._load

    def load(self: JobRunner, now: float, stored: StoredJob, effects: list[job_events.Effect]) -> None:
        original(self, now, replace(stored, done=frozenset()), effects)

    patch.setattr(JobRunner, "_load", load)


def failed_items_not_retried(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(OverloadedError, "retryable", False)


def cancel_before_durable(patch: pytest.MonkeyPatch) -> None:
    original = JobRunner._cancel

    def cancel(self: JobRunner, now: float, job: Any, effects: list[job_events.Effect]) -> None:
        original(self, now, job, effects)
        self._recall(job, effects)

    patch.setattr(JobRunner, "_cancel", cancel)


def window_leaks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(JobRunner, "_land", lambda self, job, index: job.flights.pop(index) and None)


def blocks_not_freed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockPool, "free", lambda self, blocks: None)
    patch.setattr(BlockPool, "check_integrity", lambda self, tables: None)


def stop_judged_late(patch: pytest.MonkeyPatch) -> None:
    original = AnswerText._find
    patch.setattr(AnswerText, "_find", lambda self, text, before: original(self, text[:-1], 0))


def held_back_text_lost_on_resume(patch: pytest.MonkeyPatch) -> None:
    original = Life._read_texts

    def read_texts(self: Life, counts: list[int]) -> None:
        original(self, counts)
        for text in self._texts:
            text._held_back = ""

    patch.setattr(Life, "_read_texts", read_texts)


def min_tokens_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Life, "_ends", lambda self, token_id, count: token_id in self.stop_ids)


def resumed_at_another_choice(patch: pytest.MonkeyPatch) -> None:
    original = Life.attach
    patch.setattr(Life, "attach", lambda self, stream, received: original(self, stream, received[::-1]))


def finishes_in_wrong_order(patch: pytest.MonkeyPatch) -> None:
    original = Lives._finish

    def finish(self: Lives, now: float, life: Life) -> None:
        life.finishes.reverse()
        original(self, now, life)

    patch.setattr(Lives, "_finish", finish)


def attempts_numbered_again_from_one(patch: pytest.MonkeyPatch) -> None:
    """Once all requests that had more are forgotten."""

    def next_attempt(self: Lives) -> int:
        return 1 + max((life.entry.attempt for life in self._lives.values()), default=0)

    patch.setattr(Lives, "next_attempt", next_attempt)


def prompts_logprobs_not_taken(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CoordinatorCore, "_take_prompted", lambda self, prompted: None)


def priority_ignored_by_the_coordinator(patch: pytest.MonkeyPatch) -> None:
    original = waiting._place
    patch.setattr(waiting, "_place", lambda life: (0, *original(life)[1:]))


def priority_ignored_by_the_scheduler(patch: pytest.MonkeyPatch) -> None:
    original = Sequence.of

    def of(request: Request, progress: Progress) -> Sequence:
        sequence = original(request, progress)
        sequence.order = (0, *sequence.order[1:])
        return sequence

    patch.setattr(Sequence, "of", of)


def one_abandoned_choice_releases_all(patch: pytest.MonkeyPatch) -> None:
    original = EngineCore._abandon
    patch.setattr(EngineCore, "_abandon", lambda self, abandon: original(self, replace(abandon, choice=None)))


def abandoned_choices_go_on(patch: pytest.MonkeyPatch) -> None:
    original = EngineCore._abandon

    def abandon(self: EngineCore, abandon: Abandon) -> None:
        if abandon.choice is None:
            original(self, abandon)

    patch.setattr(EngineCore, "_abandon", abandon)


def preempted_without_its_ids(patch: pytest.MonkeyPatch) -> None:
    original = Scheduler._preempt

    def preempt(self: Scheduler, sequence: Sequence) -> None:
        original(self, sequence)
        del sequence.ids[sequence.prompt_tokens :]
        sequence.given = sequence.prompt_tokens

    patch.setattr(Scheduler, "_preempt", preempt)


def block_hash_without_salt(patch: pytest.MonkeyPatch) -> None:
    for module in (scheduler, prefix_cache):
        patch.setattr(module, "root_hash", lambda salt: b"")


def block_hash_without_its_parent(patch: pytest.MonkeyPatch) -> None:
    original = block_hash.chain

    def chain(parent: bytes, ids: tuple[int, ...], block_tokens: int) -> list[bytes]:
        starts = range(0, len(ids) - block_tokens + 1, block_tokens)
        return [original(b"", ids[start : start + block_tokens], block_tokens)[0] for start in starts]

    for module in (scheduler, prefix_cache):
        patch.setattr(module, "chain", chain)


def cached_block_kept_when_given_away(patch: pytest.MonkeyPatch) -> None:
    original = BlockPool.allocate

    def allocate(self: BlockPool) -> int:
        known = dict(self._block_of)
        block = original(self)
        self._block_of = known
        return block

    patch.setattr(BlockPool, "allocate", allocate)
    patch.setattr(BlockPool, "check_integrity", lambda self, tables=(): None)


def last_token_of_the_prompt_from_the_cache(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Sequence, "reusable", property(lambda self: self.given))


def cached_ids_not_told(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(draft, "Told", lambda slot, first, ids: Told(slot, first, ()))


def choices_draw_the_same(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(draft, "Admit", lambda slot, choice, *rest: Admit(slot, 0, *rest))


def ended_epochs_take_requests(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Router, "end", lambda self, replica, epoch: None)


def credits_not_asked_for(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Link, "fits", lambda self, size: True)


def one_s_end_loses_what_others_run(patch: pytest.MonkeyPatch) -> None:
    def running_on(self: Lives, replica: int) -> list[Life]:
        return [life for life in self._lives.values() if life.phase is Phase.RUNNING]

    patch.setattr(Lives, "running_on", running_on)


def only_the_first_replica_is_asked(patch: pytest.MonkeyPatch) -> None:
    original = Router.able
    patch.setattr(Router, "able", lambda self, size: [link for link in original(self, size) if link.fence.replica == 0])


def drains_not_sent(patch: pytest.MonkeyPatch) -> None:
    without(patch, EngineCore, "_plan_ahead", Drain)


def steps_wait_for_no_ids(patch: pytest.MonkeyPatch) -> None:
    original = Draft.plan
    patch.setattr(Draft, "plan", lambda self, fence: replace(original(self, fence), after=0))


def steps_wait_for_the_ids_before_theirs(patch: pytest.MonkeyPatch) -> None:
    original = Draft.plan

    def plan(self: Draft, fence: Fence) -> StepPlan:
        found = original(self, fence)
        return replace(found, after=max(found.after - 1, 0))

    patch.setattr(Draft, "plan", plan)


def lanes_wait_for_their_own_ids_alone(patch: pytest.MonkeyPatch) -> None:
    """The stream of plans has one order of operations: that of the first lane."""
    patch.setattr(lanes, "max", lambda afters: next(iter(afters)), raising=False)


def results_of_another_lane(patch: pytest.MonkeyPatch) -> None:
    """Where both lanes wait for as many, nothing but the ids shows it."""
    original = Lanes.commit

    def commit(self: Lanes, result: StepResult) -> Outcome:
        flights = [scheduler.flights[0] for scheduler in self.schedulers]
        awaited = [(len(flight.sampled), len(flight.scored)) for flight in flights]
        if len(awaited) == 2 and awaited[0] == awaited[1]:
            half = awaited[0][0]
            ids, logprobs = result.ids[half:] + result.ids[:half], result.logprobs[half:] + result.logprobs[:half]
            result = replace(result, ids=ids, logprobs=logprobs)
        return original(self, result)

    patch.setattr(Lanes, "commit", commit)


def cohorts_never_left(patch: pytest.MonkeyPatch) -> None:
    """Nor counted: turns go to sequences that are no more."""
    patch.setattr(Cohorts, "leave", lambda self, sequence: setattr(sequence, "cohort", NO_COHORT))


MUTANT_SEEDS = 2000  # most are caught within ten
MUTANTS: list[Callable[[pytest.MonkeyPatch], None]] = [
    deliver_before_journal,
    any_attempt,
    any_first_token,
    no_replay,
    no_credit_back,
    nothing_forgotten,
    blocks_not_freed,
    epoch_not_persisted,
    launch_before_death,
    any_incarnation,
    formed_before_all_retired,
    another_layout_adopted,
    relayout_not_told,
    deaths_ignored,
    never_down,
    shown_before_durable,
    done_items_start_again,
    failed_items_not_retried,
    cancel_before_durable,
    window_leaks,
    stop_judged_late,
    held_back_text_lost_on_resume,
    min_tokens_ignored,
    resumed_at_another_choice,
    finishes_in_wrong_order,
    attempts_numbered_again_from_one,
    prompts_logprobs_not_taken,
    priority_ignored_by_the_coordinator,
    priority_ignored_by_the_scheduler,
    one_abandoned_choice_releases_all,
    abandoned_choices_go_on,
    preempted_without_its_ids,
    block_hash_without_salt,
    block_hash_without_its_parent,
    cached_block_kept_when_given_away,
    last_token_of_the_prompt_from_the_cache,
    cached_ids_not_told,
    choices_draw_the_same,
    ended_epochs_take_requests,
    credits_not_asked_for,
    one_s_end_loses_what_others_run,
    only_the_first_replica_is_asked,
    drains_not_sent,
    steps_wait_for_no_ids,
    steps_wait_for_the_ids_before_theirs,
    lanes_wait_for_their_own_ids_alone,
    results_of_another_lane,
    cohorts_never_left,
]


# Of each part of the system one; the long run has them all.
QUICK = {
    stop_judged_late,
    priority_ignored_by_the_scheduler,
    preempted_without_its_ids,
    block_hash_without_salt,
    drains_not_sent,
    steps_wait_for_the_ids_before_theirs,
    results_of_another_lane,
}


@pytest.mark.parametrize(
    "mutate",
    [pytest.param(each, marks=() if each in QUICK else pytest.mark.long) for each in MUTANTS],
    ids=lambda mutate: mutate.__name__,
)
def test_the_checker_bites(mutate: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch)
    for seed in range(MUTANT_SEEDS):
        try:
            Simulation(seed).run()
        except AssertionError:  # the checker's, or the cores' own
            return
    pytest.fail(f"{MUTANT_SEEDS} seeds went well under {mutate.__name__}")
