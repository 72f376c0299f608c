"""Results in OpenAI's form: every choice, why it ended, and what was counted."""

from __future__ import annotations

import json

from echelon.cli.output import openai_result
from echelon.errors import InvalidRequestError
from echelon.types import Choice, Completion, FinishReason, ItemResult, TokenLogprob, Usage

LOGPROBS = (TokenLogprob(5, -0.25, ((5, -0.25), (9, -2.5))), TokenLogprob(6, -1.0))
TOLD = [
    {"token_id": 5, "logprob": -0.25, "top": [[5, -0.25], [9, -2.5]]},
    {"token_id": 6, "logprob": -1.0, "top": []},
]
ANSWER = Completion(
    request_id="job.j.3",
    model="tiny",
    choices=(
        Choice(text="grüße", token_ids=(5, 6), finish_reason=FinishReason.STOP, logprobs=LOGPROBS, matched_stop="."),
        Choice(index=1, text="x", token_ids=(7,), finish_reason=FinishReason.LENGTH),
    ),
    usage=Usage(10, 3, 4, 8),
    prompt_logprobs=LOGPROBS,
)


def test_an_item_of_several_choices() -> None:
    line = openai_result("j", ItemResult(custom_id="c", index=3, cursor=1, completion=ANSWER))
    assert json.loads(json.dumps(line)) == {
        "id": "j.3",
        "custom_id": "c",
        "error": None,
        "response": {
            "status_code": 200,
            "request_id": "job.j.3",
            "body": {
                "id": "job.j.3",
                "object": "text_completion",
                "model": "tiny",
                "choices": [
                    {
                        "index": 0,
                        "text": "grüße",
                        "token_ids": [5, 6],
                        "finish_reason": "stop",
                        "stop_reason": ".",
                        "logprobs": TOLD,
                    },
                    {
                        "index": 1,
                        "text": "x",
                        "token_ids": [7],
                        "finish_reason": "length",
                        "stop_reason": None,
                        "logprobs": None,
                    },
                ],
                "prompt_logprobs": TOLD,
                "usage": {
                    "prompt_tokens": 10,
                    "completion_tokens": 3,
                    "total_tokens": 13,
                    "prompt_tokens_details": {"cached_tokens": 8},
                },
            },
        },
    }


def test_an_item_that_failed() -> None:
    error = InvalidRequestError("too long", reason="CONTEXT_TOO_LONG")
    line = openai_result("j", ItemResult(custom_id="c", index=3, cursor=1, error=error))
    assert line["response"] is None
    assert line["error"] == {"code": "CONTEXT_TOO_LONG", "message": "too long"}
