"""An item's outcome to JSON and back, as the job store keeps it.

Pure functions in the coordinator, exact both ways: floats, infinities and the kind of an error included. Knows no
database and no protobuf type.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from coordinator.jobs.events import Outcome
from echelon.errors import EchelonError, error_of
from echelon.types import Choice, Completion, FinishReason, Timing, TokenLogprob, Usage


def dump(outcome: Outcome) -> str:
    """The outcome as one JSON object: a completion's fields, or an error's code, message and details."""
    if isinstance(outcome, EchelonError):
        return json.dumps(
            {
                "code": outcome.code,
                "message": outcome.message,
                "reason": outcome.reason,
                "field": outcome.field,
                "request_id": outcome.request_id,
            }
        )
    choices = [asdict(choice) | {"finish_reason": choice.finish_reason.value} for choice in outcome.choices]
    return json.dumps(asdict(outcome) | {"choices": choices})


def completion(body: str) -> Completion:
    """The completion that `dump` wrote."""
    fields = json.loads(body)
    return Completion(
        request_id=fields["request_id"],
        model=fields["model"],
        choices=tuple(_choice(choice) for choice in fields["choices"]),
        usage=Usage(**fields["usage"]),
        timing=Timing(**fields["timing"]),
        prompt_logprobs=_logprobs(fields["prompt_logprobs"]),
    )


def _choice(fields: dict[str, Any]) -> Choice:
    settled = {
        "token_ids": tuple(fields["token_ids"]),
        "finish_reason": FinishReason(fields["finish_reason"]),
        "logprobs": _logprobs(fields["logprobs"]),
    }
    return Choice(**fields | settled)


def _logprobs(told: list[dict[str, Any]]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(each["token_id"], each["logprob"], tuple((token_id, value) for token_id, value in each["top"]))
        for each in told
    )


def error(body: str) -> EchelonError:
    """The error that `dump` wrote, of the same kind."""
    return error_of(**json.loads(body))
