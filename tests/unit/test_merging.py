"""Deltas that wait for a reader are merged: nothing is lost, doubled or taken out of a choice's order."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from coordinator.merging import shown
from coordinator.requests.nouns import Shown
from echelon.errors import UnavailableError
from echelon.types import Admitted, StreamEvent, TokenLogprob

CHOICES = 3
ADMITTED, OUTCOME = Admitted("r", 4, 0), UnavailableError("gone")


def stream(choices: list[int]) -> list[Shown]:
    """A token of each of these choices, in turn, between the first message and the outcome."""
    counts = [0] * CHOICES
    events: list[Shown] = [ADMITTED]
    for choice in choices:
        token = 100 * choice + counts[choice]
        events.append(StreamEvent("r", choice, counts[choice], f"{token} ", (token,), (TokenLogprob(token, -1.0),)))
        counts[choice] += 1
    return [*events, OUTCOME]


async def read(events: list[Shown], arriving: list[int]) -> list[list[Shown]]:
    """What a reader gets each time it asks, if so many have come by then."""
    queue: asyncio.Queue[Shown] = asyncio.Queue()
    found, left = [], list(events)
    for count in [*arriving, len(events)]:
        for event in left[:count]:
            queue.put_nowait(event)
        left = left[count:]
        if not queue.empty():
            found.append(await shown(queue))
    return found


@given(st.lists(st.integers(0, CHOICES - 1), max_size=30), st.lists(st.integers(0, 9), max_size=9))
def test_merged_streams_say_what_single_tokens_say(choices: list[int], arriving: list[int]) -> None:
    events = stream(choices)
    batches = asyncio.run(read(events, arriving))
    merged = [event for batch in batches for event in batch]
    assert merged[0] is ADMITTED and merged[-1] is OUTCOME
    for choice in range(CHOICES):
        ids = [100 * choice + number for number in range(choices.count(choice))]
        told = [event for event in merged if isinstance(event, StreamEvent) and event.index == choice]
        assert [event.sequence for event in told] == [sum(len(e.token_ids) for e in told[:n]) for n in range(len(told))]
        assert [token for event in told for token in event.token_ids] == ids
        assert "".join(event.text for event in told) == "".join(f"{token} " for token in ids)
        assert [each.token_id for event in told for each in event.logprobs] == ids
    for batch in batches:
        indices = [event.index for event in batch if isinstance(event, StreamEvent)]
        assert len(indices) == len(set(indices)), "one message a choice"
