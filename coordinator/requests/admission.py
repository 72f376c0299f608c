"""Whether a stream may open a request or attach to one: pure decisions, an error or None.

Part of the coordinator's core. What the fields themselves must be is the front end's to check.
"""

from __future__ import annotations

from collections.abc import Sequence

from coordinator.journal.state import Entry
from coordinator.requests.nouns import Request
from echelon.errors import ConflictError, EchelonError, InvalidRequestError, OverloadedError, UnavailableError
from echelon.internal.link import Sampling

RETRY_AFTER_S = 1.0


def refuse_open(
    request: Request, received: tuple[int, ...], queued_tokens: int, max_queue_tokens: int, draining: bool
) -> EchelonError | None:
    """A request that is not known yet, whose client may hold the start of its answer."""
    request_id, prompt = request.request_id, len(request.prompt)
    if draining:
        return UnavailableError("the coordinator is draining", reason="DRAINING", request_id=request_id)
    if reason := contradiction(request.sampling, received):
        return InvalidRequestError(reason, field="resume.received", request_id=request_id)
    if queued_tokens and queued_tokens + prompt > max_queue_tokens:
        wanted = f"{queued_tokens} queued prompt tokens + {prompt} = {queued_tokens + prompt}"
        return OverloadedError(
            f"{wanted}, over max-queue-tokens={max_queue_tokens}; try again in {RETRY_AFTER_S:g} s",
            request_id=request_id,
            retry_after_s=RETRY_AFTER_S,
        )
    return None


def refuse_attach(entry: Entry, request: Request, received: tuple[int, ...]) -> EchelonError | None:
    """A request that is known: it must be the same one, and what the client holds must be how its answer begins."""
    request_id = request.request_id
    if entry.request.digest != request.digest:
        return ConflictError(f"request_id {request_id!r} is in use with other content", request_id=request_id)
    shared = min(len(entry.ids), len(received))
    if tuple(entry.ids[:shared]) != received[:shared] or (entry.finished and shared < len(received)):
        reason = f"resume.received is not how the answer to {request_id!r} begins"
        return ConflictError(reason, field="resume.received", request_id=request_id)
    if reason := contradiction(entry.request.sampling, received):
        return InvalidRequestError(reason, field="resume.received", request_id=request_id)
    return None


def contradiction(sampling: Sampling, received: Sequence[int]) -> str:
    """Why these ids cannot be the start of an answer under this sampling; empty if they can."""
    if len(received) > sampling.max_tokens:
        return f"resume.received holds {len(received)} ids, over max_tokens={sampling.max_tokens}"
    for place, token_id in enumerate(received[:-1]):
        if token_id in sampling.stop_token_ids:
            return f"resume.received[{place}] = {token_id} ends the answer, but {len(received) - place - 1} ids follow"
    return ""
