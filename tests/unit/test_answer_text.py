"""Stop strings: where an answer ends and what of it may be shown, however its ids are cut."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.answer_text import AnswerText, Stops
from coordinator.detokenizer import Detokenizer

# Tokens end inside characters and inside stop strings; the empty one is a special token.
VOCABULARY = (
    *(b"a", b"b", b"ab", b"ba", b"<", b"/", b"s", b"/s", b">", b"\n", b""),
    *(b"\xe7", b"\x8b", b"\x90", b"\xf0\x9f", b"\xa6\x8a", b"\xe7\x8b\x90b"),
)
STOPS = ("a", "ab", "aba", "bab", "aab", "</s>", "</s>\n", "\n\n", "狐", "b狐", "狐b", "\U0001f98a")
ids_of_answers = st.lists(st.integers(0, len(VOCABULARY) - 1), max_size=24)
stops_of_requests = st.builds(
    Stops, st.lists(st.sampled_from(STOPS), max_size=4, unique=True).map(tuple), st.booleans(), st.integers(0, 8)
)


def decode(ids: Sequence[int]) -> str:
    return b"".join(VOCABULARY[token_id] for token_id in ids).decode(errors="replace")


def answer(stops: Stops) -> AnswerText:
    return AnswerText(Detokenizer(decode), stops)


def spell(text: str) -> list[int]:
    """Ids of a text, a byte each."""
    return [VOCABULARY.index(bytes([byte])) for byte in text.encode()]


@dataclass(frozen=True)
class Expected:
    """By the definition: how many ids belong to the answer, its whole text, and what ended it."""

    taken: int
    text: str
    matched: str


def settled(ids: Sequence[int]) -> str:
    return Detokenizer(decode).push(ids)


def by_definition(ids: Sequence[int], stops: Stops) -> Expected:
    """The first id, after min_tokens of them, whose text completes a stop string; then the one that begins first."""
    passed = len(settled(ids[: stops.min_tokens]))
    for count in range(stops.min_tokens + 1, len(ids) + 1):
        text = settled(ids[:count])
        found = [
            (start, -len(stop), stop)
            for stop in stops.texts
            for start in range(len(text))
            if text.startswith(stop, start) and start + len(stop) > passed
        ]
        if found:
            start, _, stop = min(found)
            return Expected(count, text[:start] + (stop if stops.keep else ""), stop)
    return Expected(len(ids), decode(ids), "")


def cut(ids: Sequence[int], cuts: Sequence[int]) -> list[Sequence[int]]:
    places = [0, *sorted(cuts), len(ids)]
    return [ids[start:end] for start, end in itertools.pairwise(places)]


@given(ids_of_answers, stops_of_requests, st.data())
def test_text_and_end_are_the_definitions_however_the_ids_are_cut(
    ids: list[int], stops: Stops, data: st.DataObject
) -> None:
    expected = by_definition(ids, stops)
    text = answer(stops)
    cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=6))
    taken, told = 0, ""
    for push in cut(ids, cuts):
        count, piece = text.push(push)
        taken, told = taken + count, told + piece
        assert text.text == told
        if text.matched:
            break
    told += text.flush()
    assert Expected(taken, told, text.matched) == expected
    assert text.text == told


@given(ids_of_answers, stops_of_requests)
def test_what_was_shown_is_never_taken_back_and_no_more_is_held_than_must_be(ids: list[int], stops: Stops) -> None:
    expected = by_definition(ids, stops)
    text = answer(stops)
    for count in range(1, expected.taken + 1):
        text.push(ids[count - 1 : count])
        assert expected.text.startswith(text.text)
        if not text.matched:
            held_back = settled(ids[:count]).removeprefix(text.text)
            assert not held_back or any(stop != held_back and stop.startswith(held_back) for stop in stops.texts)


@given(ids_of_answers, st.integers(0, 24), stops_of_requests)
def test_a_reader_who_comes_later_is_told_exactly_the_rest(ids: list[int], held: int, stops: Stops) -> None:
    whole, late = answer(stops), answer(stops)
    taken = whole.push(ids)[0]
    held = min(held, taken)
    late.push(ids[:held])
    before = late.text
    late.push(ids[held:taken])
    assert (late.text, late.matched) == (whole.text, whole.matched)
    assert whole.text.startswith(before)


@pytest.mark.parametrize(
    ("stops", "text", "told", "matched"),
    [
        (Stops(("</s>",)), "ab</s>b", "ab", "</s>"),
        (Stops(("</s>",), keep=True), "ab</s>b", "ab</s>", "</s>"),
        (Stops(("</s>",)), "a</a</s", "a</a</s", ""),  # the beginnings of one are released, the last by the end
        (Stops(("ab", "b")), "ab", "", "ab"),
        (Stops(("aba", "b")), "ab", "a", "b"),  # the first to be complete ends it
        (Stops(("狐",)), "a狐b", "a", "狐"),
        (Stops(("\n\n",)), "a\nb\n\nb", "a\nb", "\n\n"),
        (Stops(("ab",), min_tokens=2), "abab", "ab", "ab"),
        (Stops(("ab",), min_tokens=3), "abab", "ab", "ab"),  # begun before, complete after
        (Stops(("ab",), min_tokens=4), "abab", "abab", ""),
        (Stops(("ab", "abb"), min_tokens=2), "aba", "aba", ""),  # held back for abb, but ab is over
    ],
)
def test_a_byte_at_a_time(stops: Stops, text: str, told: str, matched: str) -> None:
    read = answer(stops)
    for token_id in spell(text):
        if not read.matched:
            read.push([token_id])
    read.flush()
    assert (read.text, read.matched) == (told, matched)


def test_text_that_may_begin_a_stop_string_waits_for_the_next_id() -> None:
    text = answer(Stops(("</s>",)))
    assert [text.push([token_id])[1] for token_id in spell("a<b<")] == ["a", "", "<b", ""]
    assert text.flush() == "<"
    assert text.text == "a<b<"


def test_nothing_belongs_to_an_answer_after_its_end() -> None:
    text = answer(Stops(("a",)))
    assert text.push(spell("bab")) == (2, "b")
    assert text.push(spell("bb")) == (0, "")
    assert (text.flush(), text.text) == ("", "b")


def test_of_two_stop_strings_that_one_id_completes_the_one_that_begins_first_wins_and_then_the_longer() -> None:
    ab = VOCABULARY.index(b"ab")
    for stops, matched in ((("a", "ab"), "ab"), (("ab", "a"), "ab"), (("b", "a"), "a"), (("b", "ab"), "ab")):
        text = answer(Stops(stops, keep=True))
        assert text.push([ab]) == (1, matched)
        assert text.matched == matched
