"""Whether a stream may open a request or attach to one: pure decisions, an error or None.

Part of the coordinator's core. What the fields themselves must be is the front end's to check.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.answer_text import Stops
from coordinator.journal.state import Entry
from coordinator.requests.life import NewText
from coordinator.requests.nouns import Received, Request
from echelon.errors import ConflictError, EchelonError, InvalidRequestError, OverloadedError, UnavailableError
from echelon.internal.link import Sampling

RETRY_AFTER_S = 1.0


@dataclass(frozen=True, slots=True)
class Queue:
    """What waits now, what may, and whether anything new is taken at all."""

    queued_tokens: int
    max_queue_tokens: int
    draining: bool


def refuse_open(request: Request, received: Received, queue: Queue, new_text: NewText) -> EchelonError | None:
    """A request that is not known yet, whose client may hold the start of its answers."""
    request_id, prompt = request.request_id, len(request.prompt)
    queued_tokens, max_queue_tokens = queue.queued_tokens, queue.max_queue_tokens
    if queue.draining:
        message = "the coordinator takes nothing new: it is being stopped or handed over; try again"
        return UnavailableError(message, reason="DRAINING", request_id=request_id)
    if reason := contradiction(request.sampling, received, new_text):
        return InvalidRequestError(reason, field="resume.received", request_id=request_id)
    if queued_tokens and queued_tokens + prompt > max_queue_tokens:
        wanted = f"{queued_tokens} queued prompt tokens + {prompt} = {queued_tokens + prompt}"
        return OverloadedError(
            f"{wanted}, over max-queue-tokens={max_queue_tokens}; try again in {RETRY_AFTER_S:g} s",
            request_id=request_id,
            retry_after_s=RETRY_AFTER_S,
        )
    return None


def refuse_attach(entry: Entry, request: Request, received: Received, new_text: NewText) -> EchelonError | None:
    """A request that is known: it must be the same one, and what the client holds must be how its answers begin."""
    request_id = request.request_id
    if entry.request.digest != request.digest:
        message = f"request_id {request_id!r} is in use with other content; take a new id, or send the same content"
        return ConflictError(message, request_id=request_id)
    for choice, (held, answer) in enumerate(zip(received, entry.answers, strict=False)):
        shared = min(len(answer.ids), len(held))
        if tuple(answer.ids[:shared]) != held[:shared] or (entry.finished and shared < len(held)):
            reason = f"resume.received[{choice}] is not how answer {choice} to {request_id!r} begins"
            return ConflictError(reason, field="resume.received", request_id=request_id)
    if reason := contradiction(entry.request.sampling, received, new_text):
        return InvalidRequestError(reason, field="resume.received", request_id=request_id)
    return None


def contradiction(sampling: Sampling, received: Received, new_text: NewText) -> str:
    """Why these ids cannot be how the answers under this sampling begin; empty if they can."""
    if len(received) > sampling.n:
        return f"resume.received holds {len(received)} choices, over n={sampling.n}"
    for choice, ids in enumerate(received):
        if reason := _contradiction(sampling, ids, new_text):
            return f"resume.received[{choice}] {reason}"
    return ""


def _contradiction(sampling: Sampling, ids: Sequence[int], new_text: NewText) -> str:
    if len(ids) > sampling.max_tokens:
        return f"holds {len(ids)} ids, over max_tokens={sampling.max_tokens}"
    for place, token_id in enumerate(ids[:-1]):
        if token_id in sampling.stop_token_ids and place >= sampling.min_tokens:
            return f"has {token_id} at place {place}, which ends the answer, but {len(ids) - place - 1} ids follow"
    if sampling.stop:
        text = new_text(Stops(sampling.stop, sampling.include_stop, sampling.min_tokens))
        taken, _ = text.push(ids)
        if taken < len(ids):
            return f"has {text.matched!r} after {taken} ids, which ends the answer, but {len(ids) - taken} ids follow"
    return ""
