"""Thousands of simulated lives hold every promise; with one line of the core broken, some life shows it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest

from coordinator.core import CoordinatorCore
from coordinator.life import Life, Phase
from coordinator.lives import Lives
from coordinator.requests import Append, Effect
from coordinator.router import Link
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
        happened += simulation.happened
        happened["answered"] += answered(simulation.users)
        happened["restarts"] += simulation.coordinator.term - 1
    assert all(happened[fault] for fault in FAULTS), f"nothing was tried: {happened}"
    assert happened["answered"] > SEEDS / BATCHES
    assert happened["restarts"] > happened["coordinator"] > 0, "no crash between effects"


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
        original(self, now, life, replace(run, first_token=len(life.entry.ids)))

    patch.setattr(Lives, "accept", accept)


def no_replay(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Lives, "interrupt", lambda self, now, life, reason: None)


def no_credit_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Link, "release", lambda self, request_id, attempt: None)


def nothing_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Lives, "_forget", lambda self, life: None)


def blocks_not_freed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockPool, "free", lambda self, blocks: None)
    patch.setattr(BlockPool, "check_integrity", lambda self, tables: None)


MUTANTS: list[Callable[[pytest.MonkeyPatch], None]] = [
    deliver_before_journal,
    any_attempt,
    any_first_token,
    no_replay,
    no_credit_back,
    nothing_forgotten,
    blocks_not_freed,
]


@pytest.mark.parametrize("mutate", MUTANTS, ids=lambda mutate: mutate.__name__)
def test_the_checker_bites(mutate: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch)
    for seed in range(200):
        try:
            Simulation(seed).run()
        except AssertionError:  # the checker's, or the cores' own
            return
    pytest.fail(f"200 seeds went well under {mutate.__name__}")
