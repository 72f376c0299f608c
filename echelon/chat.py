"""The nouns of a conversation: messages, the tools a model may call, and what its template is told besides.

Frozen values, shared by the SDK and the coordinator. How they become a prompt is the matter of the model's own chat
template, which alone says what roles, tools and arguments mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from echelon.errors import InvalidRequestError
from echelon.sampling import check_text


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the assistant made; arguments_json as the model wrote them."""

    id: str
    name: str
    arguments_json: str = "{}"


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
        check_text("role", self.role, "messages")
        check_text("content", self.content, "messages")


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation. tools have OpenAI's form; template_args are names that only the template knows."""

    messages: tuple[ChatMessage, ...]
    tools: tuple[Mapping[str, object], ...] = ()
    template_args: Mapping[str, object] = field(default_factory=dict)


_KEYS = ("role", "content", "tool_calls", "tool_call_id")


def chat_message(place: int, message: ChatMessage | Mapping[str, Any]) -> ChatMessage:
    """The message at this place of a list, told as a ChatMessage or in OpenAI's form."""
    if isinstance(message, ChatMessage):
        return message
    where = f"messages[{place}]"
    if not isinstance(message, Mapping) or "role" not in message or not {*_KEYS} >= message.keys():
        found = ", ".join(map(str, message)) if isinstance(message, Mapping) else type(message).__name__
        raise InvalidRequestError(
            f"{where} must have role and content, may have tool_calls or tool_call_id, got {found or 'nothing'}",
            field="messages",
        )
    calls = message.get("tool_calls") or ()
    content = message.get("content")
    return ChatMessage(
        role=check_text(f"{where}.role", message["role"], "messages"),
        content="" if content is None and calls else check_text(f"{where}.content", content, "messages"),
        tool_calls=_tool_calls(where, calls),
        tool_call_id=check_text(f"{where}.tool_call_id", message.get("tool_call_id") or "", "messages"),
    )


def _tool_calls(where: str, calls: object) -> tuple[ToolCall, ...]:
    """OpenAI's {id, type: function, function: {name, arguments}}."""
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise InvalidRequestError(f"{where}.tool_calls must be a list, got {calls!r}", field="messages")
    made: list[ToolCall] = []
    for place, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if isinstance(call, ToolCall):
            made.append(call)
        elif isinstance(function, Mapping) and isinstance(function.get("name"), str):
            arguments = check_text("arguments", function.get("arguments", "{}"), "messages")
            made.append(ToolCall(str(call.get("id", "")), function["name"], arguments))
        else:
            rule = "must have an id and a function with name and arguments"
            raise InvalidRequestError(f"{where}.tool_calls[{place}] {rule}, got {call!r}", field="messages")
    return tuple(made)
