"""A request's constraint to the grammar that ranks follow, checked against the model's own vocabulary.

In the coordinator's front end, off its event loop. The vocabulary is read when the first constraint comes: most models
are served without one. Knows no request.
"""

from __future__ import annotations

import threading
from functools import cached_property
from pathlib import Path
from typing import cast

from llguidance import LLTokenizer

from coordinator.model_facts import ModelFacts
from echelon.errors import ConfigError, InvalidRequestError
from echelon.sampling import Constraint
from models.constraints import Kind, check, compile_constraint, constraint_tokenizer

MAX_CHARACTERS = 100_000


class Grammars:
    """Constraints of one model. Safe to use from several threads at once."""

    def __init__(self, directory: Path, facts: ModelFacts) -> None:
        self._directory = directory
        self._facts = facts
        self._reading = threading.Lock()

    def settle(self, constraint: Constraint) -> str:
        """llguidance's own form of it. Raises InvalidRequestError naming the field and the place."""
        kind, field = constraint.kind, f"sampling.{constraint.kind}"
        if not self._facts.end_ids:
            raise InvalidRequestError(f"{kind} needs a model that has an end token", field=field)
        if (size := sum(map(len, constraint.texts))) > MAX_CHARACTERS:
            raise InvalidRequestError(f"{kind} has {size} characters, over the limit of {MAX_CHARACTERS}", field=field)
        try:
            grammar = compile_constraint(cast(Kind, kind), _value(constraint))
        except ValueError as error:
            raise InvalidRequestError(f"{kind} cannot be used: {error}", field=field) from None
        with self._reading:
            try:
                tokenizer = self._tokenizer
            except ConfigError as error:  # of a model that is served without one
                raise InvalidRequestError(f"{kind} cannot be used: {error}", field=field) from None
        if refused := check(tokenizer, grammar):
            raise InvalidRequestError(f"{kind} cannot be used: {refused}", field=field)
        return grammar

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        return constraint_tokenizer(self._directory, self._facts.vocab_size, self._facts.end_ids)


def _value(constraint: Constraint) -> str | bool | tuple[str, ...]:
    match constraint.kind:
        case "json_object":
            return True
        case "choice":
            return constraint.texts
    return constraint.texts[0]
