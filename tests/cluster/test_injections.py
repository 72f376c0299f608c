"""Every rank and the coordinator killed and stopped, aimed by phase, in four layouts, under streams of every kind.

What `echelon chaos` does, with a plan for each layout: each stream must be the undisturbed one, in float64 to the last
id, and nothing may be computed again but prompts and what was delivered.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import pytest

from echelon.chaos.matrix import summary, table
from echelon.chaos.outcome import Outcome, Trial, next_tokens_s, outcomes, wrong
from echelon.chaos.plan import Injection, Round
from echelon.chaos.runner import Runner, Settings
from echelon.internal.processes import alive
from parallel.degrees import Degrees
from tests.cluster.conftest import Checkpoints, Walker
from tests.cluster.layouts import LLAMA3, WINDOW, Layout

pytestmark = [pytest.mark.cluster, pytest.mark.long]

STREAMS, SPARES = 16, 2
SMALL_STEPS = {"max_step_tokens": 48}  # prompts and replays take many
LAYOUTS = {
    "tensor-2": Layout("llama", Degrees(tensor=2), LLAMA3, SMALL_STEPS),
    "pipeline-2": Layout("llama", Degrees(pipeline=2), LLAMA3, SMALL_STEPS),
    "pipeline-2-tensor-2": Layout("llama", Degrees(pipeline=2, tensor=2), LLAMA3, SMALL_STEPS),
    "data-2-expert-2": Layout("mixtral", Degrees(data=2, expert=2), WINDOW, SMALL_STEPS),
}
PHASES = ("prefill", "decode", "load", "replay")
FIRST = Injection("kill", "rank", "decode")  # what a recovery that is struck recovers from


def plan(layout: Layout) -> list[Round]:
    """Every rank killed and stopped, in each phase some rank; the coordinator between them, and in a recovery."""
    ranks = layout.degrees.replica_ranks
    rounds = [
        _aimed(Injection(fault, f"rank:{(place + shift) % ranks}", phase))
        for shift, fault in enumerate(("kill", "stop"))
        for place, phase in enumerate(PHASES)
    ]
    coordinator = [
        _aimed(Injection(fault, "coordinator", phase))
        for fault, phase in (("kill", "decode"), ("stop", "prefill"), ("kill", "load"), ("kill", "journal"))
    ]
    return [one for place in range(4) for one in (rounds[2 * place], coordinator[place], rounds[2 * place + 1])]


def _aimed(injection: Injection) -> Round:
    return (FIRST, injection) if injection.when in ("load", "replay") else (injection,)


CASES = [
    pytest.param(name, injections, id=f"{name}: {' then '.join(map(str, injections))}")
    for name, layout in LAYOUTS.items()
    for injections in plan(layout)
]


@dataclass
class Chaos:
    """The cluster that walks over the layouts, a runner on it, and what came of every injection."""

    walker: Walker
    checkpoints: Checkpoints
    found: list[Outcome] = field(default_factory=list)
    _runner: Runner | None = None
    _serves: object = None

    def runner(self, name: str) -> Runner:
        """On a cluster of that layout, with its undisturbed run made."""
        layout = LAYOUTS[name]
        cluster = self.walker.serve(self.checkpoints[layout.checkpoint], layout, spares=SPARES)
        if self._runner is None or self._serves != (name, cluster.pid):
            self.close()
            self._runner = Runner(cluster.target, Settings(streams=STREAMS))
            self._runner.undisturbed()
            self._serves = name, cluster.pid
        return self._runner

    def close(self) -> None:
        if self._runner is not None:
            self._runner.close()
        self._runner = None


@pytest.fixture(scope="module")
def chaos(walker: Walker, checkpoints: Checkpoints) -> Iterator[Chaos]:
    walker.close()  # spares cannot be reconfigured
    made = Chaos(walker, checkpoints)
    try:
        yield made
    finally:
        made.close()
        print(f"\n{table(made.found)}\n{summary(made.found)}")  # noqa: T201 - the measured matrix, for who asks with -s
        walker.close()


@pytest.mark.parametrize(("name", "injections"), CASES)
def test_no_stream_notices(name: str, injections: Round, chaos: Chaos) -> None:
    trial = chaos.runner(name).trial(injections)
    chaos.found += outcomes(trial)
    assert wrong(trial) == []
    assert len(next_tokens_s(trial)) == STREAMS, "every stream has tokens before the first strike and after the last"
    assert trial.survivors == (), "who was struck is gone"
    _assert_replaced(trial)


def _assert_replaced(trial: Trial) -> None:
    """Who was struck, and who was not, for the numbers that fence them off."""
    before, after = trial.before, trial.after
    roles = [strike.target.role for strike in trial.strikes]
    ranks, coordinators = len(roles) - roles.count("coordinator"), roles.count("coordinator")
    assert after.term == before.term + coordinators
    assert (after.coordinator_pid == before.coordinator_pid) == (coordinators == 0)
    epochs = after.replicas[0].epoch - before.replicas[0].epoch
    assert epochs >= ranks
    pids: Mapping[str, set[int]] = {"before": {r.pid for r in before.ranks}, "after": {r.pid for r in after.ranks}}
    if ranks:
        assert not pids["before"] & pids["after"], "every rank of the replica was replaced"
        assert not any(map(alive, pids["before"]))
    else:
        assert (epochs, pids["before"]) == (0, pids["after"]), "the ranks were adopted, with all they held"


def test_the_plans_leave_nothing_out() -> None:
    flat = {name: [one for injections in plan(layout) for one in injections] for name, layout in LAYOUTS.items()}
    assert sum(map(len, flat.values())) >= 50
    for name, layout in LAYOUTS.items():
        ranks = {f"rank:{number}" for number in range(layout.degrees.replica_ranks)}
        for fault in ("kill", "stop"):
            aimed = [one for one in flat[name] if one.fault == fault and one.victim in ranks]
            assert {one.victim for one in aimed} == ranks
            assert {one.when for one in aimed} == set(PHASES)
        assert {one.when for one in flat[name] if one.victim == "coordinator"} == {
            "decode",
            "prefill",
            "load",
            "journal",
        }
