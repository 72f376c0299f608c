"""What the front end must know of the served model, and the checks that need no more than that.

In the coordinator; pure. Knows no tokenizer and no request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from echelon.errors import InvalidRequestError, NotFoundError
from models.config import DefaultSampling, ModelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """What the front end must know of the served model; max_context is what it is served with."""

    name: str
    vocab_size: int
    max_context: int
    end_ids: tuple[int, ...] = ()
    default_sampling: DefaultSampling = field(default_factory=DefaultSampling)

    @classmethod
    def of(cls, name: str, max_context: int, config: ModelConfig) -> ModelFacts:
        return cls(
            name=name,
            vocab_size=config.vocab_size,
            max_context=max_context,
            end_ids=config.end_ids,
            default_sampling=config.default_sampling,
        )


def check_model(model: str, facts: ModelFacts) -> None:
    """Refuses any name but the served one; the empty name stands for it."""
    if model not in ("", facts.name):
        raise NotFoundError(
            f"model {model!r} is not served; leave model empty, or take {facts.name!r}",
            reason="MODEL_NOT_FOUND",
            field="model",
        )


def check_vocabulary(ids: Sequence[int], facts: ModelFacts, name: str) -> None:
    """Refuses ids that the model does not have."""
    if not ids or (min(ids) >= 0 and max(ids) < facts.vocab_size):
        return
    for position, token_id in enumerate(ids):
        if not 0 <= token_id < facts.vocab_size:
            raise InvalidRequestError(
                f"{name}[{position}] = {token_id} is outside the vocabulary of {facts.name!r}, "
                f"which has {facts.vocab_size} ids from 0 to {facts.vocab_size - 1}",
                field=name,
            )
