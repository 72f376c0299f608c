"""The nouns of a conversation: messages, the tools a model may call, and what its template is told besides.

Frozen values, shared by the SDK and the coordinator. How they become a prompt is the matter of the model's own chat
template, which alone says what roles, tools and arguments mean.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from echelon.errors import InvalidRequestError
from echelon.sampling import check_text, shown


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the assistant made; arguments_json as the model wrote them."""

    id: str
    name: str
    arguments_json: str = "{}"

    def __post_init__(self) -> None:
        for name in ("id", "name", "arguments_json"):
            check_text(f"tool_calls.{name}", getattr(self, name), "messages")


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message: role is system, user, assistant or tool. Raises InvalidRequestError for what is no text.

    tool_calls are an assistant's; tool_call_id names the call that a tool's message answers.
    """

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""

    def __post_init__(self) -> None:
        for name in ("role", "content", "tool_call_id"):
            check_text(name, getattr(self, name), "messages")
        object.__setattr__(self, "tool_calls", _tool_calls("message", self.tool_calls))


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation. tools have OpenAI's form; template_args are names that only the template knows."""

    messages: tuple[ChatMessage, ...]
    tools: tuple[Mapping[str, object], ...] = ()
    template_args: Mapping[str, object] = field(default_factory=dict)


_KEYS = frozenset({"role", "content", "tool_calls", "tool_call_id"})


def chat_message(place: int, message: ChatMessage | Mapping[str, Any]) -> ChatMessage:
    """The message at this place of a list, told as a ChatMessage or in OpenAI's form.

    What an OpenAI client leaves at None in a message that it hands back is passed over.
    """
    if isinstance(message, ChatMessage):
        return message
    where = f"messages[{place}]"
    given = {key: value for key, value in message.items() if value is not None} if isinstance(message, Mapping) else {}
    if "role" not in given or not given.keys() <= _KEYS:
        found = ", ".join(map(str, given)) if isinstance(message, Mapping) else type(message).__name__
        raise InvalidRequestError(
            f"{where} must have role and content, may have tool_calls or tool_call_id, got {found or 'nothing'}",
            field="messages",
        )
    calls = _tool_calls(where, given.get("tool_calls", ()))
    return ChatMessage(
        role=check_text(f"{where}.role", given["role"], "messages"),
        content="" if calls and "content" not in given else _content(where, given.get("content")),
        tool_calls=calls,
        tool_call_id=check_text(f"{where}.tool_call_id", given.get("tool_call_id", ""), "messages"),
    )


def _content(where: str, content: object) -> str:
    """A text, or OpenAI's list of {type: text, text} parts, a line each."""
    if not isinstance(content, (list, tuple)):
        return check_text(f"{where}.content", content, "messages")
    texts: list[str] = []
    for place, part in enumerate(content):
        path = f"{where}.content[{place}]"
        if not isinstance(part, Mapping) or part.get("type") != "text":
            rule = 'must be {"type": "text", "text": ...}: the model reads text alone'
            raise InvalidRequestError(f"{path} {rule}, got {shown(part)}", field="messages")
        texts.append(check_text(f"{path}.text", part.get("text"), "messages"))
    return "\n".join(texts)


def _tool_calls(where: str, calls: object) -> tuple[ToolCall, ...]:
    """OpenAI's {id, type: function, function: {name, arguments}}."""
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise InvalidRequestError(f"{where}.tool_calls must be a list, got {shown(calls)}", field="messages")
    return tuple(_tool_call(f"{where}.tool_calls[{place}]", call) for place, call in enumerate(calls))


def _tool_call(where: str, call: object) -> ToolCall:
    if isinstance(call, ToolCall):
        return call
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping) or "name" not in function:
        rule = "must have an id and a function with name and arguments"
        raise InvalidRequestError(f"{where} {rule}, got {shown(call)}", field="messages")
    return ToolCall(
        id=check_text(f"{where}.id", call.get("id") or "", "messages"),
        name=check_text(f"{where}.function.name", function["name"], "messages"),
        arguments_json=_arguments(f"{where}.function.arguments", function.get("arguments", "{}")),
    )


def _arguments(where: str, arguments: object) -> str:
    """As the model wrote them, or the object that its text says, as transformers' templates have it."""
    if not isinstance(arguments, Mapping):
        return check_text(where, arguments, "messages")
    try:
        return json.dumps(dict(arguments), ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{where} must be JSON: {error}", field="messages") from None
