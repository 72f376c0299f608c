"""Batch files: both formats mean the same, and every bad line is refused by number and field."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.jobs.batch_input import batch_digest, check_job_id, parse_batch
from coordinator.jobs.json_lines import MAX_LINE_BYTES
from echelon.chat import ChatMessage, ChatPrompt, ToolCall
from echelon.errors import InvalidRequestError
from echelon.sampling import SamplingParams


def short(**keys: object) -> dict[str, object]:
    return {"custom_id": "a", **keys}


def completion(**body: object) -> dict[str, object]:
    return {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}


USER = {"role": "user", "content": "hi"}


def chat(**body: object) -> dict[str, object]:
    body = {"messages": [USER], **body}
    return {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}


HI = ChatPrompt((ChatMessage("user", "hi"),))
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"zeta": 1, "alpha": {"days": 3}}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"days": 3}'}}
ANSWER = {"role": "tool", "content": "rain", "tool_call_id": "c1"}


def lines(*objects: object) -> bytes:
    return "\n".join(each if isinstance(each, str) else json.dumps(each) for each in objects).encode()


def test_items_keep_their_order_and_blank_lines_are_passed_over() -> None:
    items = parse_batch(
        b"\xef\xbb\xbf" + lines(short(prompt="x"), "", " ", {"custom_id": "b", "prompt": "y\u2028z"}) + b"\r\n"
    )
    assert [(item.custom_id, item.index, item.prompt) for item in items] == [("a", 0, "x"), ("b", 1, "y\u2028z")]


@pytest.mark.parametrize(
    ("line", "prompt", "sampling"),
    [
        (short(prompt="x"), "x", SamplingParams()),
        (short(token_ids=[1, 2], seed=3), (1, 2), SamplingParams(seed=3)),
        (
            short(messages=[{"role": "user", "content": "hi"}]),
            HI,
            SamplingParams(),
        ),
        (completion(prompt="x", max_tokens=4, n=1, stream=False), "x", SamplingParams(max_tokens=4, n=1)),
        (completion(prompt=[1, 2], logprobs=2, temperature=None), (1, 2), SamplingParams(logprobs=2)),
        (
            completion(prompt="x", stop_token_ids=[5], ignore_eos=True),
            "x",
            SamplingParams(stop_token_ids=(5,), ignore_eos=True),
        ),
        (chat(max_completion_tokens=4), HI, SamplingParams(max_tokens=4)),
        (chat(logprobs=True), HI, SamplingParams(logprobs=0)),
        (chat(logprobs=True, top_logprobs=3), HI, SamplingParams(logprobs=3)),
        (chat(logprobs=False), HI, SamplingParams()),
        (short(prompt="x", stop="."), "x", SamplingParams(stop=(".",))),
        (completion(prompt="x", stop=[".", "\n"], n=3), "x", SamplingParams(stop=(".", "\n"), n=3)),
        (completion(prompt="x", stop=None, logit_bias=None), "x", SamplingParams()),
        (completion(prompt="x", logit_bias={"5": -100, "0": 1}), "x", SamplingParams(logit_bias={5: -100, 0: 1})),
        (short(prompt="x", logit_bias={"5": 0.5}), "x", SamplingParams(logit_bias={5: 0.5})),
        (
            chat(presence_penalty=1, frequency_penalty=-1, seed=3),
            HI,
            SamplingParams(presence_penalty=1, frequency_penalty=-1, seed=3),
        ),
        (chat(response_format={"type": "text"}), HI, SamplingParams()),
        (chat(response_format={"type": "json_object"}), HI, SamplingParams(json_object=True)),
        (completion(prompt="x", response_format={"type": "json_object"}), "x", SamplingParams(json_object=True)),
        (
            chat(response_format={"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": {}}}),
            HI,
            SamplingParams(json_schema="{}"),
        ),
        (
            short(prompt="x", min_p=0.1, repetition_penalty=1.5, bad_words=["y"], min_tokens=2, include_stop=True),
            "x",
            SamplingParams(min_p=0.1, repetition_penalty=1.5, bad_words=("y",), min_tokens=2, include_stop=True),
        ),
        (
            short(prompt="x", prompt_logprobs=3, choice=["a", "b"]),
            "x",
            SamplingParams(prompt_logprobs=3, choice=("a", "b")),
        ),
        (short(prompt="x", json_schema={"type": "object"}), "x", SamplingParams(json_schema='{"type": "object"}')),
        (short(prompt="x", grammar="g"), "x", SamplingParams(grammar="g")),
        (short(messages=[USER], tools=[TOOL]), replace(HI, tools=(TOOL,)), SamplingParams()),
        (chat(tools=[TOOL], tool_choice="auto"), replace(HI, tools=(TOOL,)), SamplingParams()),
        (
            chat(messages=[USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, ANSWER]),
            ChatPrompt(
                (
                    *HI.messages,
                    ChatMessage("assistant", "", (ToolCall("c1", "weather", '{"days": 3}'),)),
                    ChatMessage("tool", "rain", (), "c1"),
                )
            ),
            SamplingParams(),
        ),
    ],
)
def test_both_formats_give_prompt_and_sampling(line: object, prompt: object, sampling: SamplingParams) -> None:
    (item,) = parse_batch(lines(line))
    assert (item.prompt, item.sampling) == (prompt, sampling)


@pytest.mark.parametrize("line", [short(prompt="x"), completion(prompt="x")])
def test_a_place_in_the_queue_and_a_salt_may_be_given(line: dict[str, object]) -> None:
    (item,) = parse_batch(lines(line))
    assert (item.priority, item.cache_salt) == (0, "")
    body = line.get("body", line)
    assert isinstance(body, dict)
    body |= {"priority": -3, "cache_salt": "tenant"}
    (item,) = parse_batch(lines(line))
    assert (item.priority, item.cache_salt) == (-3, "tenant")


def test_every_field_of_sampling_may_stand_in_a_line() -> None:
    for field in fields(SamplingParams):
        for line in (short(prompt="x"), completion(prompt="x"), chat()):
            body = line.get("body", line)
            assert isinstance(body, dict)
            body[field.name] = None
            (item,) = parse_batch(lines(line))
            assert item.sampling == SamplingParams(), field.name


def test_the_keys_of_a_tool_stay_in_their_order() -> None:
    (item,) = parse_batch(lines(chat(tools=[TOOL])))
    assert isinstance(item.prompt, ChatPrompt)
    assert json.dumps(item.prompt.tools[0]) == json.dumps(TOOL)


def test_the_model_and_the_template_arguments_are_taken() -> None:
    (item,) = parse_batch(lines(chat(model="m", template_args={"enable_thinking": False})))
    assert item.model == "m"
    assert isinstance(item.prompt, ChatPrompt) and item.prompt.template_args == {"enable_thinking": False}


@pytest.mark.parametrize(
    ("line", "path", "message"),
    [
        ("{", "", "is not JSON"),
        ("[1]", "", "must be a JSON object"),
        ('{"custom_id": "b", "prompt": "x", "temperature": NaN}', "", "holds NaN"),
        ('{"custom_id": "b", "prompt": "x", "prompt": "y"}', "prompt", "is given twice"),
        ('{"custom_id": "b", "prompt": "\\ud800"}', "", "half of a surrogate pair"),
        ("[" * 100_000, "", "nested deeper than 64 levels"),
        ('{"custom_id": "a", "prompt": ' + "[" * 64 + "]" * 64 + "}", "", "nested deeper than 64 levels"),
        (short(prompt="x" * MAX_LINE_BYTES), "", f"bytes, over the limit of {MAX_LINE_BYTES}"),
        ({"prompt": "x"}, "custom_id", "is missing"),
        ({"custom_id": 7, "prompt": "x"}, "custom_id", "must be a string, got 7"),
        ({"custom_id": "", "prompt": "x"}, "custom_id", "must have 1 to 512 characters"),
        (short(), "prompt", "is missing; give one of prompt, token_ids, messages"),
        (short(prompt="x", token_ids=[1]), "token_ids", "cannot go with prompt; give one of"),
        (short(prompt=""), "prompt", "is empty"),
        (short(prompt=[1]), "prompt", "token ids go under token_ids"),
        (short(token_ids=[]), "token_ids", "is empty"),
        (short(token_ids=[1, True]), "token_ids", "must be a list of token ids"),
        (short(token_ids=[-1]), "token_ids", "must be a list of token ids"),
        (short(prompt="x", template_args={}), "template_args", "goes with messages only"),
        (short(promt="x"), "promt", "is unknown; did you mean prompt\\? known here are custom_id, model, prompt"),
        (short(prompt="x", body_tokens=4), "body_tokens", "is unknown; known here are custom_id, model, prompt"),
        (
            short(prompt="x", temperature=-1),
            "temperature",
            "must be a finite number >= 0, got",
        ),
        (short(prompt="x", temperature=10**400), "temperature", "must be a finite number"),
        (short(prompt="x", stop_token_ids=5), "stop_token_ids", "must be at most 1024 token ids, integers >= 0, got 5"),
        (short(prompt="x", stop=""), "stop", "must be at most 64 texts of 1 to 1000 characters"),
        (short(prompt="x", stop=["a", 5]), r"stop[1]", "must be a string, got 5"),
        (short(prompt="x", n=0), "n", "must be an integer from 1 to 128, got 0"),
        (short(prompt="x", logit_bias={"x": 1}), "logit_bias", "must have token ids for keys, got 'x'"),
        (short(prompt="x", logit_bias={"05": 1}), "logit_bias", "must have token ids for keys, got '05'"),
        (short(prompt="x", logit_bias={"-1": 1}), "logit_bias", "must have token ids for keys, got '-1'"),
        (short(prompt="x", logit_bias={"\u0665": 1}), "logit_bias", "must have token ids for keys"),
        (short(prompt="x", logit_bias={"9" * 5000: 1}), "logit_bias", "must have token ids for keys, got '999"),
        (short(prompt="x", logit_bias={"5": "x"}), "logit_bias", "each with a number from -100 to 100"),
        (short(prompt="x", logit_bias=[5]), "logit_bias", "each with a number from -100 to 100"),
        (short(prompt="x", json_object=True, regex="a"), "json_object", "cannot be combined with regex"),
        (short(prompt="x", min_tokens=9, max_tokens=3), "min_tokens", "must be at most max_tokens=3, got 9"),
        (short(prompt="x", priority=True), "priority", "must be an integer from -2147483648"),
        (short(prompt="x", priority=2**31), "priority", "must be an integer from -2147483648"),
        (short(prompt="x", cache_salt=5), "cache_salt", "must be a string, got 5"),
        (short(prompt="x", tools=[]), "tools", "goes with messages only"),
        (short(prompt="x", response_format={}), "response_format", "is unknown"),
        (short(messages="hi"), "messages", "must be a list, got 'hi'"),
        (short(messages=[]), "messages", "must be a list of at least one message"),
        (short(messages=["hi"]), "messages[0]", "must have role and content"),
        (short(messages=[{"role": "user"}]), "messages[0].content", "must be a string, got None"),
        (short(messages=[{"role": "user", "content": "x", "name": "y"}]), "messages[0]", "got role, content, name"),
        (
            short(messages=[USER, {"role": "assistant", "tool_calls": [{"id": "c"}]}]),
            "messages[1].tool_calls[0]",
            "must have an id and a function",
        ),
        (short(messages=[USER], tools={}), "tools", "must be a list, got"),
        (short(messages=[USER], tools=[{}, "f"]), "tools[1]", "must be a JSON object, got 'f'"),
        (short(messages=[USER], template_args=[]), "template_args", "must be a JSON object"),
        ({**completion(prompt="x"), "method": "GET"}, "method", "must be 'POST'"),
        ({**completion(prompt="x"), "url": "/v1/embeddings"}, "url", "must be '/v1/completions' or"),
        ({"custom_id": "b", "url": "/v1/completions"}, "body", "is missing"),
        (completion(prompt="x", n=True), "body.n", "must be an integer from 1 to 128, got True"),
        (completion(prompt="x", messages=[]), "body.messages", "is unknown"),
        (completion(prompt="x", tools=[]), "body.tools", "is unknown"),
        (completion(prompt="x", response_format="text"), "body.response_format", "must be a JSON object"),
        (chat(response_format={}), "body.response_format.type", "is missing"),
        (chat(response_format={"type": "xml"}), "body.response_format.type", "one of text, json_object, json_schema"),
        (chat(response_format={"type": "text", "x": 1}), "body.response_format.x", "is unknown"),
        (chat(response_format={"type": "json_schema"}), "body.response_format.json_schema", "is missing"),
        (
            chat(response_format={"type": "json_schema", "json_schema": {"name": "n"}}),
            "body.response_format.json_schema.schema",
            "is missing",
        ),
        (
            chat(response_format={"type": "json_schema", "json_schema": {"schema": "{}"}}),
            "body.response_format.json_schema.schema",
            "must be a JSON object",
        ),
        (
            chat(response_format={"type": "json_object"}, json_object=True),
            "body.response_format",
            "cannot go with json_object",
        ),
        (chat(response_format={"type": "json_object"}, regex="a"), "body.json_object", "cannot be combined with regex"),
        (chat(tool_choice="required"), "body.tool_choice", "must be 'auto', got 'required'"),
        (chat(tools=[5]), "body.tools[0]", "must be a JSON object"),
        (completion(prompt="x", stream=True), "body.stream", "must be false"),
        (completion(prompt="x", user="u"), "body.user", "is unknown; known here are model, prompt"),
        (completion(prompt=["x", "y"]), "body.prompt", "must be a string or a list of token ids"),
        (chat(top_logprobs=3), "body.top_logprobs", "needs logprobs: true"),
        (chat(max_tokens=3, max_completion_tokens=3), "body.max_completion_tokens", "not both"),
        (chat(top_p=0), "body.top_p", r"must be in \(0, 1\], got 0"),
    ],
)
def test_a_bad_line_is_refused_by_number_and_field(line: object, path: str, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        parse_batch(lines({"custom_id": "good", "prompt": "x"}, "", line))
    assert caught.value.message.startswith(f"line 3: {path} " if path else "line 3 ")
    assert caught.value.field == f"source.jsonl[3].{path}".rstrip(".")


def test_a_custom_id_may_come_once() -> None:
    with pytest.raises(InvalidRequestError, match="line 2: custom_id 'a' is already the custom_id of line 1"):
        parse_batch(lines(short(prompt="x"), short(prompt="y")))


def test_bytes_that_are_no_text_and_a_file_without_items_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="line 2 is not UTF-8 at byte 2"):
        parse_batch(lines(short(prompt="x")) + b'\n{"\xff"}')
    with pytest.raises(InvalidRequestError, match="the batch has no items"):
        parse_batch(b"\n \n")


@given(st.binary(max_size=60) | st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=5).map(lines))
def test_any_bytes_are_items_or_one_clear_error(jsonl: bytes) -> None:
    try:
        assert parse_batch(jsonl)
    except InvalidRequestError as error:
        assert error.field and error.field.startswith("source.jsonl")


def test_the_digest_covers_the_model_and_the_lines() -> None:
    one, other = parse_batch(lines(short(prompt="x"))), parse_batch(lines(short(prompt="y")))
    assert batch_digest("m", one) == batch_digest("m", parse_batch(b"\n" + lines(short(prompt="x")) + b"\r\n"))
    assert len({batch_digest("m", one), batch_digest("m", other), batch_digest("n", one)}) == 3


def test_job_ids_are_plain() -> None:
    check_job_id("nightly-42.a_B")
    for job_id in ("", ".a", "a/b", "a" * 65, "a\n"):
        with pytest.raises(InvalidRequestError, match="batch_job_id must be 1 to 64"):
            check_job_id(job_id)
