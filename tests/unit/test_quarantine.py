"""Poison requests: what breaks a step twice is replayed alone, and only what breaks it alone is quarantined."""

from __future__ import annotations

import pytest

from coordinator.requests.events import Cancel, ReplicaEnded, StreamClosed, Submit
from coordinator.requests.quarantine import CLEARED_TOKENS, Decision, decide
from echelon.errors import QuarantinedError
from echelon.internal.link import Assign, Fence, Released, ReplicaHello, TokenRun
from echelon.types import Completion
from tests.unit.core_shell import Shell, request

NAMES = ("a", "b", "c")


class Cluster(Shell):
    """Replicas that come back with the next epoch each time a step breaks."""

    def __init__(self, names: tuple[str, ...] = NAMES, replicas: int = 1) -> None:
        super().__init__(hello=ReplicaHello(slots=8, kv_blocks=200, block_tokens=4, max_context=64), replicas=replicas)
        self.epochs = [1] * replicas
        for replica in range(replicas):
            self.open(fence=self.fence(replica))
        for stream, name in enumerate(names):
            self.post(Submit(stream, request(name, max_tokens=40)))

    def fence(self, replica: int = 0) -> Fence:
        return Fence(1, replica, self.epochs[replica])

    def breaks(self, *inside: str, replica: int = 0, step_broke: bool = True, comes_back: bool = True) -> None:
        """A step with these requests; none: nobody knows."""
        self.post(ReplicaEnded(self.fence(replica), "it broke", step_broke, inside))
        self.epochs[replica] += 1
        if comes_back:
            self.open(fence=self.fence(replica))

    def newest(self, name: str) -> Assign:
        return [assign for assign in self.assigns() if assign.request == name][-1]

    def draws(self, name: str, count: int, replica: int = 0) -> None:
        """So many more tokens of a request where it runs now."""
        assign = self.newest(name)
        held = len(assign.choices[0].generated)
        self.epoch_report(name, assign.attempt, held, count, replica)

    def epoch_report(self, name: str, attempt: int, held: int, count: int, replica: int) -> None:
        run = TokenRun(name, 0, attempt, held, tuple(range(5, 5 + count)))
        self.report(runs=(run,), fence=self.fence(replica))

    def lets_go(self, replica: int = 0) -> None:
        """Its leader's answers to what was abandoned."""
        commands = [command for command in self.commands if command.fence == self.fence(replica)]
        abandoned = [abandon for command in commands for abandon in command.abandons]
        released = tuple(Released(abandon.request, abandon.attempt) for abandon in abandoned)
        self.report(released=released, fence=self.fence(replica))

    def sent_since(self, place: int) -> list[str]:
        return [assign.request for assign in self.assigns()[place:]]

    def sent_to(self, replica: int) -> list[str]:
        commands = [command for command in self.commands if command.fence.replica == replica]
        return [assign.request for command in commands for assign in command.assigns]

    def kinds(self, name: str) -> list[str]:
        return [emit.kind for emit in self.told if emit.subject == name]


@pytest.mark.parametrize(
    ("errors", "alone", "decision"),
    [
        (1, False, Decision.REPLAY),
        (1, True, Decision.REPLAY),
        (2, False, Decision.REPLAY_ALONE),
        (2, True, Decision.QUARANTINE),
        (3, False, Decision.REPLAY_ALONE),
        (3, True, Decision.QUARANTINE),
    ],
)
def test_two_errors_make_a_suspect_and_one_alone_convicts(errors: int, alone: bool, decision: Decision) -> None:
    assert decide(errors, alone)[0] is decision


def test_after_one_broken_step_all_go_on_together() -> None:
    cluster = Cluster()
    cluster.breaks(*NAMES)
    assert cluster.sent_since(3) == list(NAMES)
    assert cluster.kinds("a")[:2] == ["request.suspected", "request.replayed"]


def test_the_poisonous_one_alone_fails_and_the_others_finish() -> None:
    cluster = Cluster()
    cluster.breaks(*NAMES)
    cluster.breaks(*NAMES)
    assert cluster.sent_since(6) == ["a"], "one at a time"
    cluster.draws("a", CLEARED_TOKENS - 1)
    assert cluster.sent_since(7) == []
    cluster.epoch_report("a", cluster.newest("a").attempt, CLEARED_TOKENS - 1, 1, 0)
    assert "request.cleared" in cluster.kinds("a")
    assert cluster.abandons()[-1].request == "a", "it makes room for the next suspect"
    cluster.lets_go()
    assert cluster.sent_since(7) == ["b"]
    cluster.breaks("b")
    error = cluster.last_error(1)
    assert isinstance(error, QuarantinedError)
    assert error.message == "3 steps with it broke, and in the last one it was alone: it broke"
    assert cluster.sent_since(8) == ["c"]
    cluster.draws("c", CLEARED_TOKENS)
    assert cluster.sent_since(9) == ["a"], "beside c, which is none any more"
    for name, held in (("a", CLEARED_TOKENS), ("c", CLEARED_TOKENS)):
        cluster.epoch_report(name, cluster.newest(name).attempt, held, 40 - held, 0)
    for stream in (0, 2):
        assert isinstance(cluster.shown[stream][-1], Completion)
        assert cluster.deltas(stream)[0].sequence == 0
        assert len(cluster.ids(stream)) == 40


def test_one_that_is_always_alone_fails_the_second_time() -> None:
    cluster = Cluster(("a",))
    cluster.breaks("a")
    cluster.breaks("a")
    assert isinstance(cluster.last_error(0), QuarantinedError)
    assert cluster.restart().core.step(cluster.now, Submit(9, request("a", max_tokens=40)))[0], "its end is journaled"


def test_what_breaks_no_step_never_counts() -> None:
    cluster = Cluster()
    for _ in range(5):
        cluster.breaks(*NAMES, step_broke=False)
    assert not [emit for emit in cluster.told if emit.kind == "request.suspected"]
    assert cluster.sent_since(15) == list(NAMES)


def test_who_was_not_in_the_step_is_no_suspect() -> None:
    cluster = Cluster()
    cluster.breaks("a")
    cluster.breaks("b")
    cluster.breaks("a", "b")
    cluster.breaks(step_broke=False)
    assert "request.suspected" not in cluster.kinds("c")
    place = len(cluster.assigns())
    cluster.draws("a", CLEARED_TOKENS)
    cluster.lets_go()
    assert cluster.sent_since(place) == ["b"]


def test_where_nobody_knows_whose_step_it_was_all_that_ran_are_in_it() -> None:
    cluster = Cluster(("a", "b"))
    cluster.breaks()
    cluster.breaks()
    assert cluster.sent_since(4) == ["a"]


def test_a_suspect_that_a_signal_interrupts_is_replayed_alone_again() -> None:
    cluster = Cluster(("a", "b"))
    cluster.breaks("a", "b")
    cluster.breaks("a", "b")
    place = len(cluster.assigns())
    cluster.breaks(step_broke=False)
    assert cluster.sent_since(place) == ["a"]
    assert not any(isinstance(shown, QuarantinedError) for shown in cluster.shown[0])


@pytest.mark.parametrize("leave", [Cancel(("a",)), StreamClosed(0)])
def test_a_suspect_that_leaves_makes_room(leave: Cancel | StreamClosed) -> None:
    cluster = Cluster(("a", "b"))
    cluster.breaks("a", "b")
    cluster.breaks("a", "b")
    place = len(cluster.assigns())
    cluster.post(leave)
    cluster.lets_go()
    assert cluster.sent_since(place) == ["b"]
    cluster.draws("b", CLEARED_TOKENS)
    cluster.post(Submit(7, request("late", max_tokens=4)))
    assert cluster.sent_since(place) == ["b", "late"], "nothing is kept free for longer than it is needed"


def test_other_replicas_go_on_beside_a_suspect() -> None:
    cluster = Cluster(("a", "b", "c", "d"), replicas=2)
    assert [cluster.sent_to(0), cluster.sent_to(1)] == [["a", "c"], ["b", "d"]]
    cluster.breaks("a", "c", comes_back=False)
    assert cluster.sent_to(1)[2:] == ["a", "c"]
    cluster.open(fence=cluster.fence(0))
    cluster.breaks("a", "c", replica=1, comes_back=False)
    assert cluster.sent_to(0)[2:] == ["a"], "alone"
    cluster.open(fence=cluster.fence(1))
    assert cluster.sent_to(1)[4:] == ["b", "d"]
    cluster.draws("a", CLEARED_TOKENS)
    cluster.lets_go()
    assert cluster.sent_to(0)[3:] == ["c"]
    cluster.draws("c", CLEARED_TOKENS)
    assert not cluster.core.step(cluster.now, StreamClosed(99)), "nothing is left to be done"


def test_nobody_is_disturbed_for_a_suspect_whose_replica_is_coming_back() -> None:
    cluster = Cluster(("a", "b"), replicas=2)
    cluster.breaks("a", comes_back=False)
    cluster.open(fence=cluster.fence(0))
    cluster.breaks("a", "b", replica=1)
    assert cluster.sent_to(0)[-1:] == ["a"]
    place, replayed = len(cluster.assigns()), cluster.kinds("b").count("request.replayed")
    cluster.breaks(step_broke=False, comes_back=False)
    assert cluster.sent_since(place) == []
    cluster.open(fence=cluster.fence(0))
    assert cluster.sent_since(place) == ["a"]
    assert cluster.kinds("b").count("request.replayed") == replayed


def test_a_suspect_that_waits_gets_a_replica_that_others_had() -> None:
    """It was parked while it was suspected, and comes back to a full house."""
    cluster = Cluster(("a", "b"))
    cluster.breaks("a", "b")
    cluster.breaks("a", "b")
    cluster.post(StreamClosed(0))
    cluster.lets_go()
    cluster.draws("b", CLEARED_TOKENS)
    place = len(cluster.assigns())
    cluster.post(Submit(5, request("a", max_tokens=40)))
    assert cluster.sent_since(place) == [] and cluster.abandons()[-1].request == "b"
    cluster.lets_go()
    assert cluster.sent_since(place) == ["a"]
    cluster.draws("a", CLEARED_TOKENS)
    assert cluster.sent_since(place) == ["a", "b"]
