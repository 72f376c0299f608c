"""How well a model foretells a text: windows over its tokens, and perplexity, bits per byte and accuracy of them.

Pure arithmetic, for `echelon eval` and for whoever measures the same elsewhere: both must score the same tokens behind
the same ones. It knows no call, no model and no tokenizer.
"""

from __future__ import annotations

import math
import operator
from dataclasses import astuple, dataclass

from echelon.errors import ConfigError

LEAST_WINDOW = 2  # a token to foretell, and one before it


@dataclass(frozen=True, slots=True)
class Window:
    """tokens[first:last] are given to the model, those from `scored` on are scored."""

    first: int
    last: int
    scored: int


@dataclass(frozen=True, slots=True)
class Score:
    """Of some text. scored: tokens of it that were foretold, of text_bytes in UTF-8. nats: the sum of their negative
    log-probabilities. correct: those that the model held for likeliest."""

    documents: int = 0
    text_bytes: int = 0
    scored: int = 0
    nats: float = 0.0
    correct: int = 0

    def __add__(self, other: Score) -> Score:
        return Score(*map(operator.add, astuple(self), astuple(other)))

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.scored

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability of a token; infinite where a float cannot hold it."""
        try:
            return math.exp(self.nats_per_token)
        except OverflowError:
            return math.inf

    @property
    def bits_per_byte(self) -> float:
        """What an arithmetic coder with this model would need, whatever its tokens are: comparable between models."""
        return self.nats / math.log(2) / self.text_bytes

    @property
    def accuracy(self) -> float:
        """The share of tokens that were the likeliest."""
        return self.correct / self.scored


def longest_window(max_context: int) -> int:
    """Tokens of a prompt that leave room for the one that a request generates at least."""
    return max_context - 1


def check_windows(window: int, stride: int, max_context: int) -> None:
    """Raises ConfigError naming the flag."""
    longest = longest_window(max_context)
    if not LEAST_WINDOW <= window <= longest:
        raise ConfigError(
            f"window={window} must be {LEAST_WINDOW} to {longest}: max_context={max_context} less the one token that a "
            "request generates",
            field="window",
        )
    if not 1 <= stride < window:
        raise ConfigError(
            f"stride={stride} must be 1 to {window - 1}: below window={window}, for the first token of a window has "
            "none before it",
            field="stride",
        )


def windows(tokens: int, window: int, stride: int) -> list[Window]:
    """Windows that score every token but the first once. Those behind the first window have window - stride tokens
    before them at least. None for fewer than two tokens."""
    if tokens < LEAST_WINDOW:
        return []
    made = [Window(0, min(window, tokens), 1)]
    while made[-1].last < tokens:
        first = made[-1].first + stride
        made.append(Window(first, min(first + window, tokens), made[-1].last))
    return made
