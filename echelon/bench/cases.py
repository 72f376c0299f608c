"""A case of `echelon bench`, N x I x O: N requests at once, I prompt tokens and O tokens of an answer each.

In the user's terminal, in the planner, and in the ranks that are measured without a coordinator. Pure.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from echelon.errors import ConfigError

_CASE = re.compile(r"(\d+)x(\d+)x(\d+)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Case:
    """requests at once, each with a prompt and an answer of so many tokens."""

    requests: int
    prompt_tokens: int
    output_tokens: int

    @classmethod
    def parse(cls, text: str) -> Case:
        """Raises ConfigError for what is not REQUESTSxPROMPTxOUTPUT."""
        match = _CASE.fullmatch(text.strip().lower())
        numbers = tuple(map(int, match.groups())) if match else ()
        if len(numbers) != 3 or min(numbers) < 1:
            raise ConfigError(
                f"--case must be REQUESTSxPROMPTxOUTPUT, each at least 1, as in 256x1024x256; got {text!r}",
                field="case",
            )
        return cls(numbers[0], numbers[1], numbers[2])

    def __str__(self) -> str:
        return f"{self.requests}x{self.prompt_tokens}x{self.output_tokens}"

    @property
    def tokens(self) -> int:
        """Of a request at its end."""
        return self.prompt_tokens + self.output_tokens

    @property
    def output_count(self) -> int:
        """Of all requests together."""
        return self.requests * self.output_tokens

    def smaller(self, requests: int, output_tokens: int) -> Case:
        """With at most so many requests and output tokens, to warm up by."""
        return Case(min(self.requests, requests), self.prompt_tokens, min(self.output_tokens, output_tokens))

    def check_fits(self, max_context: int) -> None:
        """Raises ConfigError where a request is longer than what will be served."""
        if self.tokens > max_context:
            raise ConfigError(
                f"--case {self}: {self.prompt_tokens} + {self.output_tokens} = {self.tokens} tokens are more than "
                f"max-context {max_context}",
                field="case",
            )


def prompts(case: Case, vocabulary: int, seed: int) -> list[list[int]]:
    """Random ids. Those of two cases or two seeds have no beginning in common, or a prefix cache would answer one."""
    draw = random.Random(f"{case} {seed}")
    return [draw.choices(range(vocabulary), k=case.prompt_tokens) for _ in range(case.requests)]
