"""A rank's word of a fault: whose it is, what may still explain it, and which requests were in the step that broke."""

from __future__ import annotations

import pytest
import torch

from coordinator.replica.core import ReplicaCore
from coordinator.replica.events import (
    Blame,
    Blamed,
    Detached,
    Died,
    Effect,
    Emit,
    Fault,
    Kill,
    ReplicaDown,
    Tell,
    Tick,
)
from coordinator.replica.told import BLAME_S, PEER_S
from parallel.comm import Channel, of_peer
from tests.unit.test_replica import form, launch, make


def serving() -> tuple[ReplicaCore, str]:
    core = make()
    name = launch(core)
    form(core, 1.0)
    return core, name


def broke(rank: int, name: str, *requests: str) -> Fault:
    return Fault(rank, name, "ready", "IndexError: 7", first_step=4, last_step=5, requests=requests)


def torn(rank: int, name: str) -> Fault:
    return Fault(rank, name, "ready", "RuntimeError: Connection closed by peer", of_peer=True)


def down(effects: list[Effect]) -> ReplicaDown:
    (found,) = [effect for effect in effects if isinstance(effect, ReplicaDown)]
    return found


def lost(effects: list[Effect]) -> Emit:
    (found,) = [effect for effect in effects if isinstance(effect, Emit) and effect.kind == "rank.lost"]
    return found


def test_the_leader_knows_whose_step_broke() -> None:
    core, name = serving()
    ended = down(core.step(2.0, broke(0, name, "a", "b")))
    assert (ended.step_broke, ended.requests) == (True, ("a", "b"))
    assert ended.reason == "rank 0 of replica 0: ready: IndexError: 7"


def test_of_another_rank_the_leader_is_asked() -> None:
    core, name = serving()
    (ask,) = core.step(2.0, broke(1, name))
    assert ask == Tell(core.fence, 0, name, Blame(4, 5))
    assert core.step(2.1, Tick()) == []
    effects = core.step(2.2, Blamed(0, name, ("a",)))
    assert (down(effects).step_broke, down(effects).requests) == (True, ("a",))
    assert Kill(2, suspect=1) in effects


def test_a_leader_that_does_not_answer_is_not_waited_for() -> None:
    core, name = serving()
    core.step(2.0, broke(1, name))
    assert core.step(2.0 + BLAME_S - 0.1, Tick()) == []
    ended = down(core.step(2.0 + BLAME_S, Tick()))
    assert (ended.step_broke, ended.requests) == (True, ())


@pytest.mark.parametrize(
    "event", [Died(1, "c-1"), Fault(0, "c-1", "ready", "OSError: no plan is taken"), Detached(1, "c-1")]
)
def test_no_signal_and_no_error_outside_of_a_step_counts(event: Died | Fault | Detached) -> None:
    core, _ = serving()
    effects = core.step(2.0, event) or core.step(3.9, Tick())
    assert not down(effects).step_broke


def test_a_death_explains_what_its_peers_tell_of_it() -> None:
    core, name = serving()
    assert core.step(2.0, torn(0, name)) == []
    effects = core.step(2.1, Died(1, name))
    assert lost(effects).subject == "rank/0/1"
    assert not down(effects).step_broke
    assert Kill(2, suspect=1) in effects


def test_an_error_of_its_own_explains_what_peers_tell_too() -> None:
    core, name = serving()
    core.step(2.0, torn(0, name))
    core.step(2.1, broke(1, name))
    assert down(core.step(2.2, Blamed(0, name, ("a",)))).step_broke


def test_what_follows_from_a_broken_step_does_not_excuse_it() -> None:
    core, name = serving()
    core.step(2.0, broke(1, name))
    core.step(2.1, torn(0, name))
    ended = down(core.step(2.2, Died(0, name)))
    assert ended.step_broke and ended.reason.startswith("rank 1")


def test_what_nothing_explains_ends_the_epoch_after_a_moment() -> None:
    core, name = serving()
    core.step(2.0, torn(0, name))
    effects = core.step(2.0 + PEER_S, Tick())
    assert lost(effects).subject == "rank/0/0"
    core, name = serving()
    core.step(2.0, torn(0, name))
    core.step(2.1, Detached(1, name))
    effects = core.step(2.0 + PEER_S, Tick())
    assert lost(effects).subject == "rank/0/1", "it cannot be heard, the other can"
    assert "Connection closed by peer" in str(lost(effects).detail["reason"])


class Broken:
    """A backend whose peer is gone."""

    def send(self, tensors: list[torch.Tensor], to_rank: int, tag: int) -> object:
        raise RuntimeError("Connection closed by peer")


def test_errors_of_collectives_are_told_apart_from_those_of_computing() -> None:
    channel = Channel(Broken(), torch.device("cpu"), 1)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError) as raised:
        channel.send(torch.zeros(1))
    assert not of_peer(raised.value), "it came out of what stands for the backend, which is not torch here"
    with pytest.raises(AttributeError) as missing:
        channel.receive((1,), torch.float32)
    assert of_peer(missing.value)
    with pytest.raises(IndexError) as own:
        torch.zeros(3)[7]
    assert not of_peer(own.value)
