"""NodeAgent: kills are confirmed and hit nobody else; deaths are told once; a lease ends."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from worker.agent import NodeAgent, end_with


@pytest.fixture
def sleepers() -> Iterator[list[subprocess.Popen[bytes]]]:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    started = [subprocess.Popen(command) for _ in range(3)]
    yield started
    for process in started:
        process.kill()
        process.wait()


def test_kill_confirms_the_named_and_spares_the_others(sleepers: list[subprocess.Popen[bytes]]) -> None:
    agent = NodeAgent(lease_s=30.0)
    for name, process in zip(("rank/c/0/0/1", "rank/c/0/1/1", "rank/c/1/0/1"), sleepers, strict=True):
        agent.register(name, process.pid)
    assert agent.kill("rank/c/0/", first="rank/c/0/1/") == []
    assert (sleepers[0].wait(), sleepers[1].wait(), sleepers[2].poll()) == (-9, -9, None)
    assert agent.living() == ["rank/c/1/0/1"]
    assert agent.kill("rank/c/0/") == [], "killing what is gone succeeds"
    assert agent.deaths(0.0) == [], "an ordered kill is no death to tell"


def test_a_whole_name_is_nobody_elses_beginning(sleepers: list[subprocess.Popen[bytes]]) -> None:
    agent = NodeAgent(lease_s=30.0)
    for name, process in zip(("spare/c/0/0/2-1", "spare/c/0/0/2-10", "spare/c/0/0/2-11"), sleepers, strict=True):
        agent.register(name, process.pid)
    assert agent.kill("spare/c/0/0/2-1") == []
    assert agent.living() == ["spare/c/0/0/2-10", "spare/c/0/0/2-11"]
    assert agent.kill("spare/c/0/0/", first="spare/c/0/0/2-11") == []


def test_a_death_is_told_once_to_whoever_waits(sleepers: list[subprocess.Popen[bytes]]) -> None:
    agent = NodeAgent(lease_s=30.0)
    agent.register("a", sleepers[0].pid)
    agent.register("b", sleepers[1].pid)
    killer = threading.Timer(0.1, sleepers[1].kill)
    killer.start()
    assert agent.deaths(30.0) == ["b"]
    assert agent.deaths(0.0) == []
    assert agent.living() == ["a"]
    killer.join()


def test_a_process_registered_while_another_thread_waits_is_watched(sleepers: list[subprocess.Popen[bytes]]) -> None:
    agent = NodeAgent(lease_s=30.0)
    told: list[str] = []
    waiter = threading.Thread(target=lambda: told.extend(agent.deaths(30.0)))
    waiter.start()
    agent.register("late", sleepers[0].pid)
    sleepers[0].kill()
    waiter.join(30.0)
    assert told == ["late"]


def test_a_renamed_process_dies_under_its_new_name(sleepers: list[subprocess.Popen[bytes]]) -> None:
    agent = NodeAgent(lease_s=30.0)
    agent.register("spare/c/0/1/1", sleepers[0].pid)
    agent.register("spare/c/0/2/1", sleepers[1].pid)
    agent.rename("spare/c/0/1/1", "rank/c/0/1/7")
    assert agent.living() == ["spare/c/0/2/1", "rank/c/0/1/7"]
    assert agent.kill("rank/c/0/") == []
    assert (sleepers[0].wait(), sleepers[1].poll()) == (-9, None)
    sleepers[1].kill()
    assert agent.deaths(30.0) == ["spare/c/0/2/1"]
    with pytest.raises(ProcessLookupError, match="has ended"):
        agent.rename("spare/c/0/2/1", "rank/c/0/2/7")


def test_an_ended_process_cannot_be_registered(sleepers: list[subprocess.Popen[bytes]]) -> None:
    sleepers[0].kill()
    sleepers[0].wait()
    with pytest.raises(ProcessLookupError):
        NodeAgent(lease_s=30.0).register("gone", sleepers[0].pid)


def test_the_lease_ends_unless_renewed() -> None:
    now = [0.0]
    agent = NodeAgent(lease_s=30.0, clock=lambda: now[0])
    now[0] = 29.0
    assert not agent.expired()
    agent.renew(30.0)
    now[0] = 58.0
    assert not agent.expired()
    now[0] = 59.5
    assert agent.expired()


def test_orders_of_an_older_term_are_refused() -> None:
    agent = NodeAgent(lease_s=30.0)
    assert [agent.obeys(term) for term in (1, 1, 3, 2, 1, 3)] == [True, True, True, False, False, True]


def test_a_process_ends_with_its_master(sleepers: list[subprocess.Popen[bytes]]) -> None:
    follow = "import sys; from worker.agent import end_with; end_with(int(sys.argv[1]))"
    code = f"{follow}; print(flush=True); sys.stdin.read()"
    master = sleepers[0]
    with subprocess.Popen([sys.executable, "-c", code, str(master.pid)], stdin=-1, stdout=-1) as servant:
        try:
            assert servant.stdout is not None and servant.stdout.readline() == b"\n"
            assert servant.poll() is None
            master.kill()
            assert servant.wait(30.0) == 1
        finally:
            servant.kill()


def test_a_master_that_has_ended_already_is_none(sleepers: list[subprocess.Popen[bytes]]) -> None:
    sleepers[0].kill()
    sleepers[0].wait()
    with pytest.raises(ProcessLookupError):
        end_with(sleepers[0].pid)
