"""What a client heard of a disturbed request, held against an undisturbed run of the same.

Pure. Everything must be equal: ids, text, finish reasons, token counts, log-probabilities to a tolerance. Tokens that
never came are lost; those that came again are doubled. Fields that tell of the run itself are left out: times, what was
cached, what was computed again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from echelon.chaos.load import Arrival, Heard
from echelon.types import Choice, Completion, TokenLogprob


@dataclass(frozen=True, slots=True)
class Verdict:
    """lost, doubled: tokens of the stream. differences: one line each, empty if the answer is the undisturbed one."""

    lost: int = 0
    doubled: int = 0
    differences: tuple[str, ...] = ()

    @property
    def same(self) -> bool:
        return not (self.lost or self.doubled or self.differences)


def compare(undisturbed: Heard, heard: Heard, tolerance: float = 0.0) -> Verdict:
    """tolerance: how far a log-probability may be off."""
    expected, answer = undisturbed.completion, heard.completion
    assert expected is not None, f"the undisturbed run of {undisturbed.name} has failed: {undisturbed.error}"
    lost = doubled = 0
    for choice in expected.choices:
        gaps, repeats, held = _streamed(choice.index, heard.arrivals)
        lost += gaps + max(0, len(choice.token_ids) - held)
        doubled += repeats
    if answer is None:
        return Verdict(lost, doubled, (f"it failed: {heard.error}",))
    return Verdict(lost, doubled, tuple(_differences(expected, answer, heard, tolerance)))


def _streamed(index: int, arrivals: Sequence[Arrival]) -> tuple[int, int, int]:
    """Tokens of a choice that were skipped, that came twice, and how many positions came at all."""
    lost = doubled = held = 0
    for event in (arrival.event for arrival in arrivals if arrival.event.index == index):
        end = event.sequence + len(event.token_ids)
        lost += max(0, event.sequence - held)
        doubled += max(0, min(held, end) - event.sequence)
        held = max(held, end)
    return lost, doubled, held


def _differences(expected: Completion, answer: Completion, heard: Heard, tolerance: float) -> Iterator[str]:
    counts = [(one.usage.prompt_tokens, one.usage.completion_tokens) for one in (expected, answer)]
    if counts[0] != counts[1]:
        yield f"prompt and completion tokens are {counts[1]}, undisturbed {counts[0]}"
    if len(answer.choices) != len(expected.choices):
        yield f"{len(answer.choices)} choices, undisturbed {len(expected.choices)}"
        return
    for before, after in zip(expected.choices, answer.choices, strict=True):
        for what in _choice_differences(before, after, tolerance):
            yield f"choice {before.index}: {what}"
        events = [arrival.event for arrival in heard.arrivals if arrival.event.index == before.index]
        if [token_id for event in events for token_id in event.token_ids] != list(after.token_ids):
            yield f"choice {before.index}: the stream's ids are not those of its final answer"
        if "".join(event.text for event in events) != after.text:
            yield f"choice {before.index}: the stream's text is not that of its final answer"
        if [one for event in events for one in event.logprobs] != list(after.logprobs):
            yield f"choice {before.index}: the stream's log-probabilities are not those of its final answer"
    yield from _logprob_differences("prompt ", expected.prompt_logprobs, answer.prompt_logprobs, tolerance)


def _choice_differences(before: Choice, after: Choice, tolerance: float) -> Iterator[str]:
    if after.token_ids != before.token_ids:
        pairs = zip(before.token_ids, after.token_ids, strict=False)
        shorter = min(len(before.token_ids), len(after.token_ids))
        place = next((place for place, pair in enumerate(pairs) if pair[0] != pair[1]), shorter)
        yield f"ids differ from token {place} on, of {len(after.token_ids)}, undisturbed {len(before.token_ids)}"
    for name in ("text", "finish_reason", "matched_stop"):
        if getattr(after, name) != getattr(before, name):
            yield f"{name} is {getattr(after, name)!r}, undisturbed {getattr(before, name)!r}"
    yield from _logprob_differences("", before.logprobs, after.logprobs, tolerance)


def _logprob_differences(
    what: str, before: Sequence[TokenLogprob], after: Sequence[TokenLogprob], tolerance: float
) -> Iterator[str]:
    if len(before) != len(after):
        yield f"{len(after)} {what}log-probabilities, undisturbed {len(before)}"
        return
    worst = max((_distance(*pair) for pair in zip(before, after, strict=True)), default=0.0)
    if worst > tolerance:
        yield f"{what}log-probabilities differ by up to {worst:.3g}, allowed {tolerance:g}"


def _distance(before: TokenLogprob, after: TokenLogprob) -> float:
    """Infinite if they speak of different tokens."""
    scored = [[(one.token_id, one.logprob), *one.top] for one in (before, after)]
    pairs = list(zip(scored[0], scored[1], strict=False))
    if len(before.top) != len(after.top) or any(one[0] != other[0] for one, other in pairs):
        return math.inf
    return max(_apart(one[1], other[1]) for one, other in pairs)


def _apart(one: float, other: float) -> float:
    """Infinite if only one of them is a number, or an infinity."""
    if one == other or (math.isnan(one) and math.isnan(other)):
        return 0.0
    apart = abs(one - other)
    return math.inf if math.isnan(apart) else apart
