"""Thousands of simulated lives hold every promise; with one line of the core broken, some life shows it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from coordinator.jobs import events as job_events
from coordinator.jobs.events import StoredJob
from coordinator.jobs.runner import JobRunner
from coordinator.replica import events as replica_events
from coordinator.replica.core import ReplicaCore
from coordinator.replica.events import PersistEpoch, ReplicaDown
from coordinator.requests.core import CoordinatorCore
from coordinator.requests.events import Append, Effect
from coordinator.requests.life import Life, Phase
from coordinator.requests.lives import Lives
from coordinator.requests.router import Link
from echelon.errors import OverloadedError
from echelon.internal.link import TokenRun
from tests.simulation.client import answered
from tests.simulation.run import FAULTS, Simulation
from worker.block_pool import BlockPool

SEEDS = 2000
BATCHES = 20


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
        happened += simulation.happened + simulation.world.checker.told
        happened["answered"] += answered(simulation.users)
        happened["restarts"] += simulation.coordinator.term - 1
        happened["interrupted"] += sum(len(row.interrupted) for row in simulation.coordinator.job_table.rows.values())
        happened["results"] += sum(len(row.results) for row in simulation.coordinator.job_table.rows.values())
    tried = (*FAULTS, "replica.adopted", "request.replayed", "request.parked", "interrupted")
    assert all(happened[each] for each in tried), f"not all was tried: {happened}"
    assert happened["results"] > SEEDS / BATCHES
    assert happened["answered"] > SEEDS / BATCHES
    assert happened["restarts"] > happened["coordinator"] > 0, "no crash between effects"


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
        original(self, now, life, run._replace(first_token=len(life.entry.ids)))

    patch.setattr(Lives, "accept", accept)


def no_replay(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Lives, "interrupt", lambda self, now, life, reason: None)


def no_credit_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Link, "release", lambda self, request_id, attempt: None)


def nothing_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Lives, "_forget", lambda self, life: None)


def epoch_not_persisted(patch: pytest.MonkeyPatch) -> None:
    """Before a coordinator has died nobody reads it back; the launch has to show it."""
    without(patch, ReplicaCore, "_fence", PersistEpoch)


def launch_before_death(patch: pytest.MonkeyPatch) -> None:
    original = ReplicaCore._fence

    def fence(self: ReplicaCore, now: float, reason: str, suspect: int | None = None) -> list[replica_events.Effect]:
        return original(self, now, reason, suspect) + self._killed(now, replica_events.Killed(self._epoch))

    patch.setattr(ReplicaCore, "_fence", fence)


def any_incarnation(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ReplicaCore, "_rank_of", lambda self, event: self._attempt.ranks.get(event.rank))


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


MUTANT_SEEDS = 2_000  # most are caught within ten
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
    deaths_ignored,
    never_down,
    shown_before_durable,
    done_items_start_again,
    failed_items_not_retried,
    cancel_before_durable,
    window_leaks,
]


@pytest.mark.parametrize("mutate", MUTANTS, ids=lambda mutate: mutate.__name__)
def test_the_checker_bites(mutate: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch)
    for seed in range(MUTANT_SEEDS):
        try:
            Simulation(seed).run()
        except AssertionError:  # the checker's, or the cores' own
            return
    pytest.fail(f"{MUTANT_SEEDS} seeds went well under {mutate.__name__}")
