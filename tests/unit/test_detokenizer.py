"""Incremental text: a pure function of the ids, however they are cut, and complete at the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.detokenizer import REPLACEMENT, Detokenizer
from coordinator.tokenizer import Tokenizer
from tests.tiny import make_checkpoint

PIECES = [
    b"a",
    b"b ",
    b"\xc3",
    b"\xa9",
    b"\xe2",
    b"\x82",
    b"\xac",
    b"\xf0\x9f\x8e",
    b"\x89",
    b"\xff",
    "\ufffd".encode(),
]


def bytes_text(ids: Sequence[int]) -> str:
    return b"".join(PIECES[i] for i in ids).decode("utf-8", "replace")


def words(ids: Sequence[int]) -> str:
    """Treats the first id apart: no space before it."""
    return " ".join(f"w{i}" for i in ids)


def texts(decode: object, ids: Sequence[int]) -> list[str]:
    """The text after each id."""
    detokenizer = Detokenizer(decode)  # type: ignore[arg-type]
    told = [""]
    for token_id in ids:
        told.append(told[-1] + detokenizer.push([token_id]))
    return told


@pytest.mark.parametrize("decode", [bytes_text, words])
@given(data=st.data())
def test_text_is_the_same_however_the_ids_are_cut(decode: object, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, len(PIECES) - 1), max_size=60))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=5)))
    singly = texts(decode, ids)
    detokenizer = Detokenizer(decode)  # type: ignore[arg-type]
    text = ""
    for first, last in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        text += detokenizer.push(ids[first:last])
        assert text == singly[last]
    assert text + detokenizer.flush() == decode(ids)  # type: ignore[operator]
    assert detokenizer.flush() == ""


def test_an_unfinished_character_is_held_back_until_it_is_whole() -> None:
    assert texts(bytes_text, [0, 4, 5, 6, 2, 3, 7, 8]) == ["", "a", "a", "a", "a€", "a€", "a€é", "a€é", "a€é🎉"]


def test_what_stays_broken_is_told_when_it_can_no_longer_be_mended() -> None:
    detokenizer = Detokenizer(bytes_text)
    assert detokenizer.push([0, 2]) == "a"
    assert detokenizer.push([0]) == REPLACEMENT + "a"
    assert detokenizer.push([4, 5]) == ""
    assert detokenizer.flush() == REPLACEMENT


def test_work_per_token_does_not_grow_with_the_answer() -> None:
    longest = 0

    def decode(ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return words(ids)

    Detokenizer(decode).push(range(2000))
    assert longest < 32


def test_a_real_tokenizer(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_directory(make_checkpoint(tmp_path / "model"))
    text = "Grüße, 世界! 🎉 naïve\n  two  spaces"
    ids = tokenizer.encode(text)
    told = texts(tokenizer.decode, ids)
    detokenizer = Detokenizer(tokenizer.decode)
    assert detokenizer.push(ids) == told[-1]
    assert told[-1] + detokenizer.flush() == tokenizer.decode(ids) == text
    assert not any(REPLACEMENT in piece for piece in told)
