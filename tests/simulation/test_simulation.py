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

BATCH = 250  # seeds
SHORT, TABLE, LONG = 500, 2000, 10_000  # seeds of every run; those that fill the table of faults; of the long run
MIN_HITS = 20  # of each fault in each phase, over TABLE


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


@pytest.mark.parametrize(
    "first",
    [pytest.param(seed, marks=() if seed < SHORT else pytest.mark.long) for seed in range(0, LONG, BATCH)],
)
def test_promises_hold(first: int, hits: dict[int, Counter[Cell]]) -> None:
    happened: Counter[str] = Counter()
    struck: Counter[Cell] = Counter()
    for seed in range(first, first + BATCH):
        simulation = live(seed)
        happened += simulation.coverage()
        struck += simulation.faults.hits
    hits[first] = struck
    never = [name for name in MUST_HAPPEN if not happened[name]]
    assert not never, f"never tried: {never} in {happened}"
    assert happened["answers"] > BATCH
    assert happened["jobs.results"] > BATCH


@pytest.mark.long
def test_every_fault_strikes_in_every_phase(hits: dict[int, Counter[Cell]]) -> None:
    first_seeds = range(0, TABLE, BATCH)
    if not hits.keys() >= set(first_seeds):
        pytest.skip("counts what all of its batches did")
    total = sum((hits[first] for first in first_seeds), Counter[Cell]())
    seldom = [cell for cell in CELLS if total[cell] < MIN_HITS]
    assert not seldom, f"{seldom} in\n{table(total, FAULTS, IMPOSSIBLE)}"


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
