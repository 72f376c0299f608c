"""Mutants of fences, replicas and jobs: what a fault must not leave behind.

Each breaks one line of production code while its patch is in place; its docstring is the promise that this breaks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from coordinator.jobs import events as job_events
from coordinator.jobs.events import StoredJob
from coordinator.jobs.runner import JobRunner
from coordinator.replica import events as replica_events
from coordinator.replica.attempt import Attempt, RankState
from coordinator.replica.core import ReplicaCore
from coordinator.replica.events import PersistEpoch, ReplicaDown
from echelon.errors import OverloadedError
from tests.simulation import disk
from tests.simulation.mutants.registry import mutant, without


@mutant
def term_unchecked(patch: pytest.MonkeyPatch) -> None:
    """A coordinator that was stopped and replaced writes no epoch when it wakes."""
    patch.setattr(disk, "refuse_older", lambda term, found: None)


@mutant
def epoch_unchecked(patch: pytest.MonkeyPatch) -> None:
    """Ranks are taken over if they serve the epoch that is on disk, and no other."""
    original = ReplicaCore.step

    def step(self: ReplicaCore, now: float, event: replica_events.Event) -> list[replica_events.Effect]:
        if isinstance(event, replica_events.Attached):
            event = replace(event, epoch=self._epoch)
        return original(self, now, event)

    patch.setattr(ReplicaCore, "step", step)


@mutant
def epoch_not_persisted(patch: pytest.MonkeyPatch) -> None:
    """An epoch is on disk before a process of it is started."""
    without(patch, ReplicaCore, "_fence", PersistEpoch)


@mutant
def launch_before_death(patch: pytest.MonkeyPatch) -> None:
    """The processes of an epoch are confirmed dead before the next ones are started."""
    original = ReplicaCore._fence

    def fence(self: ReplicaCore, now: float, *arguments: Any) -> list[replica_events.Effect]:
        return original(self, now, *arguments) + self._answered(now, replica_events.Killed(self._epoch))

    patch.setattr(ReplicaCore, "_fence", fence)


@mutant
def any_incarnation(patch: pytest.MonkeyPatch) -> None:
    """A late word of a process that is gone says nothing of its successor."""
    patch.setattr(Attempt, "find", lambda self, index, incarnation: self.everyone.get(index))


@mutant
def formed_before_all_retired(patch: pytest.MonkeyPatch) -> None:
    """An epoch forms when all its ranks have ended the one before."""
    patch.setattr(RankState, "idle", property(lambda self: self.hello is not None))


@mutant
def another_layout_adopted(patch: pytest.MonkeyPatch) -> None:
    """Ranks that serve another layout than the wanted one are not taken over."""
    original = ReplicaCore._attached

    def attached(
        self: ReplicaCore, now: float, event: replica_events.Attached, rank: RankState
    ) -> list[replica_events.Effect]:
        return original(self, now, replace(event, layout=self._layout), rank)

    patch.setattr(ReplicaCore, "_attached", attached)


@mutant
def relayout_not_told(patch: pytest.MonkeyPatch) -> None:
    """Requests of a replica that is laid out anew go back to the queue."""
    without(patch, ReplicaCore, "_relayout", ReplicaDown)


@mutant
def deaths_ignored(patch: pytest.MonkeyPatch) -> None:
    """A dead rank ends its epoch."""
    patch.setattr(ReplicaCore, "_lost", lambda self, now, index, reason, wedged=False: [])


@mutant
def never_down(patch: pytest.MonkeyPatch) -> None:
    """Requests of an epoch that was fenced go back to the queue."""
    without(patch, ReplicaCore, "_fence", ReplicaDown)


@mutant
def shown_before_durable(patch: pytest.MonkeyPatch) -> None:
    """What is shown of a job is on disk."""
    original = JobRunner.step

    def step(self: JobRunner, now: float, event: job_events.Event) -> list[job_events.Effect]:
        effects = original(self, now, event)
        for effect in effects:
            if isinstance(effect, job_events.Persist) and isinstance(effect.write, job_events.ItemInterrupted):
                self._commit(now, effect.write, [])
        return effects

    patch.setattr(JobRunner, "step", step)


@mutant
def done_items_start_again(patch: pytest.MonkeyPatch) -> None:
    """An item that has its result is not run again."""
    original = JobRunner._load

    def load(self: JobRunner, now: float, stored: StoredJob, effects: list[job_events.Effect]) -> None:
        original(self, now, replace(stored, done=frozenset()), effects)

    patch.setattr(JobRunner, "_load", load)


@mutant
def failed_items_not_retried(patch: pytest.MonkeyPatch) -> None:
    """An item that was refused for lack of room is tried again."""
    patch.setattr(OverloadedError, "retryable", False)


@mutant
def cancel_before_durable(patch: pytest.MonkeyPatch) -> None:
    """Items of a job are cancelled once its cancellation is on disk."""
    original = JobRunner._cancel

    def cancel(self: JobRunner, now: float, job: Any, effects: list[job_events.Effect]) -> None:
        original(self, now, job, effects)
        self._recall(job, effects)

    patch.setattr(JobRunner, "_cancel", cancel)


@mutant
def window_leaks(patch: pytest.MonkeyPatch) -> None:
    """An item that has ended makes room for the next."""
    patch.setattr(JobRunner, "_land", lambda self, job, index: job.flights.pop(index) and None)
