"""What ends an answer, what form it has, what a prompt may be, and who goes first: through gRPC on real ranks."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from random import Random
from typing import Any

import grpc
import jsonschema
import pydantic
import pytest

from echelon import Completion, InvalidRequestError, SamplingParams
from echelon.types import Cluster, FinishReason
from echelon.v1 import generation_pb2, generation_pb2_grpc
from tests.cluster.conftest import Case
from tests.cluster.reference import Reference
from tests.cluster.rules import PLAIN, across_tokens, assert_drawn
from tests.unit.random_schemas import random_schema

pytestmark = pytest.mark.cluster

PROMPT = "An echelon is a formation in which each unit stands a little behind."
FREE = replace(PLAIN, max_tokens=96, temperature=0.9)
BOUND = SamplingParams(max_tokens=300, temperature=1.0)


@pytest.fixture(scope="module")
def generation(pair: Case) -> Iterator[generation_pb2_grpc.GenerationServiceStub]:
    with grpc.insecure_channel(pair.cluster.target) as channel:
        yield generation_pb2_grpc.GenerationServiceStub(channel)


# Stop strings.


@pytest.fixture(scope="module")
def free(pair: Case) -> Completion:
    """An answer that nothing stops."""
    return pair.cluster.client().generate(PROMPT, sampling=FREE)


@pytest.mark.parametrize("include_stop", [False, True])
@pytest.mark.parametrize("cluster", ["pair", "tight"])
def test_a_stop_string_across_three_tokens(
    pair: Case, tight: Case, free: Completion, include_stop: bool, cluster: str
) -> None:
    """What the stream has told is never taken back, and the answer ends with the token that completes the stop."""
    case = {"pair": pair, "tight": tight}[cluster]
    stop, count = across_tokens(pair.reference, free.token_ids)[0]
    others = ("never to be seen in this text", stop + " nor this")
    asked = replace(FREE, stop=(*others, stop), include_stop=include_stop)
    whole = pair.reference.text(free.token_ids)
    expected = whole[: whole.find(stop) + (len(stop) if include_stop else 0)]
    stream = case.cluster.client().stream(PROMPT, sampling=asked)
    told, ids = "", list[int]()
    for event in stream:
        told += event.text
        ids += event.token_ids
        assert expected.startswith(told)
    assert told == expected and tuple(ids) == free.token_ids[:count]
    completion = stream.completion
    assert completion is not None
    assert (completion.text, completion.token_ids) == (expected, tuple(ids))
    assert (completion.finish_reason, completion.choices[0].matched_stop) == (FinishReason.STOP, stop)
    assert completion.usage.completion_tokens == count


def test_a_stop_string_ends_one_choice_and_not_the_others(pair: Case) -> None:
    client = pair.cluster.client()
    free = client.generate(PROMPT, sampling=replace(FREE, n=3))
    stop, count = across_tokens(pair.reference, free.choices[1].token_ids)[-1]
    stopped = client.generate(PROMPT, sampling=replace(FREE, n=3, stop=(stop,)))
    assert stopped.choices[1].token_ids == free.choices[1].token_ids[:count]
    for one, other in zip(stopped.choices, free.choices, strict=True):
        text = pair.reference.text(other.token_ids)
        assert one.text == text.partition(stop)[0]
        assert one.token_ids == other.token_ids[: len(one.token_ids)]
        assert one.finish_reason is (FinishReason.STOP if stop in text else FinishReason.LENGTH)
    assert stopped.usage.completion_tokens == sum(len(choice.token_ids) for choice in stopped.choices)


def test_min_tokens_holds_for_stop_strings_too(pair: Case, free: Completion) -> None:
    stop, count = across_tokens(pair.reference, free.token_ids)[0]
    answer = pair.cluster.client().generate(PROMPT, sampling=replace(FREE, stop=(stop,), min_tokens=count))
    assert answer.token_ids[: count + 1] == free.token_ids[: count + 1], "it was complete before it could end anything"


# Forms.


def assert_fits(asked: dict[str, Any], text: str) -> None:
    for kind, value in asked.items():
        match kind:
            case "json_schema":
                jsonschema.validate(json.loads(text), value, format_checker=jsonschema.FormatChecker())
            case "json_object":
                assert isinstance(json.loads(text), dict)
            case "regex":
                assert re.fullmatch(value, text)
            case "choice":
                assert text in value


NUMBERS = 'start: "(" sum ")"\nsum: NUMBER ("+" NUMBER){0,3}\nNUMBER: /[1-9][0-9]{0,2}/'


def test_answers_keep_their_forms(pair: Case, tight: Case) -> None:
    """A dozen of schemas and every other form, all at once; on other ranks, in other chunks, the same answers."""
    random = Random(7)
    forms: list[dict[str, Any]] = [{"json_schema": random_schema(random)} for _ in range(12)]
    forms += [{"regex": "[a-f]{3,9}(-[0-9]{2}){0,2}"}, {"choice": ("yes", "no", "日本")}, {"grammar": NUMBERS}]
    inputs = [{"prompt": PROMPT, "seed": seed, **form} for seed, form in enumerate(forms)]
    answers = list(pair.cluster.client().map(inputs, sampling=BOUND))
    for form, answer in zip(forms, answers, strict=True):
        assert answer.finish_reason is FinishReason.STOP, (form, answer.text)
        assert_fits(form, answer.text)
    assert re.fullmatch(r"\([1-9]\d{0,2}(\+[1-9]\d{0,2}){0,3}\)", answers[-1].text)
    others = list(tight.cluster.client().map(inputs, sampling=BOUND))
    assert [answer.token_ids for answer in others] == [answer.token_ids for answer in answers]


class Goose(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    name: str = pydantic.Field(max_length=5)
    age: int = pydantic.Field(ge=0, le=30)
    tags: list[bool] = pydantic.Field(max_length=2)


def test_an_answer_as_an_object(pair: Case) -> None:
    answer = pair.cluster.client().generate(PROMPT, response_model=Goose, max_tokens=200, seed=3, n=2)
    assert all(isinstance(goose, Goose) and 0 <= goose.age <= 30 for goose in answer.objects)
    assert json.loads(answer.text)["name"] == answer.parsed.name


# Prompts.

MESSAGES = [{"role": "system", "content": "Fly."}, {"role": "user", "content": "Where to?"}]
TOOLS = [{"type": "function", "function": {"name": "fly", "parameters": {"type": "object", "properties": {}}}}]
CALLED = {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "type": "function"}]}
CALLED["tool_calls"][0]["function"] = {"name": "fly", "arguments": '{"to": "south"}'}  # type: ignore[index]


def chat_ids(reference: Reference, messages: list[Any], tools: list[Any] | None, **arguments: Any) -> list[int]:
    """transformers' own, by the same template. A call's arguments are an object there."""
    told = json.loads(json.dumps(messages))
    for call in (call for message in told for call in message.get("tool_calls", ())):
        call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    arguments = {"add_generation_prompt": True, **arguments}
    return list(reference.tokenizer.apply_chat_template(told, tools=tools, return_dict=True, **arguments)["input_ids"])


@pytest.mark.parametrize(
    ("messages", "tools", "arguments"),
    [
        (MESSAGES, None, {}),
        (MESSAGES, TOOLS, {}),
        ([*MESSAGES, CALLED, {"role": "tool", "content": "Done.", "tool_call_id": "1"}], TOOLS, {}),
        ([*MESSAGES, {"role": "assistant", "content": "South"}], None, {"add_generation_prompt": False}),
    ],
    ids=["system", "tools", "calls", "arguments"],
)
def test_a_conversation_is_what_the_template_makes_of_it(
    pair: Case,
    generation: generation_pb2_grpc.GenerationServiceStub,
    messages: list[Any],
    tools: list[Any] | None,
    arguments: dict[str, Any],
) -> None:
    """One begin token, the template's; the answer is that to transformers' ids of the conversation."""
    expected = chat_ids(pair.reference, messages, tools, **arguments)
    assert expected.count(pair.reference.tokenizer.bos_token_id) == 1
    extra: dict[str, Any] = {"tools": tools} if tools else {}
    completion = pair.cluster.client().generate(messages=messages, sampling=PLAIN, template_args=arguments, **extra)
    assert_drawn(pair.reference, expected, PLAIN, completion)


@pytest.mark.parametrize("text", ["Geese fly so.", " é 敏捷的 \n\t", "<|begin_of_text|>twice", "a" * 300])
def test_tokenize_and_detokenize_are_the_tokenizer(
    pair: Case, generation: generation_pb2_grpc.GenerationServiceStub, text: str
) -> None:
    answer = generation.Tokenize(generation_pb2.TokenizeRequest(text=text))
    assert tuple(answer.token_ids) == pair.reference.ids(text)
    assert answer.max_context == 512
    back = generation.Detokenize(generation_pb2.DetokenizeRequest(token_ids=answer.token_ids)).text
    assert back == pair.reference.text(answer.token_ids)


def test_a_conversation_is_tokenized_as_it_is_answered(
    pair: Case, generation: generation_pb2_grpc.GenerationServiceStub
) -> None:
    messages = [generation_pb2.ChatMessage(role=one["role"], content=one["content"]) for one in MESSAGES]
    request = generation_pb2.TokenizeRequest(chat=generation_pb2.ChatPrompt(messages=messages))
    assert list(generation.Tokenize(request).token_ids) == chat_ids(pair.reference, MESSAGES, None)


# Many at once.


def test_a_map_answers_in_order_and_errors_stand_in_their_place(pair: Case) -> None:
    client = pair.cluster.client()
    inputs: list[Any] = [{"prompt": f"{PROMPT} {number}", "max_tokens": 40 - 3 * number} for number in range(12)]
    inputs[5] = {"prompt": PROMPT, "max_tokens": 100_000, "request_id": "too-long"}
    found = list(client.map(iter(inputs), concurrency=4, return_exceptions=True, temperature=0.0, ignore_eos=True))
    for number, answer in enumerate(found):
        if number == 5:
            assert isinstance(answer, InvalidRequestError)
            assert answer.request_id == "too-long" and "too-long" in str(answer)
            continue
        assert isinstance(answer, Completion)
        assert answer.token_ids == pair.reference.greedy(f"{PROMPT} {number}", 40 - 3 * number).ids


def test_a_lower_priority_goes_first(tight: Case) -> None:
    """Each takes every slot, so one runs at a time; those that wait go by priority, then by arrival."""
    cluster, client = tight.cluster, tight.cluster.client()
    every_slot = replace(PLAIN, n=7, max_tokens=300)
    priorities = [3, -1, 0, -1, 2]
    started: list[int] = []

    def ask(number: int) -> None:
        with client.stream(PROMPT, sampling=every_slot, priority=priorities[number]) as stream:
            next(stream)
            started.append(number)  # the next cannot start before this stream is closed

    with ThreadPoolExecutor(len(priorities)) as pool:
        with client.stream(PROMPT, sampling=every_slot) as first:
            next(first)
            asked = []
            for number in range(len(priorities)):
                asked.append(pool.submit(ask, number))
                cluster.wait(partial(waits, number + 1), "the request to wait")
            assert not started
        for one in asked:
            one.result()
    assert started == [1, 3, 2, 4, 0]


def waits(count: int, now: Cluster) -> bool:
    return now.queued == count
