"""Lives with drafts: whatever breaks, each answer is the one that the model gives, and all other promises hold too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from random import Random

import pytest

from tests.simulation import run
from tests.simulation.model import VARIANTS, base_of, keys_of
from worker.limits import EngineLimits
from worker.sequence import Sequence as Choice
from worker.speculation import Speculation
from worker.speculator import Speculator

SEEDS = 40


def speculate(speculator: Speculator, choice: Choice) -> None:
    """Four drafts of five come true, where noise has no part in it."""
    sampling = choice.assign.sampling

    def guess(ids: Sequence[int], most: int) -> tuple[int, ...]:
        known, luck = list(ids), Random(hash(tuple(ids)))
        for _ in range(most):
            base = base_of(keys_of(known), known, choice.prompt_tokens, sampling.seed, choice.choice)
            known.append(base * VARIANTS + (luck.random() < 0.2))
        return tuple(known[len(ids) :])

    if not choice.constrained:
        choice.speculation = Speculation(guess)


def test_promises_hold_where_drafts_are_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Speculator, "begin", speculate)
    counted: Counter[str] = Counter()
    for seed in range(SEEDS):
        with monkeypatch.context() as patched:
            patched.setattr(run, "EngineLimits", partial(EngineLimits, speculation_tokens=1 + seed % 3))
            simulation = run.Simulation(seed)
        simulation.run()
        for leader in (leader for site in simulation.sites for leader in site.leaders):
            counted.update(leader.core.stats().counters)
    assert counted["drafted_tokens"] > counted["accepted_tokens"] > SEEDS
    assert counted["preemptions"] and counted["replayed_requests"]
