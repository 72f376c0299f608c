"""response_model: the schema that is sent, the object that is read, and what is said where the text is none."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel, Field

from echelon import (
    AsyncClient,
    Client,
    Completion,
    InvalidRequestError,
    ParsedCompletion,
    ResponseInvalidError,
    convert,
)
from echelon.sampling import SamplingParams
from echelon.types import Choice, FinishReason
from tests.unit.scripted import ScriptedServer


class City(BaseModel):
    name: str
    people: int = Field(ge=0)


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as scripted:
        yield scripted


def answers(*texts: str, finish: FinishReason = FinishReason.STOP) -> Any:
    def handler(request: Any, context: Any) -> Iterator[Any]:
        choices = tuple(
            Choice(index=index, text=text, token_ids=(1, 2, 3), finish_reason=finish)
            for index, text in enumerate(texts)
        )
        yield convert.stream_to_proto(Completion(request_id=request.request_id, model="tiny", choices=choices))

    return handler


BERLIN, ROME = '{"name": "Berlin", "people": 4}', '{"name": "Rome", "people": 3}'


def test_the_answer_is_asked_for_by_its_schema_and_read(server: ScriptedServer) -> None:
    server.on("StreamGenerate", answers(BERLIN), answers(BERLIN))
    with Client(server.address) as client:
        answer = client.generate("a city", response_model=City, temperature=0.0)

    async def run() -> ParsedCompletion[City]:
        async with AsyncClient(server.address) as client:
            return await client.generate("a city", response_model=City)

    for found in (answer, asyncio.run(run())):
        assert found.parsed == City(name="Berlin", people=4)
        assert found.text == BERLIN and isinstance(found, Completion)
    request = server.requests["StreamGenerate"][0]
    sent = convert.sampling_from_proto(request.sampling)
    assert isinstance(sent.json_schema, str) and json.loads(sent.json_schema) == City.model_json_schema()
    assert sent.temperature == 0.0


def test_every_choice_is_read(server: ScriptedServer) -> None:
    server.on("StreamGenerate", answers(BERLIN, ROME))
    with Client(server.address) as client:
        answer = client.generate("a city", response_model=City, n=2)
    assert [city.name for city in answer.objects] == ["Berlin", "Rome"]
    assert len(answer.choices) == 2


@pytest.mark.parametrize(
    ("text", "finish", "expected"),
    [
        (
            '{"name": "Be',
            FinishReason.LENGTH,
            "^choice 0 is no City: it was cut after 3 tokens; give",
        ),
        ('{"name": "Atlantis", "people": -1}', FinishReason.STOP, "people.*greater than or equal to 0"),
        ("Berlin", FinishReason.STOP, "Invalid JSON"),
    ],
)
def test_what_is_no_such_object_is_told_with_the_answer(
    server: ScriptedServer, text: str, finish: FinishReason, expected: str
) -> None:
    server.on("StreamGenerate", answers(text, finish=finish))
    with Client(server.address) as client, pytest.raises(ResponseInvalidError, match=expected) as caught:
        client.generate("a city", response_model=City, request_id="mine")
    assert caught.value.completion.text == text
    assert (caught.value.request_id, caught.value.reason) == ("mine", "RESPONSE_INVALID")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"response_model": dict}, "response_model must be a pydantic model's class, got <class 'dict'>"),
        ({"response_model": City, "json_schema": "{}"}, "json_schema cannot be combined with response_model"),
        (
            {"response_model": City, "sampling": SamplingParams(json_schema="{}")},
            "json_schema cannot be combined with response_model",
        ),
        ({"response_model": City, "regex": "a"}, "regex cannot be combined with json_schema"),
    ],
)
def test_forms_that_do_not_fit_are_refused_before_anything_is_sent(options: dict[str, Any], expected: str) -> None:
    with Client("localhost:1") as client, pytest.raises(InvalidRequestError, match=expected):
        client.generate("a city", **options)
