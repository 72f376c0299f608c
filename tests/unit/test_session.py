"""The SDK's state machine, event by event: resumes, duplicates, gaps, back-off, deadlines, ends."""

from __future__ import annotations

from dataclasses import replace

import pytest

from echelon.errors import (
    CancelledError,
    DeadlineError,
    InternalError,
    InvalidRequestError,
    OverloadedError,
    StreamTakenOverError,
    UnavailableError,
)
from echelon.generation_session import GenerationSession
from echelon.retry import RetryPolicy, decide_retry
from echelon.session import (
    REACHED_S,
    Broken,
    CallSession,
    Cancel,
    CancelRemote,
    Ended,
    FeedSession,
    Finish,
    Open,
    Raise,
    Received,
    Sleep,
    Start,
    Timer,
    Yield,
)
from echelon.types import Admitted, Choice, Completion, FinishReason, StreamEvent

POLICY = RetryPolicy(initial_s=1.0, max_s=8.0)


def delta(sequence: int, *ids: int, text: str | None = None) -> Received[StreamEvent]:
    words = "".join(f"{token_id} " for token_id in ids) if text is None else text
    return Received(StreamEvent("r", 0, sequence, words, ids))


def final(*ids: int, text: str | None = None) -> Received[Completion]:
    words = "".join(f"{token_id} " for token_id in ids) if text is None else text
    choice = Choice(text=words, token_ids=ids, finish_reason=FinishReason.STOP)
    return Received(Completion(request_id="r", model="m", choices=(choice,)))


def started(timeout_s: float | None = 100.0) -> GenerationSession:
    session = GenerationSession("r", timeout_s, POLICY)
    assert session.step(0.0, Start()) == [Open((), timeout_s)]
    return session


def test_an_undisturbed_stream_hands_on_every_delta_and_finishes_once() -> None:
    session = started()
    assert session.step(1.0, Received(Admitted("r", 4, 7))) == []
    assert session.admitted == Admitted("r", 4, 7)
    assert session.step(1.0, delta(0, 1)) == [Yield(delta(0, 1).message)]
    assert session.step(2.0, delta(1, 2, 3)) == [Yield(delta(1, 2, 3).message)]
    assert session.step(3.0, final(1, 2, 3)) == [Finish(final(1, 2, 3).message)]
    assert session.ended
    assert session.step(4.0, Broken(UnavailableError("late"))) == []
    assert session.step(4.0, Cancel()) == []


def test_a_broken_stream_resumes_after_the_tokens_it_holds() -> None:
    session = started()
    session.step(1.0, delta(0, 1, 2))
    (sleep,) = session.step(2.0, Broken(UnavailableError("gone")))
    assert isinstance(sleep, Sleep)
    assert 0.5 <= sleep.seconds <= 1.0
    assert session.step(3.0, Timer()) == [Open(((1, 2),), 97.0)]
    assert session.step(4.0, delta(2, 3)) == [Yield(delta(2, 3).message)]
    assert session.step(5.0, final(1, 2, 3)) == [Finish(final(1, 2, 3).message)]


def test_a_stream_that_ends_without_its_final_is_broken() -> None:
    session = started()
    session.step(1.0, delta(0, 1))
    (effect,) = session.step(2.0, Ended())
    assert isinstance(effect, Sleep)
    assert session.step(3.0, Timer()) == [Open(((1,),), 97.0)]


def test_repeated_deltas_are_dropped() -> None:
    session = started()
    session.step(1.0, delta(0, 1))
    session.step(1.0, delta(1, 2))
    assert session.step(2.0, delta(0, 1)) == []
    assert session.step(2.0, delta(0, 1, 2)) == []
    assert session.step(3.0, delta(2, 3)) == [Yield(delta(2, 3).message)]


@pytest.mark.parametrize("lost", [delta(3, 4), delta(1, 2, 3)], ids=["gap", "overlap"])
def test_a_delta_out_of_place_is_never_handed_on_but_asked_for_again(lost: Received[StreamEvent]) -> None:
    session = started()
    session.step(1.0, delta(0, 1, 2))
    (effect,) = session.step(2.0, lost)
    assert isinstance(effect, Sleep)
    assert session.step(3.0, Timer()) == [Open(((1, 2),), 97.0)]


def of(choice: int, sequence: int, *ids: int) -> Received[StreamEvent]:
    return Received(replace(delta(sequence, *ids).message, index=choice))


def final_of(*answers: tuple[int, ...]) -> Received[Completion]:
    choices = (replace(final(*ids).message.choices[0], index=index) for index, ids in enumerate(answers))
    return Received(Completion(request_id="r", model="m", choices=tuple(choices)))


def test_each_choice_has_its_own_place() -> None:
    session = started()
    for message in (of(1, 0, 5), of(0, 0, 1, 2), of(1, 1, 6)):
        assert session.step(1.0, message) == [Yield(message.message)]
    assert session.step(1.0, of(1, 0, 5)) == [], "repeated"
    assert session.step(2.0, final_of((1, 2), (5, 6))) == [Finish(final_of((1, 2), (5, 6)).message)]


def test_a_broken_stream_resumes_every_choice_where_it_was() -> None:
    session = started()
    session.step(1.0, of(2, 0, 7, 8))
    session.step(1.0, of(0, 0, 1))
    session.step(2.0, Broken(UnavailableError("gone")))
    assert session.step(3.0, Timer()) == [Open(((1,), (), (7, 8)), 97.0)]
    assert session.step(4.0, of(1, 0, 5)) == [Yield(of(1, 0, 5).message)]
    assert session.step(4.0, of(2, 2, 9)) == [Yield(of(2, 2, 9).message)]
    (effect,) = session.step(4.0, of(0, 2, 3))
    assert isinstance(effect, Sleep), "a gap in one choice breaks the call"
    assert session.step(5.0, Timer()) == [Open(((1,), (5,), (7, 8, 9)), 95.0)]


def test_the_final_brings_what_is_left_of_each_choice() -> None:
    session = started()
    session.step(1.0, of(1, 0, 5))
    rest, whole = of(1, 1, 6).message, of(2, 0, 7, 8).message
    effects = session.step(2.0, final_of((), (5, 6), (7, 8)))
    assert effects == [Yield(rest), Yield(whole), Finish(final_of((), (5, 6), (7, 8)).message)]


@pytest.mark.parametrize("wrong", [final_of((1,), (9,)), final_of((1,), ()), final_of((5,), (5,))])
def test_a_final_that_contradicts_one_choice_is_an_error(wrong: Received[Completion]) -> None:
    session = started()
    session.step(1.0, of(0, 0, 1))
    session.step(1.0, of(1, 0, 5))
    effects = session.step(2.0, wrong)
    assert isinstance(effects[-1], Raise)
    assert isinstance(effects[-1].error, InternalError)
    assert not any(isinstance(effect, Finish) for effect in effects)


def test_what_the_deltas_left_out_comes_with_the_final() -> None:
    session = started()
    session.step(1.0, delta(0, 1, text="a"))
    assert session.step(2.0, delta(1, text="flushed")) == []  # text of no token: the final has it
    effects = session.step(3.0, final(1, 2, text="ab\N{REPLACEMENT CHARACTER}"))
    rest = StreamEvent("r", 0, 1, "b\N{REPLACEMENT CHARACTER}", (2,))
    assert effects == [Yield(rest), Finish(final(1, 2, text="ab\N{REPLACEMENT CHARACTER}").message)]


@pytest.mark.parametrize("wrong", [final(1, 9), final(1), final(1, 2, text="other")])
def test_a_final_that_contradicts_the_stream_is_an_error(wrong: Received[Completion]) -> None:
    session = started()
    session.step(1.0, delta(0, 1, 2))
    (effect,) = session.step(2.0, wrong)
    assert isinstance(effect, Raise)
    assert isinstance(effect.error, InternalError)


@pytest.mark.parametrize(
    "error", [InvalidRequestError("no"), StreamTakenOverError("other"), DeadlineError("late"), CancelledError("gone")]
)
def test_final_errors_are_raised_at_once(error: InvalidRequestError) -> None:
    session = started()
    assert session.step(1.0, Broken(error)) == [Raise(error)]
    assert session.ended


def test_back_off_doubles_is_bounded_and_starts_again_with_progress() -> None:
    session = started(1000.0)

    def waits(count: int) -> list[float]:
        found = []
        for _ in range(count):
            (effect,) = session.step(1.0, Broken(UnavailableError("away")))
            assert isinstance(effect, Sleep)
            found.append(effect.seconds)
            session.step(1.0, Timer())
        return found

    for wait, full in zip(waits(6), [1, 2, 4, 8, 8, 8], strict=True):
        assert full / 2 <= wait <= full
    session.step(1.0, delta(0, 1))
    assert waits(1)[0] <= 1.0


def test_callers_do_not_come_back_all_at_once() -> None:
    assert len({POLICY.delay_s(3, f"request-{index}") for index in range(64)}) == 64


def test_the_deadline_ends_the_tries_and_names_what_was_wrong() -> None:
    session = started(10.0)
    (effect,) = session.step(9.9, Broken(UnavailableError("connection refused")))
    assert isinstance(effect, Sleep)
    assert effect.seconds == pytest.approx(0.1)  # never past the deadline
    session.step(10.0, Timer())
    (end,) = session.step(10.0, Broken(UnavailableError("connection refused")))
    assert isinstance(end, Raise)
    assert isinstance(end.error, DeadlineError)
    assert "connection refused" in end.error.message
    assert isinstance(end.error.__cause__, UnavailableError)


def test_a_server_may_ask_for_a_longer_wait() -> None:
    decision = decide_retry(0.0, OverloadedError("full", retry_after_s=30.0), 0, 100.0, POLICY, "r")
    assert decision == 30.0


def test_no_retries_means_none() -> None:
    error = UnavailableError("away")
    assert decide_retry(0.0, error, 0, 100.0, RetryPolicy(max_retries=0), "r") is error


def test_cancelling_tells_the_server_too() -> None:
    session = started()
    session.step(1.0, delta(0, 1))
    remote, end = session.step(2.0, Cancel())
    assert remote == CancelRemote("r")
    assert isinstance(end, Raise)
    assert isinstance(end.error, CancelledError)


def test_a_call_is_sent_again_until_it_is_answered() -> None:
    session: CallSession[str] = CallSession("c", 100.0, POLICY)
    assert session.step(0.0, Start()) == [Open(None, 100.0)]
    session.step(1.0, Broken(UnavailableError("away")))
    assert session.step(2.0, Timer()) == [Open(None, 98.0)]
    assert session.step(3.0, Received("answer")) == [Finish("answer")]


def feed(timeout_s: float | None = None) -> FeedSession[str]:
    session: FeedSession[str] = FeedSession("f", 4, timeout_s, 10.0, POLICY)
    assert session.step(0.0, Start()) == [Open(4, timeout_s)]
    return session


def test_a_feed_goes_on_after_its_last_position() -> None:
    session = feed()
    assert session.step(1.0, Received((5, "five"))) == [Yield("five")]
    session.step(2.0, Broken(UnavailableError("away")))
    assert session.step(3.0, Timer()) == [Open(5, None)]
    assert session.step(4.0, Received((5, "five"))) == []
    assert session.step(4.0, Received((6, "six"))) == [Yield("six")]
    assert session.step(5.0, Ended()) == [Finish(None)]


def test_a_feed_without_positions_hands_on_everything() -> None:
    session = feed()
    assert session.step(1.0, Received((0, "running"))) == [Yield("running")]
    assert session.step(2.0, Received((0, "running"))) == [Yield("running")]
    session.step(3.0, Broken(UnavailableError("away")))
    assert session.step(4.0, Timer()) == [Open(4, None)]


def test_a_feed_gives_up_only_when_the_server_stays_away() -> None:
    session = feed()
    session.step(1.0, Broken(UnavailableError("away")))
    session.step(2.0, Timer())
    reached = 2.0 + REACHED_S  # that call stood, without a message, and then broke
    (effect,) = session.step(reached, Broken(UnavailableError("away")))
    assert isinstance(effect, Sleep)
    session.step(reached + 1, Timer())
    (effect,) = session.step(reached + 9.5, Broken(UnavailableError("away")))
    assert isinstance(effect, Sleep)
    assert effect.seconds == pytest.approx(0.5)
    session.step(reached + 10.0, Timer())
    (end,) = session.step(reached + 10.0, Broken(UnavailableError("away")))
    assert isinstance(end, Raise)
    assert isinstance(end.error, DeadlineError)


def test_a_feed_with_a_limit_on_the_whole_keeps_it_over_every_call() -> None:
    session = feed(timeout_s=50.0)
    session.step(20.0, Received((5, "five")))
    session.step(30.0, Broken(UnavailableError("away")))
    assert session.step(31.0, Timer()) == [Open(5, 19.0)]
