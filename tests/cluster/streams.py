"""Streams that are disturbed in their middle, and what an undisturbed run would have said."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from echelon import Client, SamplingParams, StreamEvent
from echelon.internal.processes import alive as alive
from tests.cluster.conftest import Case

STEPS = 300
STRIKE_AT = 40
GREEDY = SamplingParams(max_tokens=STEPS, temperature=0.0, ignore_eos=True, logprobs=0)
PROMPT = "Geese fly so, cyclists ride so in a crosswind"


def stream_through(
    client: Client, fault: Callable[[], object], prompt: str = PROMPT, at_token: int = STRIKE_AT
) -> list[StreamEvent]:
    """All events of a greedy stream, in whose middle the fault strikes."""
    events: list[StreamEvent] = []
    struck = False
    for event in client.stream(prompt, sampling=GREEDY):
        events.append(event)
        if not struck and event.sequence + len(event.token_ids) >= at_token:
            struck = True
            fault()
    assert struck
    return events


def assert_undisturbed(case: Case, events: list[StreamEvent], prompt: str = PROMPT) -> None:
    """No token lost, doubled or reordered, and all of them what an undisturbed run says."""
    ids: list[int] = []
    logprobs: list[float] = []
    for event in events:
        assert event.sequence == len(ids)
        ids.extend(event.token_ids)
        logprobs.extend(logprob.logprob for logprob in event.logprobs)
    assert len(ids) == STEPS
    expected = case.reference.after_each(prompt, ids)
    assert tuple(ids) == expected.ids
    assert logprobs == pytest.approx(expected.logprobs, abs=1e-6, rel=0)
    text = case.reference.tokenizer.decode(expected.ids, skip_special_tokens=True)
    assert "".join(event.text for event in events) == text


@contextmanager
def no_writing(pid: int) -> Iterator[None]:
    """No file of the process can grow, as on a full disk; its logs cannot either."""
    _, hard = limits = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, hard))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)
