"""Conversations: OpenAI's form and ours are one, survive the wire, and come to a template as they were meant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from google.protobuf import struct_pb2
from hypothesis import given
from hypothesis import strategies as st

from echelon import convert
from echelon.chat import ChatMessage, ChatPrompt, ToolCall, chat_message
from echelon.errors import InvalidRequestError
from echelon.v1 import generation_pb2

CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells it.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer", "maximum": 9, "default": 1.5}},
            "required": ["city"],
        },
    },
}


def text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


def assistant(*calls: object, **keys: object) -> dict[str, object]:
    return {"role": "assistant", "tool_calls": list(calls), **keys}


def function(name: object = "f", **keys: object) -> dict[str, object]:
    return {"id": "c1", "function": {"name": name, **keys}}


def over_the_wire(prompt: ChatPrompt) -> ChatPrompt:
    sent = convert.chat_to_proto(prompt).SerializeToString()
    return convert.chat_from_proto(generation_pb2.ChatPrompt.FromString(sent))


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (ChatMessage("user", "hi"), ChatMessage("user", "hi")),
        ({"role": "user", "content": "hi"}, ChatMessage("user", "hi")),
        ({"role": "user", "content": ""}, ChatMessage("user", "")),
        ({"role": "user", "content": [text("a"), text("b")]}, ChatMessage("user", "a\nb")),
        (assistant(CALL, content=None), ChatMessage("assistant", "", (ToolCall("c1", "weather", '{"city": "Köln"}'),))),
        (assistant(ToolCall("c1", "f"), content="so"), ChatMessage("assistant", "so", (ToolCall("c1", "f", "{}"),))),
        (assistant(function(arguments={"a": 1})), ChatMessage("assistant", "", (ToolCall("c1", "f", '{"a": 1}'),))),
        ({"role": "tool", "content": "rain", "tool_call_id": "c1"}, ChatMessage("tool", "rain", (), "c1")),
        # as an OpenAI client hands back an answer
        ({"role": "assistant", "content": "hi", "refusal": None, "tool_calls": None}, ChatMessage("assistant", "hi")),
        (assistant({**function(), "id": None}), ChatMessage("assistant", "", (ToolCall("", "f"),))),
    ],
)
def test_a_message_in_either_form(told: ChatMessage | Mapping[str, Any], message: ChatMessage) -> None:
    assert chat_message(0, told) == message
    assert convert.message_from_proto(convert.message_to_proto(message)) == message


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("hi", r"messages\[3\] must have role and content, .*got str"),
        ({}, r"messages\[3\] must have role and content, .*got nothing"),
        ({"content": "x"}, r"messages\[3\] must have role"),
        ({"role": "user", "content": "x", "name": "y"}, r"messages\[3\] must have role .*got role, content, name"),
        ({"role": "user"}, r"messages\[3\]\.content must be a string, got None"),
        ({"role": "user", "content": 5}, r"messages\[3\]\.content must be a string, got 5"),
        ({"role": "user", "content": "caf\udce9"}, r"messages\[3\]\.content must be text"),
        ({"role": 5, "content": "x"}, r"messages\[3\]\.role must be a string"),
        ({"role": "user", "content": [{"type": "image_url"}]}, r"content\[0\] must be .* reads text alone"),
        ({"role": "user", "content": [{"type": "text"}]}, r"messages\[3\]\.content\[0\]\.text must be a string"),
        ({"role": "user", "content": ["x"]}, r"messages\[3\]\.content\[0\] must be"),
        ({"role": "assistant", "content": "", "tool_calls": "x"}, r"messages\[3\]\.tool_calls must be a list, got 'x'"),
        (assistant({}), r"tool_calls\[0\] must have an id and a function"),
        (assistant(5), r"tool_calls\[0\] must have an id and a function"),
        (assistant(function(5)), r"function\.name must be a string"),
        (assistant(function(arguments=5)), r"function\.arguments must be a string"),
        (assistant({**function(), "id": 5}), r"tool_calls\[0\]\.id must be a string"),
        ({"role": "tool", "content": "", "tool_call_id": 5}, r"messages\[3\]\.tool_call_id must be a string"),
    ],
)
def test_what_is_no_message_is_refused_by_place(told: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        chat_message(3, told)
    assert caught.value.field == "messages"


@pytest.mark.parametrize(
    "make",
    [
        lambda: ChatMessage("user", 5),  # type: ignore[arg-type]
        lambda: ChatMessage("user", "x", (), "\ud800"),
        lambda: ChatMessage("user", "x", ({"function": {}},)),  # type: ignore[arg-type]
        lambda: ToolCall("c", "\ud800"),
        lambda: ToolCall("c", "f", 5),  # type: ignore[arg-type]
    ],
)
def test_our_own_nouns_are_checked_too(make: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        make()
    assert caught.value.field == "messages"


def test_a_prompt_survives_the_wire_with_tools_and_arguments() -> None:
    prompt = ChatPrompt(
        (ChatMessage("user", "hi"), ChatMessage("assistant", "", (ToolCall("c1", "weather"),))),
        (WEATHER,),
        {"enable_thinking": False, "budget": 3, "share": 0.5, "none": None, "names": ["a", 2, {"b": 3}]},
    )
    assert over_the_wire(prompt) == prompt


def test_integers_stay_integers_and_huge_numbers_what_they_were() -> None:
    sent = {"one": 1, "minus": -7, "large": 2**53, "half": 0.5, "huge": 1e300, "yes": True}
    (back,) = over_the_wire(ChatPrompt((), (sent,))).tools
    assert {key: repr(value) for key, value in back.items()} == {key: repr(value) for key, value in sent.items()}


def test_a_tool_reads_as_openai_writes_it_whatever_the_wire_does_to_its_keys() -> None:
    def keys(value: Any) -> list[str]:
        return [key for key, each in value.items() for key in (key, *keys(each))] if isinstance(value, dict) else []

    (back,) = over_the_wire(ChatPrompt((), (WEATHER,))).tools
    function = ["function", "name", "description", "parameters", "type", "properties"]
    assert keys(back) == ["type", *function, *("city", "type", "days", "type", "default", "maximum"), "required"]


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


def turned(value: Any) -> Any:
    """The same objects with their keys in another order."""
    match value:
        case dict():
            return {key: turned(each) for key, each in reversed(value.items())}
        case list():
            return list(map(turned, value))
    return value


@given(st.dictionaries(st.text(), json_values, max_size=5))
def test_any_json_object_survives_the_wire_in_one_order(value: dict[str, object]) -> None:
    (back,) = over_the_wire(ChatPrompt((), (value,))).tools
    assert back == value
    (again,) = over_the_wire(ChatPrompt((), (turned(value),))).tools
    assert repr(again) == repr(back)


@pytest.mark.parametrize(
    "value", [{"a": float("nan")}, {"a": float("inf")}, {"a": object()}, {"a": "\ud800"}, 5, ["x"]]
)
def test_what_json_does_not_have_is_the_senders_fault(value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"tools\[1\] must be a JSON object") as caught:
        convert.chat_to_proto(ChatPrompt((), ({}, value)))
    assert caught.value.field == "tools[1]"


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_client_of_another_make_may_send_numbers_that_json_does_not_have(number: float) -> None:
    arguments = struct_pb2.Struct(fields={"a": struct_pb2.Value(number_value=number)})
    with pytest.raises(InvalidRequestError, match="template_args must be a JSON object") as caught:
        convert.chat_from_proto(generation_pb2.ChatPrompt(template_args=arguments))
    assert caught.value.field == "template_args"
