"""A batch file to its items: JSON lines in the OpenAI batch format, or in Echelon's short form.

    {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "...", "max_tokens": 8}}
    {"custom_id": "b", "prompt": "..."   or "token_ids": [...]   or "messages": [...], "max_tokens": 8}

Pure functions, run in the coordinator off its event loop. Every error names the line and the field; nothing is taken
from a file that has one bad line.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.frontend import Prompt
from coordinator.jobs.item_body import CHAT_KEYS, QUEUE_KEYS, SAMPLING_KEYS, prompt_of, rename_openai, sampling_of
from coordinator.jobs.json_lines import JsonObject, lines, read_object, refuse
from echelon.errors import InvalidRequestError
from echelon.sampling import SamplingParams, shown

MAX_CUSTOM_ID_CHARACTERS = 512
_JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_OPENAI_KEYS = ("custom_id", "method", "url", "body")
_SHORT_KEYS = ("custom_id", "model", "prompt", "token_ids", *CHAT_KEYS, *QUEUE_KEYS, *SAMPLING_KEYS)
_BODY_KEYS = (*QUEUE_KEYS, "stream", "response_format", *SAMPLING_KEYS)
_COMPLETION_KEYS = ("model", "prompt", *_BODY_KEYS)
_CHAT_KEYS = ("model", *CHAT_KEYS, "tool_choice", "max_completion_tokens", "top_logprobs", *_BODY_KEYS)


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchItem:
    """One line: index is its place among the items, line the text that it was read from."""

    custom_id: str
    index: int
    prompt: Prompt
    sampling: SamplingParams
    model: str
    line: str
    priority: int = 0
    cache_salt: str = ""


def parse_batch(jsonl: bytes) -> tuple[BatchItem, ...]:
    """All items in order. Blank lines are passed over, but counted. Raises InvalidRequestError."""
    items: list[BatchItem] = []
    first_line: dict[str, int] = {}
    for number, line in lines(jsonl):
        item = parse_item(line, len(items), number)
        if (first := first_line.setdefault(item.custom_id, number)) != number:
            refuse(number, "custom_id", f"{shown(item.custom_id)} is already the custom_id of line {first}")
        items.append(item)
    if not items:
        raise InvalidRequestError("the batch has no items; send at least one JSON line", field="source.jsonl")
    return tuple(items)


def parse_item(line: str, index: int, number: int) -> BatchItem:
    """The item of one line; number counts lines from 1, for errors."""
    value = read_object(line, number)
    openai = "body" in value or "url" in value or "method" in value
    value.only(_OPENAI_KEYS if openai else _SHORT_KEYS)
    custom_id = value.string("custom_id", required=True)
    if not 1 <= len(custom_id) <= MAX_CUSTOM_ID_CHARACTERS:
        value.refuse("custom_id", f"must have 1 to {MAX_CUSTOM_ID_CHARACTERS} characters, got {len(custom_id)}")
    body = _openai_body(value) if openai else value
    return BatchItem(
        custom_id=custom_id,
        index=index,
        prompt=prompt_of(body, "" if openai else "token_ids"),
        sampling=sampling_of(body),
        model=body.string("model"),
        line=line,
        priority=body.integer("priority", 0, -(2**31), 2**31 - 1),
        cache_salt=body.string("cache_salt"),
    )


def _openai_body(value: JsonObject) -> JsonObject:
    if value.string("method") not in ("", "POST"):
        value.refuse("method", f"must be 'POST', got {shown(value['method'])}")
    url = value.string("url", required=True)
    if url not in ("/v1/completions", "/v1/chat/completions"):
        value.refuse("url", f"must be '/v1/completions' or '/v1/chat/completions', got {shown(url)}")
    body = value.object("body", required=True)
    chat = url == "/v1/chat/completions"
    body.only(_CHAT_KEYS if chat else _COMPLETION_KEYS)
    rename_openai(body, chat)
    return body


def check_job_id(job_id: str) -> None:
    """Refuses ids that no name, file or request id could carry."""
    if not _JOB_ID.fullmatch(job_id):
        raise InvalidRequestError(
            "batch_job_id must be 1 to 64 letters, digits or any of . _ -, the first a letter or digit, "
            f"got {job_id[:100]!r}",
            field="batch_job_id",
        )


def batch_digest(model: str, items: Sequence[BatchItem]) -> bytes:
    """SHA-256 of a job's content: its model and its lines, blank ones and outer spaces left out."""
    digest = hashlib.sha256(model.encode())
    for item in items:
        digest.update(b"\n" + item.line.encode())
    return digest.digest()
