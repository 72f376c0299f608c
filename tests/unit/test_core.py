"""CoordinatorCore, one promise at a time; the simulation tries them all together."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.journal.state import Prompted as PromptedRecord
from coordinator.requests.core import Counts
from coordinator.requests.events import (
    Append,
    Cancel,
    Deliver,
    Drain,
    LinkClosed,
    ModelChanged,
    ReplicaEnded,
    Reported,
    Send,
    StreamClosed,
    Submit,
    Tick,
)
from coordinator.requests.lives import REATTACH_S
from coordinator.requests.nouns import Received
from echelon.errors import (
    CancelledError,
    ConflictError,
    DeadlineError,
    InvalidRequestError,
    OverloadedError,
    StreamTakenOverError,
    UnavailableError,
)
from echelon.internal.link import (
    Abandon,
    Assign,
    Fence,
    Finish,
    Logprob,
    Progress,
    Prompted,
    Released,
    Report,
    Running,
    TokenRun,
)
from echelon.types import Admitted, Completion, FinishReason, StreamEvent, TokenLogprob, Usage
from tests.unit.core_shell import FENCE, STOP_ID, WINDOW_S, Shell, request


@pytest.fixture
def shell() -> Shell:
    shell = Shell()
    shell.open()
    return shell


def test_a_request_from_submit_to_final(shell: Shell) -> None:
    shell.post(Submit(1, request(max_tokens=3)))
    assert shell.assigns() == [Assign("r", 1, (1, 2, 3), (Progress(0),), request(max_tokens=3).sampling)]
    shell.now = 101.0
    shell.run(0, 5)
    shell.now = 103.0
    effects = shell.report(runs=(TokenRun("r", 0, 1, 1, (6, 7), finish=Finish.LENGTH),), released=(Released("r", 1),))
    admitted, first, second, final = shell.shown[1]
    assert admitted == Admitted("r", 3, 7)
    assert (first, second) == (StreamEvent("r", 0, 0, "<5>", (5,)), StreamEvent("r", 0, 1, "<6><7>", (6, 7)))
    assert isinstance(final, Completion)
    assert (final.text, final.token_ids) == ("<5><6><7>", (5, 6, 7))
    assert final.finish_reason is FinishReason.LENGTH
    assert (final.usage.prompt_tokens, final.usage.completion_tokens) == (3, 3)
    assert (final.timing.queue_s, final.timing.ttft_s, final.timing.total_s) == (0.0, 1.0, 3.0)
    assert [type(effect) for effect in effects] == [Append, Append, Deliver, Deliver, Send]
    assert shell.commands[-1].acked_report == 2


def test_logprobs_stand_beside_ids(shell: Shell) -> None:
    sampling = replace(request().sampling, logprobs=1)
    shell.post(Submit(1, request(sampling=sampling)))
    logprobs = (Logprob(-0.5, (5,), (-0.5,)), Logprob(-1.5, (4,), (-1.0,)))
    shell.report(runs=(TokenRun("r", 0, 1, 0, (5, STOP_ID), logprobs, Finish.STOP),))
    told = (TokenLogprob(5, -0.5, ((5, -0.5),)), TokenLogprob(STOP_ID, -1.5, ((4, -1.0),)))
    delta, final = shell.shown[1][1:]
    assert isinstance(delta, StreamEvent)
    assert isinstance(final, Completion)
    assert delta.logprobs == final.logprobs == told


def test_the_coordinator_alone_fixes_the_last_token(shell: Shell) -> None:
    shell.post(Submit(1, request()))
    shell.run(0, 5, STOP_ID, 6, 7)
    assert shell.ids(1) == [5, STOP_ID]
    assert isinstance(shell.shown[1][-1], Completion)
    assert shell.abandons() == [Abandon("r", 1)]  # its leader has not seen the end


def test_tokens_of_other_attempts_and_other_fences_are_not_heard(shell: Shell) -> None:
    shell.post(Submit(1, request()))
    shell.run(0, 5, attempt=2)
    for fence in (Fence(0, 0, 1), Fence(1, 0, 2), Fence(1, 1, 1)):
        shell.post(Reported(Report(fence, 9, (TokenRun("r", 0, 1, 0, (5,)),))))
    assert shell.ids(1) == []
    assert [emit.kind for emit in shell.told[-3:]] == ["report.refused"] * 3


def test_a_run_that_overlaps_is_trimmed_and_one_behind_a_gap_is_made_again(shell: Shell) -> None:
    shell.post(Submit(1, request()))
    shell.run(0, 5, 6)
    shell.run(0, 5)
    shell.run(1, 6, 7)
    assert shell.ids(1) == [5, 6, 7]
    shell.run(4, 9)
    assert shell.ids(1) == [5, 6, 7]
    assert shell.abandons() == [Abandon("r", 1)]
    assert shell.assigns()[-1] == Assign("r", 2, (1, 2, 3), (Progress(0, (5, 6, 7)),), request().sampling)


def test_a_second_stream_takes_over_and_is_shown_what_it_lacks(shell: Shell) -> None:
    shell.post(Submit(1, request()))
    shell.run(0, 5, 6)
    shell.post(Submit(2, request(), received=((5,),)))
    assert isinstance(shell.last_error(1), StreamTakenOverError)
    assert shell.shown[2] == [Admitted("r", 3, 7), StreamEvent("r", 0, 1, "<6>", (6,))]
    shell.run(2, 8)
    assert shell.ids(2) == [6, 8]
    assert len(shell.assigns()) == 1


@pytest.mark.parametrize(
    ("other", "received"), [({"digest": b"other"}, ()), ({}, ((6,),))], ids=["other content", "other tokens"]
)
def test_what_does_not_belong_to_the_request_is_a_conflict(
    shell: Shell, other: dict[str, object], received: Received
) -> None:
    shell.post(Submit(1, request()))
    shell.run(0, 5)
    shell.post(Submit(2, request(**other), received=received))  # type: ignore[arg-type]
    assert isinstance(shell.last_error(2), ConflictError)
    shell.run(1, 6)
    assert shell.ids(1) == [5, 6]


def test_an_unknown_request_continues_from_the_ids_its_client_holds(shell: Shell) -> None:
    shell.post(Submit(1, request(), received=((5, 6),)))
    assert shell.assigns()[0].choices == (Progress(0, (5, 6)),)
    shell.run(2, 7, finish=Finish.STOP)
    assert shell.shown[1][:2] == [Admitted("r", 3, 7), StreamEvent("r", 0, 2, "<7>", (7,))]
    final = shell.shown[1][2]
    assert isinstance(final, Completion)
    assert final.text == "<5><6><7>"


def test_received_ids_that_are_the_whole_answer_need_no_replica() -> None:
    shell = Shell()
    shell.post(Submit(1, request(), received=((5, STOP_ID),)))
    assert isinstance(shell.shown[1][-1], Completion)


@pytest.mark.parametrize("received", [((STOP_ID, 5),), ((5,) * 9,), ((5,), (6,))])
def test_received_ids_that_cannot_be_are_refused(shell: Shell, received: Received) -> None:
    shell.post(Submit(1, request(), received=received))
    error = shell.last_error(1)
    assert isinstance(error, InvalidRequestError)
    assert error.field == "resume.received"
    assert not shell.records


def test_a_client_that_holds_more_than_a_damaged_journal_is_believed(shell: Shell) -> None:
    shell.post(Submit(1, request()))
    shell.run(0, 5)
    shell.post(Submit(2, request(), received=((5, 6),)))
    assert shell.abandons() == [Abandon("r", 1)]
    shell.run(1, 8)  # of the attempt that is over
    assert shell.ids(2) == []
    assert shell.assigns()[-1] == Assign("r", 2, (1, 2, 3), (Progress(0, (5, 6)),), request().sampling)


def test_a_lost_stream_parks_the_request_and_a_new_one_resumes_it(shell: Shell) -> None:
    shell.post(Submit(1, request()))
    shell.run(0, 5)
    shell.post(StreamClosed(1))
    assert shell.abandons() == [Abandon("r", 1)]
    assert shell.core.counts == Counts(0, 0, 1)
    shell.report(released=(Released("r", 1),))
    shell.post(Submit(2, request(), received=((5,),)))
    assert shell.assigns()[-1] == Assign("r", 2, (1, 2, 3), (Progress(0, (5,)),), request().sampling)


def test_a_parked_request_is_forgotten_after_the_resume_window(shell: Shell) -> None:
    shell.post(Submit(1, request()))
    shell.post(StreamClosed(1))
    shell.now += WINDOW_S - 1
    shell.post(Tick())
    assert "r" in shell.state.entries
    shell.now += 1
    shell.post(Tick())
    assert not shell.state.entries
    assert shell.core.counts == Counts(0, 0, 0)


def test_a_finished_answer_is_replayed_within_the_window_then_forgotten(shell: Shell) -> None:
    shell.post(Submit(1, request()))
    shell.run(0, 5, STOP_ID, finish=Finish.STOP)
    shell.post(Submit(2, request()))
    assert shell.shown[2] == shell.shown[1]
    successor = shell.restart()
    successor.post(Submit(3, request(), received=((5,),)))
    assert successor.ids(3) == [STOP_ID]
    assert isinstance(successor.shown[3][-1], Completion)
    shell.now += WINDOW_S
    shell.post(Tick())
    assert not shell.state.entries


def test_an_error_is_replayed_as_it_was(shell: Shell) -> None:
    shell.post(Submit(1, request()))
    shell.post(Cancel(("r", "unknown")))
    successor = shell.restart()
    successor.post(Submit(2, request()))
    assert isinstance(successor.last_error(2), CancelledError)
    assert str(successor.last_error(2)) == str(shell.last_error(1))


def test_cancel_abandons_at_the_leader_and_leaves_others_alone(shell: Shell) -> None:
    shell.post(Submit(1, request("a")))
    shell.post(Submit(2, request("b")))
    assert shell.core.is_open("a")
    shell.post(Cancel(("a",)))
    assert not shell.core.is_open("a")
    assert shell.abandons() == [Abandon("a", 1)]
    assert isinstance(shell.last_error(1), CancelledError)
    shell.run(0, 5, attempt=2, name="b")
    assert shell.ids(2) == [5]


def test_the_deadline_ends_queued_running_and_parked_requests(shell: Shell) -> None:
    for stream, name in enumerate(("a", "b", "c"), start=1):
        shell.post(Submit(stream, request(name, deadline_unix_s=110.0)))
    shell.post(StreamClosed(1))
    shell.now = 110.0
    shell.post(Tick())
    assert all(isinstance(shell.last_error(stream), DeadlineError) for stream in (2, 3))
    assert shell.core.counts == Counts(0, 0, 0)
    assert {abandon.request for abandon in shell.abandons()} == {"a", "b"}


def test_credits_bound_what_a_leader_is_given_and_only_released_gives_them_back(shell: Shell) -> None:
    for stream, name in enumerate(("a", "b", "c"), start=1):
        shell.post(Submit(stream, request(name)))
    assert [assign.request for assign in shell.assigns()] == ["a", "b"]
    shell.run(0, STOP_ID, finish=Finish.STOP, name="a")
    assert len(shell.assigns()) == 2
    shell.report(released=(Released("a", 1),))
    assert [assign.request for assign in shell.assigns()] == ["a", "b", "c"]


def test_blocks_are_credits_too(shell: Shell) -> None:
    shell.post(Submit(1, request("a", prompt=(1,) * 55)))  # 14 of 20 blocks, and one to grow into
    shell.post(Submit(2, request("b", prompt=(1,) * 20)))  # 5, and one to grow into
    assert [assign.request for assign in shell.assigns()] == ["a"]
    shell.run(0, STOP_ID, finish=Finish.STOP, name="a")
    shell.report(released=(Released("a", 1),))
    assert [assign.request for assign in shell.assigns()] == ["a", "b"]


def test_what_no_replica_can_ever_hold_is_refused_with_the_arithmetic(shell: Shell) -> None:
    shell.post(Submit(1, request(max_tokens=62)))
    error = shell.last_error(1)
    assert isinstance(error, InvalidRequestError)
    assert error.reason == "CONTEXT_TOO_LONG"
    assert "65 tokens, over the 64" in str(error)


def test_a_full_queue_takes_no_new_request_and_forgets_none() -> None:
    shell = Shell(max_queue_tokens=5)
    shell.post(Submit(1, request("a")))
    shell.post(Submit(2, request("b")))
    error = shell.last_error(2)
    assert isinstance(error, OverloadedError)
    assert error.retry_after_s
    assert "3 queued prompt tokens + 3 = 6, over max-queue-tokens=5" in str(error)
    shell.open()
    assert [assign.request for assign in shell.assigns()] == ["a"]
    shell.post(LinkClosed(FENCE))
    for stream, name in ((3, "c"), (5, "e")):
        shell.post(Submit(stream, request(name)))
        assert shell.core.counts.queued == 1, "who left the queue makes room"
        shell.post(Submit(stream + 1, request("too many")))
        assert isinstance(shell.last_error(stream + 1), OverloadedError)
        shell.post(StreamClosed(stream))


def test_draining_refuses_the_new_and_finishes_the_known(shell: Shell) -> None:
    shell.post(Submit(1, request("a")))
    shell.post(Drain())
    shell.post(Submit(2, request("b")))
    assert isinstance(shell.last_error(2), UnavailableError)
    shell.run(0, STOP_ID, finish=Finish.STOP, name="a")
    assert isinstance(shell.shown[1][-1], Completion)


def test_the_end_of_an_epoch_replays_its_requests_first_and_in_order(shell: Shell) -> None:
    for stream, name in enumerate(("a", "b", "c"), start=1):
        shell.post(Submit(stream, request(name)))
    shell.run(0, 5, 6, attempt=2, name="b")
    shell.post(ReplicaEnded(FENCE, "rank 1 was killed"))
    assert [emit.subject for emit in shell.told if emit.kind == "request.replayed"] == ["b", "a"]
    shell.run(2, 7, attempt=2, name="b")  # a message of the dead
    shell.open(fence=Fence(1, 0, 2))
    again = shell.assigns()[2:]
    assert [(assign.request, assign.attempt, assign.choices) for assign in again] == [
        ("a", 3, (Progress(0),)),
        ("b", 4, (Progress(0, (5, 6)),)),
    ]
    shell.post(Reported(Report(Fence(1, 0, 2), 1, (TokenRun("b", 0, 4, 2, (STOP_ID,), finish=Finish.STOP),))))
    final = shell.shown[2][-1]
    assert isinstance(final, Completion)
    assert final.token_ids == (5, 6, STOP_ID)
    assert final.usage.recomputed_tokens == 5


def test_what_a_forgotten_request_left_at_a_leader_is_not_taken_for_one_that_uses_its_id_again(shell: Shell) -> None:
    shell.post(Submit(1, request()))
    shell.post(LinkClosed(FENCE))
    shell.post(StreamClosed(1))
    shell.now += WINDOW_S
    shell.post(Tick())
    shell.records = list(shell.state.records())  # the journal was compacted
    successor = shell.restart()
    successor.post(Submit(2, request(prompt=(9, 9), digest=b"of other content")))
    successor.open(Running("r", 1))
    assert successor.abandons() == [Abandon("r", 1)]
    assert [assign.attempt > 1 for assign in successor.assigns()] == [True]
    successor.run(0, 5, attempt=1)  # made for the other prompt, and not acknowledged before the link broke
    successor.run(0, 6, attempt=successor.assigns()[0].attempt)
    assert successor.ids(2) == [6]


def test_no_attempt_is_numbered_like_one_that_the_journal_has_lost(shell: Shell) -> None:
    """Terms are never lost, and they are the upper half of the number."""
    shell.post(Submit(1, request()))
    shell.records = []
    successor = shell.restart()
    successor.post(Submit(2, request(prompt=(9, 9), digest=b"of other content")))
    successor.open(Running("r", 1))
    assert successor.abandons() == [Abandon("r", 1)]
    successor.run(0, 5, attempt=1)
    assert successor.assigns() and not successor.ids(2)


def test_an_epoch_that_is_over_cannot_come_back(shell: Shell) -> None:
    shell.post(Submit(1, request()))
    shell.post(ReplicaEnded(FENCE, "suspected"))
    shell.open()
    assert len(shell.assigns()) == 1
    assert shell.told[-1].kind == "link.refused"


def test_a_link_that_comes_back_goes_on_where_it_was(shell: Shell) -> None:
    shell.post(Submit(1, request("a")))
    shell.post(Submit(2, request("b")))
    shell.post(LinkClosed(FENCE))
    shell.post(StreamClosed(2))
    shell.open(Running("a", 1), Running("b", 1), Running("stranger", 4))
    assert len(shell.assigns()) == 2
    assert shell.abandons() == [Abandon("b", 1), Abandon("stranger", 4)]
    shell.run(0, 5, name="a")
    assert shell.ids(1) == [5]


def test_an_assignment_that_was_lost_with_its_link_is_made_again(shell: Shell) -> None:
    shell.post(Submit(1, request()))
    shell.post(LinkClosed(FENCE))
    shell.open()
    assert [assign.attempt for assign in shell.assigns()] == [1, 2]


@pytest.mark.parametrize(("last_attempt", "recomputed"), [(1, 0), (2, 3)])
def test_only_what_a_leader_has_had_is_computed_again(shell: Shell, last_attempt: int, recomputed: int) -> None:
    """The coordinator dies with the second assignment written and not sent; or its leader has it, and let go."""
    shell.post(Submit(1, request("a")))
    shell.post(Submit(2, request("b")))
    successor = shell.restart()
    successor.post(Submit(8, request("a")))
    successor.post(Submit(9, request("b")))
    successor.open(Running("a", 1), last_attempt=last_attempt)
    assert [emit.detail["recomputed_tokens"] for emit in successor.told if emit.subject == "b"] == [recomputed]
    again = successor.assigns()[-1].attempt
    successor.post(ReplicaEnded(replace(FENCE, term=2), "a rank dies"))
    successor.open(fence=Fence(2, 0, 2))
    assert successor.assigns()[-1].attempt > again
    successor.report((TokenRun("b", 0, successor.assigns()[-1].attempt, 0, (STOP_ID,)),), fence=Fence(2, 0, 2))
    final = successor.shown[9][-1]
    assert isinstance(final, Completion) and final.usage.recomputed_tokens == recomputed + 3


def test_what_a_leader_lets_go_of_by_itself_is_computed_without_what_others_have(shell: Shell) -> None:
    """Once: what it shares with others may be computed anew, and found again, as often as they come."""
    shell.post(Submit(1, request("a", cache_salt="salt")))
    shell.report(released=(Released("a", 1),))
    shell.post(Submit(2, request("b", cache_salt="salt")))
    shell.post(ReplicaEnded(FENCE, "a rank dies"))
    shell.open(fence=Fence(1, 0, 2))
    salts = [(assign.request, assign.cache_salt) for assign in shell.assigns()]
    assert salts == [("a", "salt"), ("a", "@a"), ("b", "salt"), ("a", "@a"), ("b", "salt")]


def test_what_a_leader_refuses_fails_with_its_reason(shell: Shell) -> None:
    shell.post(Submit(1, request()))
    shell.report(released=(Released("r", 1, "no such thing", "CONSTRAINT_FAILED"),))
    error = shell.last_error(1)
    assert isinstance(error, InvalidRequestError)
    assert (error.reason, error.message, error.request_id) == ("CONSTRAINT_FAILED", "no such thing", "r")


def test_a_successor_adopts_what_runs_and_resumes_its_stream(shell: Shell) -> None:
    shell.post(Submit(1, request()))
    shell.run(0, 5)
    successor = shell.restart()
    successor.open(Running("r", 1))
    successor.run(0, 5)  # unacknowledged, so sent again
    successor.run(1, 6, 7)
    successor.post(Submit(9, request(), received=((5,),)))
    assert successor.ids(9) == [6, 7]
    assert successor.assigns() == []
    assert successor.abandons() == []


def test_a_successor_parks_what_no_client_asks_for(shell: Shell) -> None:
    shell.post(Submit(1, request()))
    successor = shell.restart()
    successor.open(Running("r", 1))
    assert successor.core.counts == Counts(0, 1, 0)
    successor.now += REATTACH_S
    successor.post(Tick())
    assert successor.abandons() == [Abandon("r", 1)]
    assert successor.core.counts == Counts(0, 0, 1)


def test_a_crash_between_the_last_token_and_its_end_is_healed(shell: Shell) -> None:
    shell.post(Submit(1, request()))
    shell.run(0, 5, STOP_ID, finish=Finish.STOP)
    shell.records.pop()
    successor = shell.restart()
    successor.post(ReplicaEnded(FENCE, "gone too"))
    successor.post(Submit(2, request(), received=((5, STOP_ID),)))
    assert isinstance(successor.shown[2][-1], Completion)
    assert successor.assigns() == []


def cached(tokens: int, attempt: int = 1, logprobs: tuple[Logprob, ...] = ()) -> tuple[Prompted]:
    return (Prompted("r", attempt, tokens, logprobs),)


def test_cached_tokens_of_the_prompt_stand_in_the_usage(shell: Shell) -> None:
    shell.post(Submit(1, request()))
    shell.report((TokenRun("r", 0, 1, 0, (5,)),), prompted=cached(2))
    shell.run(1, STOP_ID, finish=Finish.STOP)
    assert shell.final(1).usage == Usage(3, 2, 0, 2)
    successor = shell.restart()
    successor.post(Submit(2, request()))
    assert successor.final(2) == shell.final(1)


@pytest.mark.parametrize(("told", "usage"), [(0, 0), (1, 1)])
def test_what_the_first_attempt_found_cached_counts_and_no_replay(shell: Shell, told: int, usage: int) -> None:
    shell.post(Submit(1, request()))
    shell.report((TokenRun("r", 0, 1, 0, (5,)),), prompted=cached(told))
    shell.post(ReplicaEnded(FENCE, "killed"))
    shell.open(fence=Fence(1, 0, 2))
    run = TokenRun("r", 0, 2, 1, (STOP_ID,), finish=Finish.STOP)
    shell.post(Reported(Report(Fence(1, 0, 2), 1, (run,), prompted=cached(3, attempt=2))))
    assert shell.final(1).usage.cached_tokens == usage


def test_an_attempt_that_never_computed_its_prompt_leaves_that_to_the_next(shell: Shell) -> None:
    shell.post(Submit(1, request()))
    shell.post(ReplicaEnded(FENCE, "killed"))
    shell.open(fence=Fence(1, 0, 2))
    stale, now = cached(1), cached(3, attempt=2)
    run = TokenRun("r", 0, 2, 0, (STOP_ID,), finish=Finish.STOP)
    shell.post(Reported(Report(Fence(1, 0, 2), 1, (run,), prompted=(*stale, *now))))
    assert shell.final(1).usage.cached_tokens == 3


def test_log_probabilities_of_the_prompt_survive_the_coordinator(shell: Shell) -> None:
    sampling = replace(request().sampling, prompt_logprobs=1)
    shell.post(Submit(1, request(sampling=sampling)))
    logprobs = (Logprob(-0.5, (2,), (-0.5,)), Logprob(-1.5, (4,), (-1.0,)))
    shell.report((TokenRun("r", 0, 1, 0, (5,)),), prompted=cached(0, logprobs=logprobs))
    successor = shell.restart()
    successor.open(Running("r", 1))
    successor.post(Submit(2, request(sampling=sampling), received=((5,),)))
    successor.report((TokenRun("r", 0, 1, 1, (STOP_ID,), finish=Finish.STOP),), prompted=cached(2))
    told = (TokenLogprob(2, -0.5, ((2, -0.5),)), TokenLogprob(3, -1.5, ((4, -1.0),)))
    assert [record.attempt for record in successor.records if isinstance(record, PromptedRecord)] == [1]
    assert successor.final(2).prompt_logprobs == told
    assert successor.final(2).usage.cached_tokens == 0
    third = successor.restart()
    third.post(Submit(3, request(sampling=sampling)))
    assert third.final(3) == replace(successor.final(2), timing=third.final(3).timing)


def test_nothing_is_written_of_a_prompt_of_which_there_is_nothing_to_tell(shell: Shell) -> None:
    shell.post(Submit(1, request()))
    records = len(shell.records)
    shell.report(prompted=cached(0))
    assert len(shell.records) == records


def test_lower_priority_goes_first_then_who_came_first(shell: Shell) -> None:
    shell.hello = replace(shell.hello, slots=1)
    shell.open()
    for stream, (name, priority) in enumerate((("z", 0), ("y", 0), ("x", -1), ("d", 1), ("w", -1)), start=1):
        shell.post(Submit(stream, request(name, priority=priority)))
    order = ["z", "x", "w", "y", "d"]
    for attempt, name in enumerate(order, start=1):
        assert shell.assigns()[-1].request == name
        assert shell.assigns()[-1].priority == {"d": 1, "x": -1, "w": -1}.get(name, 0)
        shell.run(0, STOP_ID, attempt=attempt, finish=Finish.STOP, name=name)
        shell.report(released=(Released(name, attempt),))
    assert [assign.request for assign in shell.assigns()] == order


def test_who_is_interrupted_takes_its_old_place_and_passes_no_better_one(shell: Shell) -> None:
    shell.post(Submit(1, request("a")))
    shell.post(Submit(2, request("b", priority=1)))
    shell.post(Submit(3, request("c")))
    shell.post(Submit(4, request("d", priority=1)))
    assert [assign.request for assign in shell.assigns()] == ["a", "b"]
    shell.post(ReplicaEnded(FENCE, "killed"))
    shell.hello = replace(shell.hello, slots=4)
    shell.open(fence=Fence(1, 0, 2))
    assert [assign.request for assign in shell.assigns()[2:]] == ["a", "c", "b", "d"]


def test_who_leaves_the_queue_and_comes_back_waits_once(shell: Shell) -> None:
    shell.hello = replace(shell.hello, slots=1)
    shell.open()
    for stream, name in enumerate(("a", "b", "c"), start=1):
        shell.post(Submit(stream, request(name)))
    for stream in (2, 4):
        shell.post(StreamClosed(stream))
        shell.post(Submit(stream + 2, request("b")))
    shell.post(StreamClosed(3))
    assert shell.core.counts == Counts(1, 1, 1)
    shell.run(0, STOP_ID, finish=Finish.STOP, name="a")
    shell.report(released=(Released("a", 1),))
    assert [assign.request for assign in shell.assigns()] == ["a", "b"]
    assert shell.core.counts == Counts(0, 1, 1)
    shell.run(0, STOP_ID, attempt=2, finish=Finish.STOP, name="b")
    shell.report(released=(Released("b", 2),))
    shell.post(Submit(9, request("c")))
    assert [assign.request for assign in shell.assigns()] == ["a", "b", "c"]


def test_the_salt_of_cached_prefixes_goes_to_the_leader_and_through_the_journal(shell: Shell) -> None:
    shell.post(Submit(1, request(cache_salt="tenant", priority=3)))
    assert shell.assigns()[0].cache_salt == "tenant"
    successor = shell.restart()
    successor.open()
    successor.post(Submit(2, request(cache_salt="tenant", priority=3)))
    assert (successor.assigns()[0].cache_salt, successor.assigns()[0].priority) == ("tenant", 3)


def test_another_model_remembers_nothing_of_the_last_ones_requests(shell: Shell) -> None:
    shell.post(Submit(1, request(max_tokens=1)))
    shell.report(runs=(TokenRun("r", 0, 1, 0, (5,), finish=Finish.LENGTH),), released=(Released("r", 1),))
    shell.post(Submit(2, request("open")))
    shell.post(ModelChanged())
    assert isinstance(shell.shown[2][-1], UnavailableError), "come again"
    assert shell.core.remembered == 0
    shell.post(Submit(3, request(max_tokens=1)))
    assert shell.assigns()[-1].request == "r", "computed anew"
