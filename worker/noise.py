"""Counter-based Gumbel noise: a pure function of (seed, choice, position, token id) and nothing else.

Runs on every rank's device, inside the sampler. Because there is no generator to advance, the draw of a
token is the same for any batch company, row order, tensor size and after any replay. The uniforms are
integer arithmetic, hence bit-equal on every device; it must not know logits or slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

# splitmix64 (Steele, Lea, Flood 2014), its constants as signed 64-bit; torch's int64 products wrap as needed.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


def row_keys(seed: Tensor, choice: Tensor, position: Tensor) -> Tensor:
    """One int64 key a row, each argument int64 and mixed in turn: equal keys only by a 2^-64 accident."""
    key = _mix(seed + _GOLDEN)
    key = _mix((key ^ choice) + _GOLDEN)
    return _mix((key ^ position) + _GOLDEN)


def gumbel(keys: Tensor, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise in float64; keys and token_ids are int64 and broadcast."""
    return uniform(keys, token_ids).log_().neg_().log_().neg_()


def uniform(keys: Tensor, token_ids: Tensor) -> Tensor:
    """Uniforms in (0, 1), never either end, of `random_bits`."""
    bits = random_bits(keys, token_ids)
    # 52 bits and a half: exact in float64. A 53rd bit would round the largest value up to 1.
    return _shift_right(bits, 12).to(torch.float64).add_(0.5).mul_(2.0**-52)


def random_bits(keys: Tensor, elements: Tensor) -> Tensor:
    """64 of them each: element t of the splitmix64 stream that starts at the key. All int64; both broadcast."""
    return _mix_(keys + (elements + 1) * _GOLDEN)


def _mix(value: Tensor) -> Tensor:
    return _mix_(value.clone())


def _mix_(value: Tensor) -> Tensor:
    """splitmix64's finaliser in place: every input bit flips every output bit with probability near 1/2."""
    value.bitwise_xor_(_shift_right(value, 30)).mul_(_MIX_1)
    value.bitwise_xor_(_shift_right(value, 27)).mul_(_MIX_2)
    return value.bitwise_xor_(_shift_right(value, 31))


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """The logical shift; torch's own copies the sign bit."""
    return (value >> bits).bitwise_and_((1 << (64 - bits)) - 1)
