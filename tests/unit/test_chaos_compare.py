"""Every way in which a stream can differ from an undisturbed one is seen, by name, and what may differ is not."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace

import pytest

from echelon.chaos.compare import Verdict, compare
from echelon.chaos.load import Arrival, Heard
from echelon.types import Choice, Completion, FinishReason, StreamEvent, TokenLogprob, Usage
from tests.unit.chaos_trial import heard

UNDISTURBED = heard("greedy-0", [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])


def completion(one: Heard) -> Completion:
    assert one.completion is not None
    return one.completion


def with_choice(change: Callable[[Choice], Choice]) -> Heard:
    answer = completion(UNDISTURBED)
    return replace(UNDISTURBED, completion=replace(answer, choices=tuple(map(change, answer.choices))))


def with_arrivals(change: Callable[[list[Arrival]], list[Arrival]]) -> Heard:
    return replace(UNDISTURBED, arrivals=tuple(change(list(UNDISTURBED.arrivals))))


def scored(logprob: float) -> Callable[[Choice], Choice]:
    return lambda choice: replace(choice, logprobs=(replace(choice.logprobs[0], logprob=logprob), *choice.logprobs[1:]))


def test_the_same_is_the_same() -> None:
    assert compare(UNDISTURBED, UNDISTURBED) == Verdict()
    assert compare(UNDISTURBED, UNDISTURBED).same


def test_what_tells_of_the_run_alone_may_differ() -> None:
    answer = completion(UNDISTURBED)
    usage = replace(answer.usage, recomputed_tokens=40, cached_tokens=3)
    later = with_arrivals(lambda all_: [replace(one, unix_s=one.unix_s + 9) for one in all_])
    assert compare(UNDISTURBED, replace(later, completion=replace(answer, usage=usage))).same


@pytest.mark.parametrize(
    ("disturbed", "told"),
    [
        (with_choice(lambda choice: replace(choice, text="other")), "choice 0: text is 'other', undisturbed 'abcdef'"),
        (with_choice(lambda choice: replace(choice, finish_reason=FinishReason.STOP)), "choice 0: finish_reason is"),
        (with_choice(lambda choice: replace(choice, matched_stop="x")), "choice 0: matched_stop is 'x'"),
        (
            with_choice(lambda choice: replace(choice, token_ids=(20, 21, 9, 23, 24, 25))),
            "choice 0: ids differ from token 2 on",
        ),
        (
            with_choice(lambda choice: replace(choice, token_ids=choice.token_ids[:4])),
            "choice 0: ids differ from token 4 on, of 4, undisturbed 6",
        ),
        (with_choice(lambda choice: replace(choice, logprobs=())), "choice 0: 0 log-probabilities, undisturbed 6"),
        (with_choice(scored(-0.5001)), "choice 0: log-probabilities differ by up to 0.0001"),
        (
            with_choice(lambda choice: replace(choice, logprobs=(TokenLogprob(20, -0.5), *choice.logprobs[1:]))),
            "differ by up to inf",
        ),
        (
            replace(UNDISTURBED, completion=replace(completion(UNDISTURBED), usage=Usage(7, 5))),
            r"tokens are \(7, 5\), undisturbed \(7, 6\)",
        ),
        (replace(UNDISTURBED, completion=replace(completion(UNDISTURBED), choices=())), "0 choices, undisturbed 1"),
        (
            replace(UNDISTURBED, completion=replace(completion(UNDISTURBED), prompt_logprobs=(TokenLogprob(3, -1.0),))),
            "1 prompt log-probabilities, undisturbed 0",
        ),
        (replace(UNDISTURBED, completion=None, error="DEADLINE: late"), "it failed: DEADLINE: late"),
        (
            with_arrivals(lambda all_: [replace(all_[0], event=replace(all_[0].event, text="z")), *all_[1:]]),
            "the stream's text is not that",
        ),
        (
            with_arrivals(lambda all_: [replace(all_[0], event=replace(all_[0].event, token_ids=(9,))), *all_[1:]]),
            "the stream's ids are not those",
        ),
        (
            with_arrivals(lambda all_: [replace(all_[0], event=replace(all_[0].event, logprobs=())), *all_[1:]]),
            "the stream's log-probabilities are not",
        ),
    ],
)
def test_a_difference_is_told(disturbed: Heard, told: str) -> None:
    verdict = compare(UNDISTURBED, disturbed)
    assert not verdict.same
    assert any(re.search(told, line) for line in verdict.differences), verdict.differences


def test_log_probabilities_may_be_off_by_the_tolerance_and_no_more() -> None:
    off = with_choice(scored(-0.5 - 1e-7))
    streamed = [
        replace(
            off.arrivals[0], event=replace(off.arrivals[0].event, logprobs=completion(off).choices[0].logprobs[:1])
        ),
        *off.arrivals[1:],
    ]
    disturbed = replace(off, arrivals=tuple(streamed))
    assert compare(UNDISTURBED, disturbed, tolerance=1e-6).same
    assert not compare(UNDISTURBED, disturbed, tolerance=1e-8).same
    assert not compare(UNDISTURBED, disturbed).same


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        (math.nan, math.nan, True),
        (-math.inf, -math.inf, True),
        (-0.5, math.nan, False),
        (math.nan, -0.5, False),
        (-math.inf, -0.5, False),
        (-math.inf, math.nan, False),
    ],
)
@pytest.mark.parametrize("place", [0, 1])
def test_what_is_no_number_is_like_nothing_else(before: float, after: float, same: bool, place: int) -> None:
    """Of a prompt; nothing is greater than nan, so that a greatest difference does not show it."""

    def scored(logprob: float) -> Heard:
        logprobs = [-0.5, -0.5]
        logprobs[place] = logprob
        prompt = tuple(TokenLogprob(token_id, one, ()) for token_id, one in enumerate(logprobs))
        return replace(UNDISTURBED, completion=replace(completion(UNDISTURBED), prompt_logprobs=prompt))

    assert compare(scored(before), scored(after), tolerance=1e-6).same == same


def test_other_tokens_that_are_as_likely_are_others() -> None:
    def other_top(choice: Choice) -> Choice:
        return replace(
            choice, logprobs=(replace(choice.logprobs[0], top=((20, -0.5), (2, -2.0))), *choice.logprobs[1:])
        )

    assert any("differ by up to inf" in line for line in compare(UNDISTURBED, with_choice(other_top), 1.0).differences)


def test_tokens_that_never_came_are_lost() -> None:
    verdict = compare(UNDISTURBED, with_arrivals(lambda all_: [*all_[:2], *all_[4:]]))
    assert (verdict.lost, verdict.doubled) == (2, 0) and not verdict.same
    verdict = compare(UNDISTURBED, with_arrivals(lambda all_: all_[:3]))
    assert (verdict.lost, verdict.doubled) == (3, 0)
    failed = replace(with_arrivals(lambda all_: all_[:1]), completion=None, error="gone")
    assert compare(UNDISTURBED, failed).lost == 5


def test_tokens_that_came_again_are_doubled() -> None:
    verdict = compare(UNDISTURBED, with_arrivals(lambda all_: [*all_[:4], *all_[2:]]))
    assert (verdict.lost, verdict.doubled) == (0, 2) and not verdict.same
    two = Arrival(4.5, StreamEvent("id", 0, 3, "de", (23, 24)))
    verdict = compare(UNDISTURBED, with_arrivals(lambda all_: [*all_[:4], two, all_[5]]))
    assert (verdict.lost, verdict.doubled) == (0, 1), "one of its two is new"


def test_choices_are_counted_apart() -> None:
    answer = completion(UNDISTURBED)
    both = replace(answer, choices=(answer.choices[0], replace(answer.choices[0], index=1)), usage=Usage(7, 12))
    other = [replace(one, event=replace(one.event, index=1)) for one in UNDISTURBED.arrivals]
    whole = Heard("choices-1", (*UNDISTURBED.arrivals, *other), both)
    assert compare(whole, whole).same
    assert compare(whole, replace(whole, arrivals=(*UNDISTURBED.arrivals, *other[1:]))).lost == 1
