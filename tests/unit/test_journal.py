"""Journal records: their bytes, and what they add up to."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.journal.codec import FRAME, frame, unframe
from coordinator.journal.state import (
    Answer,
    Assigned,
    Finished,
    Forgotten,
    JournalState,
    Opened,
    Prompted,
    Record,
    Tokens,
)
from coordinator.requests.nouns import Request
from echelon.internal.link import Finish, Logprob, Sampling

SAMPLING = Sampling(0.7, 0.9, 40, 16, -(2**63), (2, 7), 0)
REQUEST = Request("r", b"\x00\xff", "m", (1, 2, 2**31 - 1), SAMPLING, 1234.5, 1000.25, -(2**31), "tenant")
LOGPROBS = (Logprob(-0.5, (3, 4), (-0.5, -2.0)), Logprob(-1.0))
STORY: list[Record] = [
    Opened(REQUEST, ((9,),)),
    Assigned("r", 1, 0, 3),
    Tokens("r", 1, 1, (3, 4), LOGPROBS),
    Assigned("r", 2, 1, 5, 6),
    Tokens("r", 2, 3, (5,), (Logprob(-3.0),)),
    Finished("r", 1100.0, (Finish.LENGTH,)),
]
PAIR = replace(REQUEST, request_id="p", sampling=replace(SAMPLING, n=3, prompt_logprobs=0, logprobs=None, stop=("x",)))
CHOICES: list[Record] = [
    Opened(PAIR, ((9,), (8, 7))),
    Assigned("p", 1, 0, 3),
    Prompted("p", 1, 2, LOGPROBS),
    Tokens("p", 1, 2, (6,), choice=1),
    Tokens("p", 1, 0, (5,), choice=2),
    Tokens("p", 0, 1, (4,), choice=0),
    Assigned("p", 2, 1, 5, 6),
    Tokens("p", 2, 1, (3,), choice=2),
    Finished("p", 1100.0, (Finish.LENGTH, Finish.STOP, Finish.STOP)),
]


def state_of(records: list[Record]) -> JournalState:
    state = JournalState()
    state.apply_all(records)
    return state


def test_every_record_survives_its_bytes() -> None:
    records = [*STORY, *CHOICES, Prompted("p", 2, 0), Finished("r", 1.0, (), "DEADLINE", "too late"), Forgotten("r")]
    content = frame(records, term=3)
    assert unframe(content) == (records, len(content))


def test_no_logprobs_is_not_zero_logprobs() -> None:
    request = Request("r", b"", "m", (1,), Sampling(0.0, 1.0, 0, 1, 0), 0.0, 0.0)
    assert unframe(frame([Opened(request)], 1))[0] == [Opened(request)]


def test_a_frame_is_length_crc32c_and_record() -> None:
    content = frame([Forgotten("r")], term=1)
    length, checksum = FRAME.unpack_from(content)
    assert length == len(content) - 8
    assert checksum == _crc32c(content[8:])


@given(st.data())
def test_reading_stops_at_a_torn_or_damaged_frame(data: st.DataObject) -> None:
    ends = [len(frame(STORY[:count], 1)) for count in range(len(STORY) + 1)]
    content = bytearray(frame(STORY, 1))
    place = data.draw(st.integers(0, len(content) - 1))
    whole = sum(end <= place for end in ends) - 1
    torn = bytes(content[:place])
    assert unframe(torn) == (STORY[:whole], ends[whole])
    content[place] ^= data.draw(st.integers(1, 255))
    assert unframe(bytes(content)) == (STORY[:whole], ends[whole])


def test_zeros_behind_the_end_are_no_record() -> None:
    content = frame(STORY, 1)
    assert unframe(content + bytes(64)) == (STORY, len(content))


def test_the_fold_of_a_request() -> None:
    entry = state_of(STORY).entries["r"]
    assert entry.answers == [Answer([9, 3, 4, 5], [None, *LOGPROBS, Logprob(-3.0)])]
    assert (entry.attempt, entry.recomputed_tokens) == (2, 6)
    assert entry.finished is not None
    assert not state_of([*STORY, Forgotten("r")]).entries


def test_the_fold_of_several_choices() -> None:
    entry = state_of(CHOICES).entries["p"]
    assert [answer.ids for answer in entry.answers] == [[9, 4], [8, 7, 6], [5, 3]]
    assert entry.generated_tokens == 7
    assert entry.prompted == Prompted("p", 1, 2, LOGPROBS)
    assert entry.finished is not None
    assert entry.finished.finishes == (Finish.LENGTH, Finish.STOP, Finish.STOP)
    told_again = state_of([*CHOICES[:3], Prompted("p", 2, 7)]).entries["p"]
    assert told_again.prompted == Prompted("p", 1, 2, LOGPROBS), "the first attempt's"


def test_a_hole_in_one_choice_forgets_the_request() -> None:
    assert state_of([*CHOICES[:2], Tokens("p", 1, 0, (5,), choice=2)]).entries
    assert not state_of([*CHOICES[:2], Tokens("p", 1, 1, (5,), choice=2)]).entries


def test_the_fewest_records_lead_to_the_same_state() -> None:
    told = [*STORY[:3], Tokens("r", 0, 3, (6, 7)), *STORY[3:4]]  # ids without logprobs in the middle, too
    bare: list[Record] = [Opened(REQUEST)]
    for records in (STORY, told, STORY[:1], bare, CHOICES, CHOICES[:5]):
        state = state_of(records)
        assert state_of(list(state.records())) == state


@pytest.mark.parametrize("story", [STORY, CHOICES])
@pytest.mark.parametrize("again", range(len(CHOICES) + 1))
def test_the_last_records_applied_again_change_nothing(story: list[Record], again: int) -> None:
    assert state_of(story + story[again:]) == state_of(story)


def test_a_request_with_a_hole_is_forgotten_rather_than_wrong() -> None:
    assert not state_of([Opened(REQUEST), Tokens("r", 1, 2, (5,))]).entries
    assert not state_of([Tokens("r", 1, 0, (5,)), Finished("r", 1.0), Assigned("r", 1, 0, 1)]).entries


def _crc32c(content: bytes) -> int:
    """By the definition: polynomial 0x1EDC6F41, reflected."""
    value = 0xFFFFFFFF
    for byte in content:
        value ^= byte
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF
