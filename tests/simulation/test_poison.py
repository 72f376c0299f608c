"""Simulated lives with poison requests: steps that compute one break, on any rank, beside every other fault.

However they come together with crashes, deaths, relayouts and lost words, only poisonous requests are quarantined, all
that are come to an end, and everybody else is answered like in any other life.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from coordinator.replica.events import Accept, Blame, Blamed, Fault, Tell
from coordinator.requests import quarantine
from coordinator.requests.core import CoordinatorCore
from coordinator.requests.quarantine import Decision, Quarantine
from echelon.errors import QuarantinedError
from tests.simulation.client import Order, User
from tests.simulation.device import Device
from tests.simulation.leader import Leader
from tests.simulation.network import Connection
from tests.simulation.ranks import RankProcess
from tests.simulation.run import Simulation
from worker.engine import Event
from worker.lanes import Lanes
from worker.plan import StepPlan, StepResult

SEEDS = 100
POISON = "poison"  # a constraint that allows every token, and breaks the step that would draw one of the first:
POISON_PLACES = 4
UNANSWERED = 0.1  # how often the leader does not say whose step it was


class StepBroke(Exception):
    """An error inside a step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step


class PoisonedSimulation(Simulation):
    """Some of what users ask for is poison."""

    def __init__(self, seed: int) -> None:
        self._poison = Random(seed)
        super().__init__(seed)

    def _order(self, request_id: str) -> Order:
        order = super()._order(request_id)
        if self._poison.random() > 0.4:
            return order
        sampling = replace(order.sampling, grammar=POISON, max_tokens=8, min_tokens=8, stop=())
        return replace(order, sampling=sampling, timeout_s=400.0)


def judge_suspects(patch: pytest.MonkeyPatch, seen: Counter[str]) -> None:
    """Who was sent away for a suspect is in none of its steps."""
    broke = Quarantine.broke

    def broke_alone(self: Quarantine, request_id: str, alone: bool) -> tuple[Decision, str]:
        replayed = self.replayed is not None and self.replayed.request_id == request_id
        seen["alone"] += replayed and alone
        assert alone or not replayed, f"{request_id} was replayed alone, and others were in its steps"
        return broke(self, request_id, alone)

    patch.setattr(Quarantine, "broke", broke_alone)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Devices, leaders, ranks and users that know of poison; counts what it has done."""
    seen: Counter[str] = Counter()
    told: dict[RankProcess, Fault] = {}
    run, step, obey, check = Device.run, Leader._step, RankProcess._obey, User.check

    def run_poison(self: Device, plan: StepPlan) -> StepResult:
        result = run(self, plan)
        for row in plan.rows:
            admit = self._slots[row.slot].admit
            generated, breaks_at = row.first + row.tokens - admit.prompt_tokens, admit.sampling.seed % POISON_PLACES
            if admit.sampling.grammar == POISON and generated >= breaks_at:
                raise StepBroke(plan.step)
        return result

    def step_poison(self: Leader, event: Event) -> None:
        try:
            step(self, event)
        except StepBroke as broke:
            seen["steps"] += 1
            self.closed = True  # its threads have ended; it is still there, and can be asked
            ranks = [each for each in self._site.processes if each.epoch == self._epoch and each.running]
            teller = self._site.world.random.choice(ranks)
            first = self.core.stats().step + 1  # a rank knows which steps it runs, not which of them it was
            known = self.core.in_steps(first, broke.step) if teller.rank == 0 else ()
            words = teller.rank, teller.incarnation, "ready", "it broke"
            told[teller] = Fault(*words, first_step=first, last_step=broke.step, requests=known)
            teller._send(told[teller])

    def obey_poison(self: RankProcess, stream: Connection, tell: Tell) -> None:
        obey(self, stream, tell)
        match tell.command:
            case Accept() if self in told:  # a message can be lost with its stream
                self._send(told[self])
            case Blame(first, last) if self.leader and self._site.world.random.random() > UNANSWERED:
                seen["asked"] += 1
                self._send(Blamed(self.rank, self.incarnation, self.leader.core.in_steps(first, last)))

    def check_poison(self: User) -> None:
        if self.order.sampling.grammar == POISON and isinstance(self.error, QuarantinedError):
            seen["quarantined"] += 1
        else:
            check(self)

    judge_suspects(monkeypatch, seen)
    monkeypatch.setattr(Device, "run", run_poison)
    monkeypatch.setattr(Leader, "_step", step_poison)
    monkeypatch.setattr(RankProcess, "_obey", obey_poison)
    monkeypatch.setattr(User, "check", check_poison)
    return seen


def live(seeds: range, seen: Counter[str]) -> None:
    for seed in seeds:
        simulation = PoisonedSimulation(seed)
        try:
            simulation.run()
        except Exception as error:
            error.add_note(f"in the poisoned life of seed {seed}")
            raise
        seen += simulation.coverage()


def test_only_poison_is_quarantined_and_everybody_else_is_answered(poison: Counter[str]) -> None:
    live(range(SEEDS), poison)
    must = (
        "steps",
        "asked",
        "alone",
        "quarantined",
        "request.suspected",
        "request.cleared",
        "request.quarantined",
        "answers",
    )
    assert not [name for name in must if not poison[name]], poison


def company_convicts(patch: pytest.MonkeyPatch) -> None:
    """Whoever was twice in a step that broke."""
    convict = {True: (Decision.REPLAY, ""), False: (Decision.QUARANTINE, "")}
    patch.setattr(quarantine, "decide", lambda errors, alone: convict[errors < 2])


def nothing_counts(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CoordinatorCore, "_count_break", lambda self, now, event: None)


def released_while_computed(patch: pytest.MonkeyPatch) -> None:
    """A leader lets go of the last that it held while steps that compute it run."""
    patch.setattr(Lanes, "idle", property(lambda self: False))


@pytest.mark.parametrize(
    "mutant", [company_convicts, nothing_counts, released_while_computed], ids=lambda mutant: mutant.__name__
)
def test_with_a_rule_broken_some_life_shows_it(
    mutant: Callable[[pytest.MonkeyPatch], None], poison: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutant(monkeypatch)
    with pytest.raises(Exception) as shown:
        live(range(SEEDS), poison)
    assert any("poisoned life" in note for note in cast_notes(shown.value))


def cast_notes(error: Any) -> list[str]:
    return list(getattr(error, "__notes__", ()))
