"""What an item of a batch asks for: prompt and sampling, under our names or those of OpenAI's API.

Pure, in the coordinator, off its event loop. What only the model can judge (context, vocabulary) is judged when an
item runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from coordinator.frontend import Prompt
from coordinator.jobs.json_lines import JsonObject
from echelon.chat import ChatPrompt, chat_message
from echelon.errors import InvalidRequestError
from echelon.sampling import SamplingParams, shown

SAMPLING_KEYS = tuple(field.name for field in fields(SamplingParams))
CHAT_KEYS = ("messages", "tools", "template_args")
QUEUE_KEYS = ("priority", "cache_salt")
_FORMATS = ("text", "json_object", "json_schema")


def prompt_of(value: JsonObject, ids_key: str) -> Prompt:
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
    if key == "messages":
        return _chat(value)
    for name in CHAT_KEYS[1:]:
        if value.get(name) is not None:
            value.refuse(name, "goes with messages only")
    if key == "prompt" and isinstance(raw, str):
        return raw or value.refuse(key, "is empty")
    if key == "prompt" and ids_key:
        value.refuse(key, f"must be a string, got {shown(raw)}; token ids go under {ids_key}")
    if not isinstance(raw, list) or not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in raw):
        value.refuse(key, f"must be {'' if ids_key else 'a string or '}a list of token ids, got {shown(raw)}")
    return tuple(raw) or value.refuse(key, "is empty")


def sampling_of(value: JsonObject) -> SamplingParams:
    """The SamplingParams of an object that has their names; what is null is left open."""
    given: dict[str, Any] = {key: value[key] for key in SAMPLING_KEYS if value.get(key) is not None}
    if isinstance(given.get("logit_bias"), Mapping):
        given["logit_bias"] = _biases(value.object("logit_bias"))
    try:
        return SamplingParams(**given)
    except InvalidRequestError as error:
        value.told(error)


def rename_openai(body: JsonObject, chat: bool) -> None:
    """OpenAI's names to those of SamplingParams, in place."""
    if body.pop("stream") not in (None, False):
        body.refuse("stream", "must be false in a batch")
    if chat:
        _rename_chat(body)
    _rename_response_format(body)


def _chat(value: JsonObject) -> ChatPrompt:
    messages = value.items("messages")
    if not messages:
        value.refuse("messages", "must be a list of at least one message, got []")
    tools = tuple(value.child(f"tools[{place}]", tool).plain() for place, tool in enumerate(value.items("tools")))
    try:
        made = tuple(chat_message(place, message) for place, message in enumerate(messages))
    except InvalidRequestError as error:
        value.told(error)
    return ChatPrompt(made, tools, value.object("template_args").plain())


def _biases(biases: JsonObject) -> dict[int, object]:
    """JSON has strings for keys: decimal ids, each in its one spelling."""
    for key in biases.plain():
        if not (key.isdecimal() and len(key) <= 10 and str(int(key)) == key):
            biases.refuse("", f"must have token ids for keys, got {shown(key)}")
    return {int(key): bias for key, bias in biases.plain().items()}


def _rename_chat(body: JsonObject) -> None:
    """max_completion_tokens, a switch beside the count of logprobs, and the one choice of tools that there is."""
    renamed = body.pop("max_completion_tokens")
    if renamed is not None and body.get("max_tokens") is not None:
        body.refuse("max_completion_tokens", "give max_tokens or max_completion_tokens, not both")
    if renamed is not None:
        body["max_tokens"] = renamed
    switch, count = body.get("logprobs"), body.pop("top_logprobs")
    if isinstance(switch, bool) or switch is None:
        if count is not None and not switch:
            body.refuse("top_logprobs", "needs logprobs: true")
        body["logprobs"] = (0 if count is None else count) if switch else None
    elif count is not None:
        body.refuse("top_logprobs", "goes with logprobs: true; with a number, logprobs itself is the count")
    if (choice := body.pop("tool_choice")) not in (None, "auto"):
        body.refuse("tool_choice", f"must be 'auto', got {shown(choice)}: the model decides")


def _rename_response_format(body: JsonObject) -> None:
    if body.get("response_format") is None:
        return
    asked = body.object("response_format")
    body.pop("response_format")
    kind = asked.string("type", required=True)
    if kind not in _FORMATS:
        asked.refuse("type", f"must be one of {', '.join(_FORMATS)}, got {shown(kind)}")
    asked.only(("type", "json_schema") if kind == "json_schema" else ("type",))
    if kind == "text":
        return
    if body.get(kind) is not None:
        body.refuse("response_format", f"cannot go with {kind}")
    if kind == "json_schema":
        body[kind] = asked.object(kind, required=True).object("schema", required=True).plain()
    else:
        body[kind] = True
