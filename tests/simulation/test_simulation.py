"""Thousands of simulated lives hold every promise; with one line of the core broken, some life shows it."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.simulation.faults import CELLS, FAULTS, IMPOSSIBLE
from tests.simulation.mutants.all import MUTANTS
from tests.simulation.mutants.registry import SEEDS as MUTANT_SEEDS
from tests.simulation.mutants.registry import promise, red_at
from tests.simulation.phases import Cell, table
from tests.simulation.run import MUST_HAPPEN, Simulation

SEEDS = 2000
BATCHES = 8
MORE_SEEDS = 8000  # of the long run
MIN_HITS = 1  # of each fault in each phase, over SEEDS


@pytest.fixture(scope="module")
def hits() -> dict[int, Counter[Cell]]:
    """By batch, how often each fault struck in each phase."""
    return {}


def live(seed: int) -> Simulation:
    """One life to its end; what breaks says how to see it again."""
    simulation = Simulation(seed)
    try:
        simulation.run()
    except Exception as error:
        error.add_note(f"run it again by: python -m tests.simulation --seed {seed}")
        raise
    return simulation


@pytest.mark.parametrize("batch", range(BATCHES))
def test_promises_hold(batch: int, hits: dict[int, Counter[Cell]]) -> None:
    happened: Counter[str] = Counter()
    struck: Counter[Cell] = Counter()
    for seed in range(batch, SEEDS, BATCHES):
        simulation = live(seed)
        happened += simulation.coverage()
        struck += simulation.faults.hits
    hits[batch] = struck
    never = [name for name in MUST_HAPPEN if not happened[name]]
    assert not never, f"never tried: {never} in {happened}"
    assert happened["answers"] > SEEDS / BATCHES
    assert happened["jobs.results"] > SEEDS / BATCHES


def test_every_fault_strikes_in_every_phase(hits: dict[int, Counter[Cell]]) -> None:
    if len(hits) < BATCHES:
        pytest.skip("counts what all batches did")
    total = sum(hits.values(), Counter[Cell]())
    seldom = [cell for cell in CELLS if total[cell] < MIN_HITS]
    assert not seldom, f"{seldom} in\n{table(total, FAULTS, IMPOSSIBLE)}"


@pytest.mark.long
@pytest.mark.parametrize("batch", range(4 * BATCHES))
def test_promises_hold_for_longer(batch: int) -> None:
    for seed in range(SEEDS + batch, SEEDS + MORE_SEEDS, 4 * BATCHES):
        live(seed)


# Of each promise of recovery one that is caught at once; `make mutants` and the long run have them all.
QUICK = {
    "acknowledged_before_journal",
    "any_attempt",
    "any_first_token",
    "block_hash_without_salt",
    "deliver_before_journal",
    "drains_not_sent",
    "launch_before_death",
    "no_credit_back",
    "preempted_without_its_ids",
    "results_of_another_lane",
    "steps_wait_for_the_ids_before_theirs",
    "stop_judged_late",
    "term_unchecked",
}


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=() if each in QUICK else pytest.mark.long) for each in MUTANTS]
)
def test_the_checker_bites(name: str) -> None:
    seed = red_at(MUTANTS[name])
    assert seed is not None, f"{MUTANT_SEEDS} seeds went well under {name}: {promise(MUTANTS[name])}"


def test_the_quick_mutants_are_mutants() -> None:
    assert MUTANTS.keys() >= QUICK
