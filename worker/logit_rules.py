"""Rules that change a row's scores before an id is chosen, over the rows that ask for them: kernels alone.

On every rank's device, inside the sampler, in the order of vLLM's: constraint, bad words, min_tokens, logit_bias,
penalties. Whatever looks back reads the history, so a row is judged alike after a replay, a preemption or a cached
prefix; every operation works row by row. Scores are float64 [rows, vocabulary], `rows` of a rule are rows of these.
Nothing here waits for the device or knows slots' rules on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# What may be changed is the argument itself: only the result is used.
Rule = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Lookback:
    """Where the ids of some rows lie: history [slots, positions] int32; slots, positions and prompt_tokens [rows].

    A row's ids are those before its position; from prompt_tokens on they are generated ones.
    """

    history: Tensor
    slots: Tensor
    positions: Tensor
    prompt_tokens: Tensor


@dataclass(frozen=True, slots=True)
class Allowed:
    """Tokens that a constraint allows next: bits [rows, words] int32, bit t % 32 of word t // 32 for token t."""

    rows: Tensor
    bits: Tensor

    def __call__(self, scores: Tensor) -> Tensor:
        places = torch.arange(32, dtype=torch.int32, device=scores.device)
        allowed = (self.bits[:, :, None] >> places).bitwise_and_(1).flatten(1)[:, : scores.shape[1]]
        scores[self.rows] = scores[self.rows].masked_fill_(allowed == 0, -torch.inf)
        return scores


@dataclass(frozen=True, slots=True)
class Banned:
    """Token ids that rows must not draw yet, [pairs] each: stop ids before min_tokens."""

    rows: Tensor
    ids: Tensor

    def __call__(self, scores: Tensor) -> Tensor:
        return _ban(scores, self.rows, self.ids, torch.ones_like(self.ids, dtype=torch.bool))


@dataclass(frozen=True, slots=True)
class BadWords:
    """Words that must not be generated, [words] each: the last id is banned where the ids before it are a word's own.

    heads [words, longest] int64: a word's ids but its last, padded with -1 in front.
    """

    rows: Tensor
    heads: Tensor
    last_ids: Tensor
    lookback: Lookback

    def __call__(self, scores: Tensor) -> Tensor:
        lookback, longest = self.lookback, self.heads.shape[1]
        offsets = torch.arange(-longest, 0, device=scores.device)
        positions = lookback.positions[self.rows, None] + offsets
        generated = positions >= lookback.prompt_tokens[self.rows, None]
        ids = lookback.history[lookback.slots[self.rows, None], positions.clamp_(min=0)]
        begun = ((ids == self.heads) & generated) | (self.heads < 0)
        return _ban(scores, self.rows, self.last_ids, begun.all(dim=1))


@dataclass(frozen=True, slots=True)
class Biased:
    """What is added to the scores of some tokens, [pairs] each; a row names no token twice."""

    rows: Tensor
    ids: Tensor
    biases: Tensor

    def __call__(self, scores: Tensor) -> Tensor:
        return scores.index_put_((self.rows, self.ids), self.biases, accumulate=True)


@dataclass(frozen=True, slots=True)
class Penalties:
    """repetition [rows]: divides positive scores of every token of the prompt and the answer, multiplies the others.

    frequency and presence [rows] are taken off generated tokens, for each time and once (Keskar et al. 2019, section
    4.1; OpenAI's API reference). longest: the most ids that a row looks back on.
    """

    rows: Tensor
    repetition: Tensor
    frequency: Tensor
    presence: Tensor
    longest: int
    lookback: Lookback

    def __call__(self, scores: Tensor) -> Tensor:
        vocabulary, device = scores.shape[1], scores.device
        lookback, rows = self.lookback, self.rows
        places = torch.arange(self.longest, device=device)
        ids = lookback.history[lookback.slots[rows], : self.longest].long()
        before = places < lookback.positions[rows, None]
        generated = before & (places >= lookback.prompt_tokens[rows, None])
        # One more column takes what does not count. Whole numbers: their sums are the same in any order.
        counts = torch.zeros(len(rows), vocabulary + 1, dtype=torch.int32, device=device)
        counts.scatter_add_(1, ids.where(generated, vocabulary), generated.int())
        counts = counts[:, :vocabulary]
        seen = torch.zeros(len(rows), vocabulary + 1, dtype=torch.bool, device=device)
        seen = seen.scatter_(1, ids.where(before, vocabulary), True)[:, :vocabulary]
        chosen, repetition = scores[rows], self.repetition[:, None]
        chosen = chosen.where(~seen, torch.where(chosen > 0, chosen / repetition, chosen * repetition))
        chosen -= self.frequency[:, None] * counts
        chosen -= self.presence[:, None] * (counts > 0)
        scores[rows] = chosen
        return scores


def _ban(scores: Tensor, rows: Tensor, ids: Tensor, applies: Tensor) -> Tensor:
    """Pairs of row and id lose all chance where the ban applies, unless that would leave a row nothing to draw."""
    # Counted, not written: a pair may be named twice, once where the ban applies and once where it does not.
    bans = torch.zeros_like(scores, dtype=torch.int32).index_put_((rows, ids), applies.int(), accumulate=True)
    banned = scores.masked_fill(bans > 0, -torch.inf)
    return torch.where(banned.amax(dim=1, keepdim=True) > -torch.inf, banned, scores)
