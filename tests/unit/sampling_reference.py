"""One row's id as the rules say it, in plain Python and numpy float64: what the vectorised sampler is compared with.

The order is vLLM's. The noise is splitmix64 written out again, so a row's draw can be told from its own parameters.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from echelon.internal.link import Sampling

Scores = npt.NDArray[np.float64]

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


def choose(
    logits: Scores,
    ids: Sequence[int],
    prompt_tokens: int,
    sampling: Sampling,
    choice: int = 0,
    allowed: Collection[int] | None = None,
) -> int:
    """The id after `ids`, of which those from prompt_tokens on are generated; allowed: by a constraint, or None."""
    scores = ruled(logits, ids, prompt_tokens, sampling, allowed)
    if sampling.temperature == 0:
        return int(scores.argmax())  # the lowest among equals
    scores = scores / sampling.temperature
    probabilities = _softmax(scores)
    scores = np.where(probabilities >= sampling.min_p * probabilities.max(), scores, -np.inf)
    order = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    kept = [token for token in order[: sampling.top_k or None] if scores[token] > -np.inf]
    masses = _softmax(scores[kept])
    kept = [token for place, token in enumerate(kept) if masses[:place].sum() < sampling.top_p]
    return max(kept, key=lambda token: scores[token] + gumbel(sampling.seed, choice, len(ids), token))


def ruled(
    logits: Scores,
    ids: Sequence[int],
    prompt_tokens: int,
    sampling: Sampling,
    allowed: Collection[int] | None = None,
) -> Scores:
    """The scores after every rule that comes before the temperature."""
    generated = list(ids[prompt_tokens:])
    scores = logits.copy()
    if allowed is not None:
        scores[[token for token in range(len(scores)) if token not in allowed]] = -np.inf
    words = [list(word) for word in sampling.bad_words]
    scores = _without(scores, {word[-1] for word in words if generated[len(generated) - len(word) + 1 :] == word[:-1]})
    if len(generated) < sampling.min_tokens:
        scores = _without(scores, set(sampling.stop_token_ids))
    for token, bias in sampling.logit_bias:
        scores[token] += bias
    for token in set(ids):
        repetition = sampling.repetition_penalty
        scores[token] = scores[token] / repetition if scores[token] > 0 else scores[token] * repetition
    for token in set(generated):
        scores[token] -= sampling.frequency_penalty * generated.count(token)
        scores[token] -= sampling.presence_penalty
    return scores


def gumbel(seed: int, choice: int, position: int, token: int) -> float:
    """Minus the logarithm of an exponential: element `token` of the stream that (seed, choice, position) begins."""
    key = 0
    for part in (seed, choice, position):
        key = _mix((key ^ part) + _GOLDEN)
    bits = _mix(key + (token + 1) * _GOLDEN)
    return -math.log(-math.log(((bits >> 12) + 0.5) / 2**52))


def _mix(value: int) -> int:
    value &= _MASK
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


def _without(scores: Scores, tokens: set[int]) -> Scores:
    """A ban that would leave nothing to draw is not applied."""
    banned = scores.copy()
    banned[list(tokens)] = -np.inf
    return banned if (banned > -np.inf).any() else scores


def _softmax(scores: Scores) -> Scores:
    weights: Scores = np.exp(scores - scores.max())
    shares: Scores = weights / weights.sum()
    return shares
