"""A batch file to its items: JSON lines in the OpenAI batch format, or in Echelon's short form.

    {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "...", "max_tokens": 8}}
    {"custom_id": "b", "prompt": "..."   or "token_ids": [...]   or "messages": [...], "max_tokens": 8}

Pure functions, run in the coordinator off its event loop. Every error names the line and the field; nothing is taken
from a file that has one bad line. What only the model can judge (context, vocabulary) is judged when an item runs.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NoReturn

from coordinator.frontend import Prompt
from coordinator.jobs.strict_json import StrictJsonError, parse_json
from echelon.chat import ChatMessage, ChatPrompt
from echelon.errors import InvalidRequestError
from echelon.sampling import SamplingParams

MAX_CUSTOM_ID_CHARACTERS = 512
MAX_LINE_BYTES = 16 * 2**20  # as of a request
_JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
SAMPLING_KEYS = tuple(field.name for field in fields(SamplingParams))
_OPENAI_KEYS = ("custom_id", "method", "url", "body")
_SHORT_KEYS = ("custom_id", "model", "prompt", "token_ids", "messages", "template_args", *SAMPLING_KEYS)
_COMPLETION_KEYS = ("model", "prompt", "n", "stream", *SAMPLING_KEYS)
_CHAT_KEYS = (
    *("model", "messages", "template_args", "n", "stream", "max_completion_tokens", "top_logprobs"),
    *SAMPLING_KEYS,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchItem:
    """One line: index is its place among the items, line the text that it was read from."""

    custom_id: str
    index: int
    prompt: Prompt
    sampling: SamplingParams
    model: str
    line: str


def parse_batch(jsonl: bytes) -> tuple[BatchItem, ...]:
    """All items in order. Blank lines are passed over, but counted. Raises InvalidRequestError."""
    items: list[BatchItem] = []
    first_line: dict[str, int] = {}
    for number, line in _lines(jsonl):
        item = parse_item(line, len(items), number)
        if item.custom_id in first_line:
            _refuse(
                number, "custom_id", f"{item.custom_id!r} is already the custom_id of line {first_line[item.custom_id]}"
            )
        first_line[item.custom_id] = number
        items.append(item)
    if not items:
        raise InvalidRequestError("the batch has no items; send at least one JSON line", field="source.jsonl")
    return tuple(items)


def parse_item(line: str, index: int, number: int) -> BatchItem:
    """The item of one line; number counts lines from 1, for errors."""
    value = _Object(_json(line, number), number, "")
    openai = "body" in value or "url" in value or "method" in value
    value.only(_OPENAI_KEYS if openai else _SHORT_KEYS)
    custom_id = value.string("custom_id", required=True)
    if not 1 <= len(custom_id) <= MAX_CUSTOM_ID_CHARACTERS:
        _refuse(number, "custom_id", f"must have 1 to {MAX_CUSTOM_ID_CHARACTERS} characters, got {len(custom_id)}")
    if openai:
        prompt, sampling, model = _openai(value)
    else:
        prompt = _prompt(value, "token_ids")
        sampling = _sampling(value, None)
        model = value.string("model")
    return BatchItem(custom_id=custom_id, index=index, prompt=prompt, sampling=sampling, model=model, line=line)


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


def _openai(value: _Object) -> tuple[Prompt, SamplingParams, str]:
    if value.string("method") not in ("", "POST"):
        value.refuse("method", f"must be 'POST', got {value['method']!r}")
    url = value.string("url", required=True)
    if url not in ("/v1/completions", "/v1/chat/completions"):
        value.refuse("url", f"must be '/v1/completions' or '/v1/chat/completions', got {url!r}")
    body = value.object("body", required=True)
    chat = url == "/v1/chat/completions"
    body.only(_CHAT_KEYS if chat else _COMPLETION_KEYS)
    if body.get("n") not in (None, 1) or isinstance(body.get("n"), bool):
        body.refuse("n", f"must be 1, got {body['n']!r}; send more items instead")
    if body.get("stream") not in (None, False):
        body.refuse("stream", f"must be false in a batch, got {body['stream']!r}")
    return _prompt(body, ""), _sampling(body, _chat_sampling if chat else None), body.string("model")


def _prompt(value: _Object, ids_key: str) -> Prompt:
    """The one input of the object. With ids_key empty, ids come as the prompt itself, as OpenAI has it."""
    given = [key for key in ("prompt", "messages", ids_key) if value.get(key) is not None]
    if len(given) != 1:
        known = [key for key in ("prompt", ids_key, "messages") if key]
        one = f"give one of {', '.join(known)}"
        if given:
            value.refuse(given[1], f"cannot go with {given[0]}; {one}")
        value.refuse(known[0], f"is missing; {one}")
    key = given[0]
    raw = value[key]
    if key != "messages" and value.get("template_args") is not None:
        value.refuse("template_args", "goes with messages only")
    if key == "messages":
        return ChatPrompt(_messages(value), (), value.object("template_args").plain())
    if key == "prompt" and isinstance(raw, str):
        return raw or value.refuse(key, "is empty")
    if key == "prompt" and ids_key:
        value.refuse(key, f"must be a string, got {_shown(raw)}; token ids go under {ids_key}")
    if not isinstance(raw, list) or not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in raw):
        value.refuse(key, f"must be {'' if ids_key else 'a string or '}a list of token ids, got {_shown(raw)}")
    return tuple(raw) or value.refuse(key, "is empty")


def _messages(value: _Object) -> tuple[ChatMessage, ...]:
    raw = value["messages"]
    if not isinstance(raw, list) or not raw:
        value.refuse("messages", f"must be a list of at least one message, got {_shown(raw)}")
    messages = [value.child(f"messages[{position}]", each) for position, each in enumerate(raw)]
    for message in messages:
        message.only(("role", "content"))
    return tuple(
        ChatMessage(message.string("role", required=True), message.string("content", required=True))
        for message in messages
    )


def _chat_sampling(body: _Object) -> None:
    """OpenAI's chat names to those of SamplingParams: max_completion_tokens, and a switch beside the count."""
    renamed = body.pop("max_completion_tokens")
    if renamed is not None and body.get("max_tokens") is not None:
        body.refuse("max_completion_tokens", "give max_tokens or max_completion_tokens, not both")
    body.setdefault("max_tokens", renamed)
    switch, count = body.get("logprobs"), body.pop("top_logprobs")
    if isinstance(switch, bool) or switch is None:
        if count is not None and not switch:
            body.refuse("top_logprobs", "needs logprobs: true")
        body["logprobs"] = (0 if count is None else count) if switch else None
    elif count is not None:
        body.refuse("top_logprobs", "goes with logprobs: true; with a number, logprobs itself is the count")


def _sampling(value: _Object, prepare: Callable[[_Object], None] | None) -> SamplingParams:
    if prepare is not None:
        prepare(value)
    given: dict[str, Any] = {key: value[key] for key in SAMPLING_KEYS if value.get(key) is not None}
    if "stop_token_ids" in given:
        if not isinstance(given["stop_token_ids"], list):
            value.refuse("stop_token_ids", f"must be a list of token ids, got {_shown(given['stop_token_ids'])}")
        given["stop_token_ids"] = tuple(given["stop_token_ids"])
    try:
        return SamplingParams(**given)
    except InvalidRequestError as error:
        name, _, rule = error.message.partition(" ")
        value.refuse(name, rule)


class _Object:
    """A JSON object that knows where it stands, so that every complaint names its line and the whole path."""

    def __init__(self, value: object, number: int, path: str) -> None:
        if not isinstance(value, dict):
            _refuse(number, path, f"must be a JSON object, got {_shown(value)}")
        self._value, self._number, self._path = dict(value), number, path

    def __contains__(self, key: str) -> bool:
        return key in self._value

    def __getitem__(self, key: str) -> Any:
        return self._value[key]

    def __setitem__(self, key: str, value: object) -> None:
        self._value[key] = value

    def get(self, key: str) -> Any:
        return self._value.get(key)

    def pop(self, key: str) -> Any:
        return self._value.pop(key, None)

    def setdefault(self, key: str, value: object) -> None:
        if self._value.get(key) is None:
            self._value[key] = value

    def plain(self) -> Mapping[str, object]:
        return dict(self._value)

    def refuse(self, key: str, rule: str) -> NoReturn:
        _refuse(self._number, f"{self._path}.{key}" if self._path else key, rule)

    def only(self, known: Sequence[str]) -> None:
        for key in self._value:
            if key not in known:
                self.refuse(key, f"is unknown; known here are {', '.join(known)}")

    def child(self, key: str, value: object) -> _Object:
        return _Object(value, self._number, f"{self._path}.{key}" if self._path else key)

    def object(self, key: str, required: bool = False) -> _Object:
        if required and self.get(key) is None:
            self.refuse(key, "is missing")
        return self.child(key, {} if self.get(key) is None else self[key])

    def string(self, key: str, required: bool = False) -> str:
        value = self.get(key)
        if value is None and not required:
            return ""
        if not isinstance(value, str):
            self.refuse(key, f"must be a string, got {_shown(value)}" if key in self else "is missing")
        return value


def _lines(jsonl: bytes) -> Iterator[tuple[int, str]]:
    # only \n ends a line: splitlines() of str would also cut at U+2028, which JSON allows inside strings
    for number, raw in enumerate(jsonl.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not raw.strip():
            continue
        if len(raw) > MAX_LINE_BYTES:
            _refuse(number, "", f"has {len(raw)} bytes, over the limit of {MAX_LINE_BYTES}")
        try:
            yield number, raw.decode().strip()
        except UnicodeDecodeError as error:
            _refuse(number, "", f"is not UTF-8 at byte {error.start}")


def _json(line: str, number: int) -> object:
    try:
        return parse_json(line)
    except StrictJsonError as error:
        _refuse(number, error.key, error.rule)


def _refuse(number: int, path: str, rule: str) -> NoReturn:
    raise InvalidRequestError(
        f"line {number}: {path} {rule}" if path else f"line {number} {rule}",
        field=f"source.jsonl[{number}].{path}" if path else f"source.jsonl[{number}]",
    )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
