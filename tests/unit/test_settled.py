"""What ranks have found out of their memory is told to those that form the epoch again, where it is sure to hold."""

from __future__ import annotations

import pytest

from coordinator.replica.core import ReplicaCore
from coordinator.replica.events import (
    Died,
    Event,
    Fault,
    Form,
    Killed,
    Persisted,
    Ready,
    Relayout,
    Resident,
    Retired,
    Settled,
    Started,
    StoreOpened,
    Tell,
    Tick,
)
from coordinator.replica.recovery import MAX_BACKOFF_S
from coordinator.replica.state import State
from tests.unit.test_replica import PLAN, hello, launch, make

SETTLED = Settled(13, graphs=True)


def known(core: ReplicaCore, now: float, node_id: str = "n") -> set[Settled | None]:
    """What ranks are told of an earlier epoch's memory when they form the one that was just launched."""
    name = core.incarnation()
    for rank in (0, 1):
        core.step(now, hello(rank, name, node_id=node_id))
    return told(core, now, name)


def told(core: ReplicaCore, now: float, name: str) -> set[Settled | None]:
    effects = core.step(now, StoreOpened(0, name, "h:1"))
    return {tell.command.settled for tell in effects if isinstance(tell, Tell) and isinstance(tell.command, Form)}


def served(core: ReplicaCore, now: float) -> None:
    """Ranks that have formed serve, with what they have settled on."""
    for rank in (0, 1):
        core.step(now, Ready(rank, core.incarnation(), Resident(100, 80, SETTLED)))


def struck(core: ReplicaCore, now: float, event: Event) -> None:
    """The epoch ends, and the next one is launched."""
    core.step(now, event)
    core.step(now, Killed(core.fence.epoch))
    core.step(now + MAX_BACKOFF_S, Tick())


def test_what_ranks_have_settled_need_not_be_found_again_after_a_death() -> None:
    core = make()
    launch(core)
    assert known(core, 1.0) == {None}
    served(core, 2.0)
    for strike in (3.0, 20.0):  # and in an epoch that has taken it over, which may die before it serves
        struck(core, strike, Died(1, core.incarnation()))
        assert known(core, strike + 9.0) == {SETTLED}


@pytest.mark.parametrize("of_peer", [False, True])
def test_a_rank_that_breaks_by_itself_has_it_found_again(of_peer: bool) -> None:
    core = make()
    launch(core)
    known(core, 1.0)
    served(core, 2.0)
    core.step(3.0, Fault(1, core.incarnation(), "ready", "out of memory", of_peer=of_peer))
    struck(core, 3.1, Died(0, core.incarnation()))
    assert known(core, 12.0) == {SETTLED if of_peer else None}


def test_what_was_settled_holds_on_the_same_nodes_and_for_the_same_layout() -> None:
    """Elsewhere kernels are still to be compiled."""
    core = make()
    launch(core)
    known(core, 1.0)
    served(core, 2.0)
    struck(core, 3.0, Died(1, core.incarnation()))
    assert known(core, 12.0, node_id="another") == {None}
    served(core, 13.0)
    name = core.incarnation()
    core.step(14.0, Relayout(PLAN, "another"))
    core.step(14.1, Persisted(core.fence.epoch))
    for rank in (0, 1):
        core.step(14.2, Retired(rank, name, 10_000))
    assert told(core, 14.3, name) == {None}


def test_ranks_that_are_adopted_bring_what_they_have_settled() -> None:
    core = make(epoch=4, term=2)
    core.step(0.0, Started(frozenset({(0, "c-4"), (1, "c-4")})))
    for rank in (0, 1):
        core.step(0.1, hello(rank, "c-4", "ready", epoch=4, resident=Resident(100, 80, SETTLED)))
    assert core.state is State.READY
    struck(core, 3.0, Died(1, "c-4"))
    assert known(core, 12.0) == {SETTLED}
