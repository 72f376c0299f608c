"""Credits: a slot a choice, blocks by what is known, and who is refused because no replica could ever hold it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.requests.events import Submit
from coordinator.requests.nouns import Request
from coordinator.requests.router import Link, Reason, Router, Size, choose, too_large
from echelon.errors import InvalidRequestError
from echelon.internal.link import (
    Assign,
    Fence,
    Finish,
    Progress,
    Released,
    ReplicaHello,
    ReplicaStats,
    Running,
    Sampling,
    TokenRun,
)
from tests.unit.core_shell import HELLO, STOP_ID, Shell, request

GRANT = ReplicaHello(slots=4, kv_blocks=20, block_tokens=4, max_context=64)


def link(replica: int = 0, hello: ReplicaHello = GRANT) -> Link:
    return Link(Fence(1, replica, 1), hello)


def assign(name: str, attempt: int = 1) -> Assign:
    return Assign(name, attempt, (1,), (Progress(0),), Sampling(0.0, 1.0, 0, 8, 7))


def choices(name: str, n: int, prompt_tokens: int = 3) -> Request:
    return request(name, prompt=(1,) * prompt_tokens, sampling=replace(request().sampling, n=n))


@pytest.mark.parametrize(
    ("size", "blocks"),
    [
        (Size(1, (0,), 9), 1 + 1),
        (Size(4, (0,), 9), 1 + 1),
        (Size(5, (0, 0, 0), 9), 2 + 3),  # the prompt once, and for each choice one to grow into
        (Size(5, (1, 4, 5), 19), 2 + (1 + 1) + (1 + 1) + (2 + 1)),
        (Size(5, (), 19), 2),
    ],
)
def test_blocks_of_a_request_are_those_of_what_is_known_of_it(size: Size, blocks: int) -> None:
    assert size.blocks(4) == blocks


def test_what_is_assigned_is_taken_and_what_is_released_comes_back() -> None:
    one = link()
    one.assign(assign("a"), Size(5, (0, 0), 20))  # two slots, four blocks
    one.assign(assign("b"), Size(5, (3,), 20))  # one, four
    assert (one.free_slots, one.free_blocks) == (1, 12)
    one.release("a", 2)  # not what it holds
    assert (one.free_slots, one.free_blocks) == (1, 12)
    one.release("a", 1)
    one.release("a", 1)
    assert (one.free_slots, one.free_blocks) == (3, 16)
    one.release("b", 1)
    assert (one.free_slots, one.free_blocks) == (4, 20)


def test_what_requests_have_grown_to_is_what_the_replica_reports_of_them() -> None:
    one = link()
    one.assign(assign("a"), Size(5, (0,), 60))
    assert one.free_blocks == 17
    one.blocks_referenced = 14
    assert one.free_blocks == 6
    assert not one.fits(Size(24, (0,), 30))
    one.assign(assign("b"), Size(8, (0,), 20))  # three blocks, not reported yet
    assert one.free_blocks == 3
    one.blocks_referenced = 2  # a report older than the assignments, say: what they took is known here
    assert one.free_blocks == 14


def test_a_request_alone_always_fits_its_slots() -> None:
    one = link()
    whole = Size(78, (0,), 80)  # 20 blocks, and one to grow into
    assert one.fits(whole)
    one.assign(assign("a"), Size(1, (0,), 2))
    assert not one.fits(whole)
    one.release("a", 1)
    one.blocks_referenced = 20  # as told before that release
    assert one.fits(whole)
    assert not one.fits(Size(1, (0,) * 5, 2))


def test_the_replica_with_the_least_to_do_takes_it_and_of_equals_the_one_with_most_free_blocks() -> None:
    first, second, third = link(0), link(1), link(2, replace(GRANT, slots=1, kv_blocks=99))
    first.assign(assign("a"), Size(9, (0,), 20))
    router = Router()
    assert all(router.open(each) for each in (first, second, third))
    one, two = Size(1, (0,), 9), Size(1, (0, 0), 9)
    assert choose([first, second], one) == (second, Reason.LEAST_LOADED)
    assert choose([first, second, third], one) == (third, Reason.LEAST_LOADED), "as little to do, and more free blocks"
    assert router.able(two) == [first, second]
    router.end(0, 1)
    router.end(1, 1)
    assert router.able(one) == [third]
    assert router.able(two) == []


@pytest.mark.parametrize(
    ("size", "reason", "message"),
    [
        (
            Size(60, (0,), 65),
            "CONTEXT_TOO_LONG",
            r"prompt \+ max_tokens = 65 tokens, over the 64 ",
        ),
        (Size(9, (0,) * 5, 20), "INVALID_FIELD", r"n=5 choices are over the 4 that a replica runs at once"),
    ],
)
def test_what_no_replica_could_ever_hold_is_refused_with_the_arithmetic(size: Size, reason: str, message: str) -> None:
    for links in ([link()], [link(0), link(1)]):
        error = too_large(links, size)
        assert isinstance(error, InvalidRequestError)
        assert error.reason == reason
        with pytest.raises(InvalidRequestError, match=message):
            raise error
    assert too_large([link(), link(1, replace(GRANT, slots=9, kv_blocks=99, max_context=99))], size) is None
    assert too_large([], size) is None, "one may come that can"


def test_the_blocks_of_a_replica_bound_one_request_as_its_context_does() -> None:
    small = link(0, replace(GRANT, kv_blocks=10))
    assert too_large([small], Size(30, (0,), 40)) is None
    error = too_large([small], Size(30, (0,), 41))
    assert error is not None
    assert "41 tokens, over the 40" in str(error)


def test_choices_wait_until_all_of_them_have_a_slot() -> None:
    shell = Shell(hello=replace(HELLO, slots=3))
    shell.open()
    for stream, (name, n) in enumerate((("a", 2), ("b", 2), ("c", 1)), start=1):
        shell.post(Submit(stream, choices(name, n)))
    assert [assigned.request for assigned in shell.assigns()] == ["a"], "c does not go ahead of b"
    shell.report(tuple(TokenRun("a", choice, 1, 0, (STOP_ID,), finish=Finish.STOP) for choice in range(2)))
    shell.report(released=(Released("a", 1),))
    assert [assigned.request for assigned in shell.assigns()] == ["a", "b", "c"]


def test_more_choices_than_a_replica_has_slots_are_refused() -> None:
    shell = Shell()
    shell.open()
    shell.post(Submit(1, choices("a", 3)))
    error = shell.last_error(1)
    assert isinstance(error, InvalidRequestError)
    assert (error.reason, error.request_id) == ("INVALID_FIELD", "a")
    assert "n=3 choices are over the 2" in str(error)
    assert shell.core.counts.queued == 0


def test_what_a_report_tells_of_blocks_decides_about_the_next_request() -> None:
    shell = Shell(hello=replace(HELLO, slots=4))
    shell.open()
    shell.post(Submit(1, choices("a", 1)))
    shell.report(stats=ReplicaStats(blocks_referenced=18))
    shell.post(Submit(2, choices("b", 1, prompt_tokens=5)))
    assert [assigned.request for assigned in shell.assigns()] == ["a"]
    shell.report(stats=ReplicaStats(blocks_referenced=17))
    assert [assigned.request for assigned in shell.assigns()] == ["a", "b"]


def test_what_a_leader_holds_already_takes_its_credits() -> None:
    shell = Shell(hello=replace(HELLO, slots=3))
    shell.open()
    shell.post(Submit(1, choices("a", 2)))
    successor = shell.restart()
    successor.open(Running("a", 1))
    successor.post(Submit(2, choices("b", 2)))
    assert not successor.assigns()
    successor.post(Submit(3, choices("a", 2)))
    successor.report(tuple(TokenRun("a", choice, 1, 0, (STOP_ID,), finish=Finish.STOP) for choice in range(2)))
    successor.report(released=(Released("a", 1),))
    assert [assigned.request for assigned in successor.assigns()] == ["b"]
