"""Answers as objects: `generate(response_model=M)` sends M's JSON schema as the answer's form and reads the text by it.

Part of the SDK. M is a pydantic model, or any class with the same two class methods: pydantic itself is never imported
here. Knows no call and no transport.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Generic, Protocol, Self, TypeVar

from echelon.errors import InvalidRequestError, ResponseInvalidError
from echelon.types import Choice, Completion, FinishReason


class ResponseModel(Protocol):
    """What a class must have to be a response_model; pydantic's models do."""

    @classmethod
    def model_json_schema(cls) -> dict[str, Any]:
        """The JSON schema of an object's text."""

    @classmethod
    def model_validate_json(cls, json_data: str) -> Self:
        """The object of a text. Raises ValueError."""


M = TypeVar("M", bound=ResponseModel)


@dataclass(frozen=True, kw_only=True, slots=True)
class ParsedCompletion(Completion, Generic[M]):
    """A completion whose choices were read: objects by choice index, and the first of them at hand."""

    objects: tuple[M, ...]

    @property
    def parsed(self) -> M:
        return self.objects[0]


def json_schema_of(response_model: type[ResponseModel]) -> dict[str, Any]:
    """Its schema. Raises InvalidRequestError for what is no such class."""
    if not all(hasattr(response_model, name) for name in ("model_json_schema", "model_validate_json")):
        message = f"response_model must be a pydantic model's class, got {response_model!r}"
        raise InvalidRequestError(message, field="response_model")
    return response_model.model_json_schema()


def parse(completion: Completion, response_model: type[M]) -> ParsedCompletion[M]:
    """The same completion with its choices read. Raises ResponseInvalidError with what is wrong and the completion."""
    objects = tuple(_read(completion, choice, response_model) for choice in completion.choices)
    values = {field.name: getattr(completion, field.name) for field in fields(Completion)}
    return ParsedCompletion(**values, objects=objects)


def _read(completion: Completion, choice: Choice, response_model: type[M]) -> M:
    try:
        return response_model.model_validate_json(choice.text)
    except ValueError as error:
        name, count = response_model.__name__, len(choice.token_ids)
        if choice.finish_reason is FinishReason.LENGTH:
            reason = f"it was cut after {count} tokens; give a larger max_tokens"
        else:
            reason = "; ".join(str(error).splitlines())
        message = f"choice {choice.index} is no {name}: {reason}"
        raise ResponseInvalidError(message, completion=completion) from error
