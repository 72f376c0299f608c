"""Several answers to one prompt: each with its own tokens and its own end, one request to everybody else."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest

from coordinator.answer_text import AnswerText, Stops
from coordinator.journal.state import Assigned, Finished, Tokens
from coordinator.requests.core import Counts
from coordinator.requests.events import LinkClosed, ReplicaEnded, StreamClosed, Submit, Tick
from coordinator.requests.nouns import Received, Request
from echelon.errors import ConflictError, InvalidRequestError
from echelon.internal.link import (
    Abandon,
    Assign,
    Fence,
    Finish,
    Logprob,
    Progress,
    Released,
    Running,
    TokenRun,
)
from echelon.types import Admitted, FinishReason, StreamEvent, TokenLogprob, Usage
from tests.unit import core_shell
from tests.unit.core_shell import FENCE, HELLO, STOP_ID, WINDOW_S, Shell, new_text, request


def choices(n: int = 3, **changes: object) -> Request:
    return request(sampling=replace(request().sampling, n=n, **changes))  # type: ignore[arg-type]


@pytest.fixture
def shell() -> Shell:
    shell = Shell(hello=replace(HELLO, slots=8))
    shell.open()
    return shell


def run(choice: int, first: int, *ids: int, finish: Finish | None = None, attempt: int = 1) -> TokenRun:
    return TokenRun("r", choice, attempt, first, ids, finish=finish)


def finished(shell: Shell) -> list[Finished]:
    return [record for record in shell.records if isinstance(record, Finished)]


def test_every_choice_is_answered_and_one_final_has_them_all(shell: Shell) -> None:
    shell.post(Submit(1, choices(max_tokens=3)))
    assert shell.assigns() == [
        Assign("r", 1, (1, 2, 3), (Progress(0), Progress(1), Progress(2)), choices(max_tokens=3).sampling)
    ]
    shell.report((run(0, 0, 5), run(1, 0, 6), run(2, 0, 7)))
    shell.report((run(1, 1, STOP_ID, finish=Finish.STOP), run(2, 1, 8)))
    shell.report((run(0, 1, 9, 10, finish=Finish.LENGTH),))
    assert not finished(shell)
    shell.report((run(2, 2, 11, finish=Finish.LENGTH),), (Released("r", 1),))
    assert [shell.ids(1, choice) for choice in range(3)] == [[5, 9, 10], [6, STOP_ID], [7, 8, 11]]
    final = shell.final(1)
    assert [choice.index for choice in final.choices] == [0, 1, 2]
    assert [choice.token_ids for choice in final.choices] == [(5, 9, 10), (6, STOP_ID), (7, 8, 11)]
    assert [choice.text for choice in final.choices] == ["<5><9><10>", f"<6><{STOP_ID}>", "<7><8><11>"]
    assert [choice.finish_reason.value for choice in final.choices] == ["length", "stop", "length"]
    assert final.usage == Usage(3, 8)
    assert finished(shell) == [Finished("r", shell.now, (Finish.LENGTH, Finish.STOP, Finish.LENGTH))]
    assert not shell.abandons()
    assert [type(shown) for shown in shell.shown[1]].count(type(final)) == 1


def test_a_choice_that_a_stop_string_ends_is_abandoned_alone(shell: Shell) -> None:
    shell.post(Submit(1, choices(2, stop=("<7>",))))
    shell.report((run(0, 0, 5), run(1, 0, 6)))
    shell.report((run(0, 1, 5), run(1, 1, 7)))
    assert shell.abandons() == [Abandon("r", 1, 1)]
    assert not finished(shell)
    shell.report((run(0, 2, 5), run(1, 2, 8)))  # what was under way
    shell.report((run(0, 3, 5), run(1, 3, 9)))  # and what the leader made behind that
    assert shell.ids(1, 1) == [6, 7]
    assert shell.ids(1, 0) == [5, 5, 5, 5]
    assert shell.abandons() == [Abandon("r", 1, 1)]
    assert len(shell.assigns()) == 1, "nothing is replayed for what is made of a choice that has ended"
    shell.report((run(0, 4, STOP_ID, finish=Finish.STOP),), (Released("r", 1),))
    first, second = shell.final(1).choices
    assert (second.text, second.matched_stop, second.finish_reason) == ("<6>", "<7>", FinishReason.STOP)
    assert (first.text, first.matched_stop) == (f"<5><5><5><5><{STOP_ID}>", "")
    assert finished(shell) == [Finished("r", shell.now, (Finish.STOP, Finish.STOP))]


def test_the_last_choice_that_a_stop_string_ends_abandons_the_whole(shell: Shell) -> None:
    shell.post(Submit(1, choices(2, stop=("<7>",))))
    shell.report((run(0, 0, 5, STOP_ID, finish=Finish.STOP), run(1, 0, 6, 7, 8)))
    assert shell.abandons() == [Abandon("r", 1)]
    assert [choice.token_ids for choice in shell.final(1).choices] == [(5, STOP_ID), (6, 7)]
    assert len(finished(shell)) == 1
    shell.report((run(1, 3, 9),), (Released("r", 1),))  # of a request that is over
    assert len(finished(shell)) == 1


def test_logprobs_stay_with_their_choice(shell: Shell) -> None:
    shell.post(Submit(1, choices(2, logprobs=0, stop=("<7>",))))
    shell.report(
        (
            TokenRun("r", 0, 1, 0, (5,), (Logprob(-0.5),)),
            TokenRun("r", 1, 1, 0, (6, 7, 8), (Logprob(-1.0), Logprob(-2.0), Logprob(-3.0))),
        )
    )
    shell.report((TokenRun("r", 0, 1, 1, (STOP_ID,), (Logprob(-0.25),), Finish.STOP),))
    first, second = shell.final(1).choices
    assert first.logprobs == (TokenLogprob(5, -0.5), TokenLogprob(STOP_ID, -0.25))
    assert second.logprobs == (TokenLogprob(6, -1.0), TokenLogprob(7, -2.0))


def test_a_second_stream_is_shown_what_it_lacks_of_each_choice(shell: Shell) -> None:
    shell.post(Submit(1, choices()))
    shell.report((run(0, 0, 5, 6), run(1, 0, 7, STOP_ID, finish=Finish.STOP), run(2, 0, 8)))
    shell.post(Submit(2, choices(), received=((5,), (7, STOP_ID))))
    assert shell.shown[2] == [
        Admitted("r", 3, 7),
        StreamEvent("r", 0, 1, "<6>", (6,)),
        StreamEvent("r", 2, 0, "<8>", (8,)),
    ]
    shell.report((run(2, 1, 9),))
    assert shell.ids(2, 2) == [8, 9]
    assert len(shell.assigns()) == 1


def test_what_a_client_holds_of_an_unknown_request_is_gone_on_from_by_choice(shell: Shell) -> None:
    shell.post(Submit(1, choices(), received=((5, 6), (7, STOP_ID))))
    assert shell.assigns()[0].choices == (Progress(0, (5, 6)), Progress(2))
    shell.report((run(0, 2, STOP_ID, finish=Finish.STOP), run(2, 0, STOP_ID, finish=Finish.STOP)))
    assert [choice.token_ids for choice in shell.final(1).choices] == [(5, 6, STOP_ID), (7, STOP_ID), (STOP_ID,)]
    assert [shell.ids(1, choice) for choice in range(3)] == [[STOP_ID], [], [STOP_ID]]


def test_a_client_that_holds_every_choice_whole_needs_no_replica() -> None:
    shell = Shell()
    shell.post(Submit(1, choices(2, stop=("<7>",)), received=((5, STOP_ID), (6, 7))))
    assert [choice.text for choice in shell.final(1).choices] == [f"<5><{STOP_ID}>", "<6>"]
    assert len(finished(shell)) == 1


@pytest.mark.parametrize(
    ("received", "message"),
    [
        (((5,), (6,), (7,)), "holds 3 choices, over n=2"),
        (((5,), (6,) * 9), r"received\[1\] holds 9 ids, over max_tokens=8"),
        (((5,), (STOP_ID, 6)), r"received\[1\] has 999 at place 0, which ends the answer, but 1 ids follow"),
        (((5,), (6, 7, 8, 9)), r"received\[1\] has '<7>' after 2 ids, which ends the answer, but 2 ids follow"),
    ],
)
def test_received_ids_that_cannot_be_are_refused_by_choice(shell: Shell, received: Received, message: str) -> None:
    shell.post(Submit(1, choices(2, stop=("<7>",)), received=received))
    error = shell.last_error(1)
    assert isinstance(error, InvalidRequestError)
    assert error.field == "resume.received"
    with pytest.raises(InvalidRequestError, match=message):
        raise error
    assert not shell.records


def test_received_ids_of_a_known_request_must_be_how_that_choice_begins(shell: Shell) -> None:
    shell.post(Submit(1, choices(2)))
    shell.report((run(0, 0, 5), run(1, 0, 6)))
    shell.post(Submit(2, choices(2), received=((5,), (5,))))
    error = shell.last_error(2)
    assert isinstance(error, ConflictError)
    assert r"resume.received[1] is not how answer 1 to 'r' begins" in str(error)


def test_a_client_that_holds_more_of_one_choice_than_the_journal_is_believed(shell: Shell) -> None:
    shell.post(Submit(1, choices(2)))
    shell.report((run(0, 0, 5), run(1, 0, 6)))
    shell.post(Submit(2, choices(2), received=((5,), (6, 7))))
    assert shell.abandons() == [Abandon("r", 1)]
    assert Tokens("r", 0, 1, (7,), choice=1) in shell.records
    assert shell.assigns()[-1].choices == (Progress(0, (5,)), Progress(1, (6, 7)))
    assert shell.assigns()[-1].attempt == 2


def test_a_client_that_holds_more_to_the_end_of_every_choice_needs_no_replica_any_more(shell: Shell) -> None:
    shell.post(Submit(1, choices(2)))
    shell.report((run(0, 0, STOP_ID, finish=Finish.STOP), run(1, 0, 6)))
    shell.post(Submit(2, choices(2), received=((STOP_ID,), (6, STOP_ID))))
    assert [choice.token_ids for choice in shell.final(2).choices] == [(STOP_ID,), (6, STOP_ID)]
    assert len(shell.assigns()) == 1


@pytest.mark.parametrize("stop", [(), ("<7>",)])
def test_texts_live_no_longer_than_something_is_to_be_read_or_judged(
    monkeypatch: pytest.MonkeyPatch, stop: tuple[str, ...]
) -> None:
    texts: weakref.WeakSet[AnswerText] = weakref.WeakSet()

    def counted(stops: Stops) -> AnswerText:
        text = new_text(stops)
        texts.add(text)
        return text

    monkeypatch.setattr(core_shell, "new_text", counted)
    shell = Shell(hello=replace(HELLO, slots=8))
    shell.open()
    wanted = choices(2, stop=stop)
    shell.post(Submit(1, wanted))
    assert len(texts) == 2
    shell.post(StreamClosed(1))
    assert len(texts) == 0
    shell.post(Submit(2, wanted))
    shell.report(released=(Released("r", 1),))
    shell.report(tuple(run(choice, 0, STOP_ID, finish=Finish.STOP, attempt=2) for choice in range(2)))
    assert shell.final(2)
    assert len(texts) == 0
    shell.post(Submit(3, wanted))
    assert shell.final(3)
    assert len(texts) == 0
    successor = shell.restart()
    successor.post(Tick())
    assert len(texts) == 0


def test_a_lost_stream_resumes_with_the_choices_that_go_on(shell: Shell) -> None:
    shell.post(Submit(1, choices()))
    shell.report((run(0, 0, 5), run(1, 0, STOP_ID, finish=Finish.STOP), run(2, 0, 6, 7)))
    shell.post(StreamClosed(1))
    assert shell.abandons() == [Abandon("r", 1)]
    shell.report(released=(Released("r", 1),))
    shell.post(Submit(2, choices(), received=((5,), (STOP_ID,), (6,))))
    assert shell.assigns()[-1].choices == (Progress(0, (5,)), Progress(2, (6, 7)))
    assert shell.ids(2, 2) == [7]
    records = [record for record in shell.records if isinstance(record, Assigned)]
    assert records[-1].recomputed_tokens == 3 + 1 + 2, "the prompt once, and nothing of the choice that has ended"


def test_a_new_epoch_is_given_only_the_choices_that_go_on(shell: Shell) -> None:
    shell.post(Submit(1, choices(3, stop=("<7>",))))
    shell.report((run(0, 0, 5), run(1, 0, 6, 7), run(2, 0, 8, STOP_ID, finish=Finish.STOP)))
    shell.post(ReplicaEnded(FENCE, "rank 1 was killed"))
    (replayed,) = [emit for emit in shell.told if emit.kind == "request.replayed"]
    assert replayed.detail["recomputed_tokens"] == 3 + 1
    shell.open(fence=Fence(1, 0, 2))
    assert shell.assigns()[-1].choices == (Progress(0, (5,)),)
    assert shell.assigns()[-1].attempt == 2


def test_a_successor_adopts_a_request_and_tells_its_leader_which_choices_have_ended(shell: Shell) -> None:
    shell.post(Submit(1, choices(3, stop=("<7>",))))
    shell.report((run(0, 0, 5), run(1, 0, 6, 7), run(2, 0, 8)))
    successor = shell.restart()
    successor.open(Running("r", 1))
    assert successor.abandons() == [Abandon("r", 1, 1)], "the first word of it may have been lost with the coordinator"
    assert not successor.assigns()
    successor.report((run(1, 2, 9), run(1, 3, 10), run(0, 1, 11)))
    successor.post(Submit(2, choices(3, stop=("<7>",)), received=((5,), (6,), ())))
    assert [successor.ids(2, choice) for choice in range(3)] == [[11], [7], [8]]
    assert successor.text(2, 1) == "", "<6> was shown, <7> is the stop string"
    successor.report((run(0, 2, STOP_ID, finish=Finish.STOP), run(2, 1, STOP_ID, finish=Finish.STOP)))
    assert [choice.text for choice in successor.final(2).choices] == [f"<5><11><{STOP_ID}>", "<6>", f"<8><{STOP_ID}>"]
    assert [choice.matched_stop for choice in successor.final(2).choices] == ["", "<7>", ""]


def test_a_link_that_comes_back_hears_of_the_choices_that_ended_meanwhile(shell: Shell) -> None:
    shell.post(Submit(1, choices(2, stop=("<7>",))))
    shell.report((run(0, 0, 5), run(1, 0, 7)))
    shell.commands.clear()  # lost
    shell.post(LinkClosed(FENCE))
    shell.open(Running("r", 1))
    assert shell.abandons() == [Abandon("r", 1, 1)]


def test_a_successor_without_a_leader_gives_out_only_the_choices_that_go_on(shell: Shell) -> None:
    shell.post(Submit(1, choices(3, stop=("<7>",))))
    shell.report((run(0, 0, 5), run(1, 0, 6, 7), run(2, 0, 8)))
    successor = shell.restart()
    successor.open()
    successor.post(Submit(2, choices(3, stop=("<7>",)), received=((), (6, 7))))
    assert successor.assigns()[-1].choices == (Progress(0, (5,)), Progress(2, (8,)))


def test_a_crash_between_the_last_tokens_and_their_end_is_healed_even_if_the_leader_goes_on(shell: Shell) -> None:
    wanted = choices(2, stop=("<7>",))
    shell.post(Submit(1, wanted))
    shell.report((run(0, 0, STOP_ID, finish=Finish.STOP), run(1, 0, 7)))
    assert isinstance(shell.records.pop(), Finished)
    successor = shell.restart()
    successor.open(Running("r", 1))
    assert successor.abandons() == [Abandon("r", 1)]
    assert successor.core.counts == Counts(0, 0, 0)
    successor.post(Submit(2, wanted))
    assert [choice.token_ids for choice in successor.final(2).choices] == [(STOP_ID,), (7,)]


def test_an_answer_is_read_again_within_the_window_choice_by_choice(shell: Shell) -> None:
    wanted = choices(2, stop=("<7>",), include_stop=True)
    shell.post(Submit(1, wanted))
    shell.report((run(0, 0, 5, STOP_ID, finish=Finish.STOP), run(1, 0, 6, 7, 8)))
    successor = shell.restart()
    successor.post(Submit(2, wanted, received=((5,),)))
    assert [successor.ids(2, choice) for choice in range(2)] == [[STOP_ID], [6, 7]]
    assert successor.final(2).choices == shell.final(1).choices
    assert successor.final(2).choices[1].text == "<6><7>"
    successor.now += WINDOW_S
    successor.post(Tick())
    assert not successor.state.entries


def test_stop_strings_are_judged_without_a_reader(shell: Shell) -> None:
    wanted = choices(2, stop=("5><6",))
    shell.post(Submit(1, wanted))
    shell.report((run(0, 0, 5), run(1, 0, 8)))
    successor = shell.restart()
    successor.open(Running("r", 1))
    successor.report((run(0, 1, 6, 7), run(1, 1, STOP_ID, finish=Finish.STOP)))
    assert [record.finishes for record in finished(successor)] == [(Finish.STOP, Finish.STOP)]
    assert successor.abandons() == [Abandon("r", 1, 0)]
    successor.post(Submit(2, wanted))
    assert successor.final(2).choices[0].text == "<"
    assert successor.final(2).choices[0].token_ids == (5, 6)


def test_text_that_a_stop_string_may_begin_with_is_shown_late_but_the_ids_are_not(shell: Shell) -> None:
    shell.post(Submit(1, request(sampling=replace(request().sampling, stop=("<6><7>",)))))
    for place, token_id in enumerate((5, 6, 8)):
        shell.run(place, token_id)
    assert [(event.text, event.token_ids) for event in shell.deltas(1)] == [("<5>", (5,)), ("", (6,)), ("<6><8>", (8,))]
    shell.run(3, 6)
    shell.post(Submit(2, request(sampling=replace(request().sampling, stop=("<6><7>",))), received=((5, 6, 8, 6),)))
    shell.run(4, 9)
    assert shell.text(2) == "<6><9>", "what was held back before it came is its to show"
    shell.run(5, 6, 7, 5)
    assert shell.final(2).text == "<5><6><8><6><9>"
    assert shell.ids(2) == [9, 6, 7]


def test_the_limit_releases_what_was_held_back(shell: Shell) -> None:
    shell.post(Submit(1, request(sampling=replace(request().sampling, stop=("<6><7>",), max_tokens=2))))
    shell.run(0, 5, 6, finish=Finish.LENGTH)
    assert shell.text(1) == "<5>"
    assert (shell.final(1).text, shell.final(1).finish_reason) == ("<5><6>", FinishReason.LENGTH)


@pytest.mark.parametrize(("min_tokens", "ids"), [(0, [STOP_ID]), (1, [STOP_ID, STOP_ID]), (2, [STOP_ID] * 3)])
def test_stop_ids_end_nothing_before_min_tokens(shell: Shell, min_tokens: int, ids: list[int]) -> None:
    shell.post(Submit(1, request(sampling=replace(request().sampling, min_tokens=min_tokens))))
    shell.run(0, *[STOP_ID] * 5)
    assert shell.ids(1) == ids
    assert shell.final(1).finish_reason is FinishReason.STOP
    late = Shell()
    late.post(Submit(1, request(sampling=replace(request().sampling, min_tokens=min_tokens)), (tuple(ids),)))
    assert late.final(1).token_ids == tuple(ids)
    late.post(Submit(2, request("s", sampling=replace(request().sampling, min_tokens=min_tokens)), ((*ids, 5),)))
    assert isinstance(late.last_error(2), InvalidRequestError)
