"""What waits for a reader of a stream, in few messages: tokens that came while the loop lagged go together.

In the coordinator. A write costs more than all else that a token costs there, so a loop that lags catches up. It knows
no request and no transport.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace

from coordinator.requests.nouns import Shown
from echelon.types import StreamEvent


async def shown(queue: asyncio.Queue[Shown]) -> list[Shown]:
    """At least one event, and all that wait behind it; those of a choice that follow each other as one."""
    waiting = [await queue.get()]
    while not queue.empty():
        waiting.append(queue.get_nowait())
    return waiting if len(waiting) == 1 else list(_merged(waiting))


def _merged(events: list[Shown]) -> Iterator[Shown]:
    """Choices do not wait for each other, so each one's deltas may go where its first one goes; nothing else moves."""
    open_: dict[int, list[StreamEvent]] = {}
    for event in events:
        if isinstance(event, StreamEvent):
            open_.setdefault(event.index, []).append(event)
        else:
            yield from map(_joined, open_.values())
            open_ = {}
            yield event
    yield from map(_joined, open_.values())


def _joined(deltas: list[StreamEvent]) -> StreamEvent:
    """Of one choice, in order and without gaps."""
    first = deltas[0]
    if len(deltas) == 1:
        return first
    return replace(
        first,
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        logprobs=tuple(logprob for delta in deltas for logprob in delta.logprobs),
    )
