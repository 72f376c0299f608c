"""The canary: a replica that has nothing to do shows that it computes before health says so, and again now and then."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import cast

import pytest

from coordinator.replica.service import ReplicaService
from coordinator.requests.canary import ANSWER_S
from coordinator.requests.core import Counts
from coordinator.requests.events import LinkClosed, Submit, Tick
from coordinator.serving import Serving
from echelon.internal.link import CANARY, Assign, Fence, Finish, Released, TokenRun
from tests.unit.core_shell import FENCE, Shell, request

IDLE_S = 30.0


@pytest.fixture
def shell() -> Shell:
    return Shell(canary_idle_s=IDLE_S)


def asked(shell: Shell) -> list[Assign]:
    return [assign for assign in shell.assigns() if assign.request == CANARY]


def answer(shell: Shell) -> None:
    attempt = asked(shell)[-1].attempt
    run = TokenRun(CANARY, 0, attempt, 0, (5,), finish=Finish.LENGTH)
    shell.report(runs=(run,), released=(Released(CANARY, attempt),))


def kinds(shell: Shell) -> list[str]:
    return [emit.kind for emit in shell.told if emit.kind.startswith("replica.")]


def test_an_idle_replica_is_asked_for_a_token_of_which_nothing_remains(shell: Shell) -> None:
    shell.open()
    (canary,) = asked(shell)
    assert (canary.sampling.max_tokens, len(canary.choices)) == (1, 1)
    assert kinds(shell) == []
    answer(shell)
    assert kinds(shell) == ["replica.proven"]
    assert shell.records == [] and shell.core.counts == Counts(0, 0, 0) and shell.core.remembered == 0
    shell.post(Submit(1, request("a")))
    shell.post(Submit(2, request("b")))
    assert [assign.request for assign in shell.assigns()[1:]] == ["a", "b"], "it has given its slot back"


def test_who_has_requests_shows_it_by_their_tokens(shell: Shell) -> None:
    shell.post(Submit(1, request("a")))
    shell.open()
    assert asked(shell) == []
    shell.run(0, 5, name="a")
    assert kinds(shell) == ["replica.proven"]


def test_it_is_asked_again_only_when_it_has_been_idle_for_long(shell: Shell) -> None:
    shell.open()
    answer(shell)
    shell.now += IDLE_S - 1
    shell.post(Tick())
    assert len(asked(shell)) == 1
    shell.now += 1
    shell.post(Tick())
    first, second = asked(shell)
    assert second.attempt > first.attempt
    answer(shell)
    assert kinds(shell) == ["replica.proven"], "nothing new"


def test_a_token_that_does_not_come_is_told_and_asked_for_again(shell: Shell) -> None:
    shell.open()
    answer(shell)
    shell.now += IDLE_S
    shell.post(Tick())
    shell.now += ANSWER_S
    shell.post(Tick())
    assert kinds(shell) == ["replica.proven", "replica.unproven"]
    assert shell.told[-1].detail["reason"] == "it has drawn no token for 5.0 s"
    answer(shell)
    assert kinds(shell)[-1] == "replica.proven"


def test_one_that_ends_without_a_token_is_asked_for_again(shell: Shell) -> None:
    shell.open()
    shell.report(released=(Released(CANARY, asked(shell)[-1].attempt),))
    assert len(asked(shell)) == 2 and kinds(shell) == []


def test_a_new_link_shows_it_anew(shell: Shell) -> None:
    shell.open()
    answer(shell)
    shell.post(LinkClosed(FENCE))
    shell.now += 1
    shell.open()
    assert len(asked(shell)) == 2


def gate() -> tuple[Serving, dict[int, SimpleNamespace], list[object]]:
    replicas = {0: SimpleNamespace(serving=None), 1: SimpleNamespace(serving=None)}
    told: list[object] = []
    services = cast("dict[int, ReplicaService]", replicas)
    return Serving(lambda: services, told.append, lambda: told.append("ready")), replicas, told


def test_it_serves_once_a_replica_that_serves_has_drawn_a_token_in_this_epoch() -> None:
    async def work() -> None:
        serving, replicas, told = gate()
        replicas[0].serving = Fence(1, 0, 1)
        serving.look()
        assert told == []
        serving.proven(0, 1, True)
        assert told == [True]
        serving.started()
        replicas[1].serving = Fence(1, 1, 1)
        serving.look()
        assert told == [True], "the other one has not shown it"
        serving.proven(1, 1, True)
        assert told == [True, "ready"]
        replicas[0].serving = None
        replicas[1].serving = Fence(1, 1, 2)
        serving.look()
        assert told[2:] == [False], "that was in an earlier epoch"
        serving.proven(1, 2, True)
        serving.proven(1, 2, False)
        assert told[3:] == [True, False]
        serving.proven(1, 2, True)
        serving.close()
        serving.proven(1, 2, True)
        assert told[5:] == [True, False]

    asyncio.run(work())


def test_a_start_does_not_wait_for_ever_for_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.serving.READY_ANYWAY_S", 0.0)

    async def work() -> None:
        serving, _, told = gate()
        serving.started()
        await asyncio.sleep(0.01)
        assert told == ["ready"]

    asyncio.run(work())
