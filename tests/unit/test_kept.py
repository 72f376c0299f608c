"""What is only remembered has a bound: the oldest answers go first, and it is told."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.journal.state import Entry, Finished, Opened, Prompted
from coordinator.requests.core import CoordinatorCore, CoreConfig
from coordinator.requests.events import StreamClosed, Submit, Tick
from coordinator.requests.kept import Kept, memory_bytes
from echelon.internal.link import Finish, Logprob, Released
from tests.unit.core_shell import WINDOW_S, Shell, new_text, request

ROOM_FOR = 4


@pytest.fixture
def shell() -> Shell:
    shell = Shell()
    one = memory_bytes(Entry.open(Opened(request())))
    config = CoreConfig(shell.term, WINDOW_S, 1000, max_kept_bytes=ROOM_FOR * one + one // 2)
    shell.core = CoordinatorCore(config, new_text, shell.state)
    shell.open()
    return shell


def answer(shell: Shell, name: str, stream: int) -> None:
    """A request from its submission to its end."""
    shell.post(Submit(stream, request(name, max_tokens=1)))
    attempt = shell.assigns()[-1].attempt
    shell.run(0, 5, name=name, attempt=attempt, finish=Finish.LENGTH)
    shell.report(released=(Released(name, attempt),))


def told(shell: Shell) -> list[str]:
    return [event.subject for event in shell.told if event.kind == "requests.forgotten_early"]


def test_the_oldest_answers_are_forgotten_first_and_it_is_told_once(shell: Shell) -> None:
    for number in range(7):
        answer(shell, f"r{number}", number)
    shell.post(Tick())
    assert list(shell.state.entries) == ["r3", "r4", "r5", "r6"]
    assert shell.core.kept.forgotten_early == 3
    assert len(told(shell)) == 1
    assert shell.restart().state == shell.state, "and they are forgotten by a successor, too"


def test_it_is_told_again_after_there_was_room(shell: Shell) -> None:
    for number in range(ROOM_FOR + 1):
        answer(shell, f"r{number}", number)
    shell.now += WINDOW_S
    shell.post(Tick())
    assert not shell.state.entries and shell.core.kept.size_bytes == 0
    for number in range(ROOM_FOR + 2):
        answer(shell, f"again{number}", number + 10)
    shell.post(Tick())
    assert len(told(shell)) == 2


def test_those_that_run_wait_or_are_parked_are_kept_before_answers(shell: Shell) -> None:
    shell.post(Submit(90, request("parked")))
    shell.post(StreamClosed(90))
    shell.report(released=(Released("parked", 1),))
    shell.post(Submit(91, request("running", max_tokens=60)))
    for number in range(9):
        answer(shell, f"r{number}", number)
    shell.post(Tick())
    assert list(shell.state.entries) == ["parked", "running", "r6", "r7", "r8"]
    shell.post(Submit(92, request("parked")))
    assert shell.assigns()[-1].request == "parked"


def test_parked_requests_have_a_bound_too(shell: Shell) -> None:
    for number in range(9):
        shell.post(Submit(number, request(f"r{number}")))
        shell.post(StreamClosed(number))
    shell.post(Tick())
    assert list(shell.state.entries) == [f"r{number}" for number in range(9 - ROOM_FOR, 9)]


def test_an_answer_larger_than_the_bound_is_kept_until_the_next() -> None:
    kept = Kept(max_bytes=1)
    for name in ("a", "b"):
        kept.moved(Entry.open(Opened(request(name))), rests=True)
        if name == "a":
            assert kept.excess() is None
    assert kept.excess() == "a"
    kept.discard("a")
    assert kept.excess() is None


def test_a_successor_keeps_to_the_bound(shell: Shell) -> None:
    for number in range(3):
        answer(shell, f"r{number}", number)
    successor = shell.restart()
    one = memory_bytes(shell.state.entries["r0"])
    config = CoreConfig(2, WINDOW_S, 1000, max_kept_bytes=2 * one)
    successor.core = CoordinatorCore(config, new_text, successor.state)
    successor.post(Tick())
    successor.post(Tick())
    assert list(successor.state.entries) == ["r1", "r2"]


def test_log_probabilities_weigh_more_than_ids() -> None:
    entry = Entry.open(Opened(request()))
    bare = memory_bytes(entry)
    logprob = Logprob(-1.0, (1, 2, 3), (-1.0, -2.0, -3.0))
    entry.answers[0].ids.append(5)
    entry.answers[0].logprobs.append(logprob)
    entry.prompted = Prompted("r", 1, 0, (logprob, logprob))
    assert memory_bytes(entry) - bare > 3 * 8 * (1 + 3 + 3)
    assert memory_bytes(replace(entry, finished=Finished("r", 1.0))) == memory_bytes(entry)
