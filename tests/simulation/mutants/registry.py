"""Named one-line mutants of the production code, each with the promise that it breaks, and how one is caught.

A mutant is a function that patches one line; its docstring is the promise. The simulation must turn red under every
one of them, or it proves nothing of that promise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.simulation.run import Simulation

SEEDS = 2000  # most are caught within ten

Mutant = Callable[[pytest.MonkeyPatch], None]
MUTANTS: dict[str, Mutant] = {}


def mutant(patch: Mutant) -> Mutant:
    """Decorator: count this function among the mutants."""
    assert patch.__doc__, f"{patch.__name__} names no promise"
    MUTANTS[patch.__name__] = patch
    return patch


def promise(mutant: Mutant) -> str:
    """That it breaks."""
    return (mutant.__doc__ or "").strip()


def red_at(mutant: Mutant, seeds: int = SEEDS) -> int | None:
    """The first seed whose life shows the mutant; None if all go well under it."""
    with pytest.MonkeyPatch.context() as patch:
        mutant(patch)
        for seed in range(seeds):
            try:
                Simulation(seed).run()
            except TypeError:  # the mutant itself does not fit the code any more
                raise
            except Exception:  # noqa: BLE001 the judge's word, the cores' own assertions, or what they trip over
                return seed
    return None


def returning(patch: pytest.MonkeyPatch, owner: object, name: str, change: Callable[[Any], Any]) -> None:
    """What a function or method returns, changed."""
    original = getattr(owner, name)
    patch.setattr(owner, name, lambda *arguments: change(original(*arguments)))


def without(patch: pytest.MonkeyPatch, owner: type, method: str, kind: type) -> None:
    """The method's effects but those of this kind."""
    returning(patch, owner, method, lambda effects: [effect for effect in effects if not isinstance(effect, kind)])
