"""Noise: the published generator bit for bit, uniforms strictly inside (0, 1), and nothing correlated."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from worker import noise

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def signed(value: int) -> int:
    return (value & MASK) - 2**64 * ((value >> 63) & 1)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def key_whose_first_bits_are(bits: int) -> int:
    """Undoes the finaliser: it is a bijection."""
    value = bits ^ (bits >> 31) ^ (bits >> 62)
    value = value * pow(0x94D049BB133111EB, -1, 2**64) & MASK
    value = value ^ (value >> 27) ^ (value >> 54)
    value = value * pow(0xBF58476D1CE4E5B9, -1, 2**64) & MASK
    value = value ^ (value >> 30) ^ (value >> 60)
    return signed(value - GOLDEN)


def test_a_row_is_the_published_splitmix64_stream() -> None:
    # The first five outputs for seed 1234567, as Rosetta Code and many libraries list them.
    published = (
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    )
    drawn = noise.uniform(ints(1234567), torch.arange(5))
    assert drawn.tolist() == [((bits >> 12) + 0.5) / 2**52 for bits in published]


@pytest.mark.parametrize("bits", [0, MASK])
def test_the_extreme_bits_stay_inside_the_open_interval(bits: int) -> None:
    key = ints(key_whose_first_bits_are(bits))
    drawn = noise.uniform(key, ints(0)).item()
    assert drawn == (2.0**-53 if bits == 0 else 1 - 2.0**-53)
    assert math.isfinite(noise.gumbel(key, ints(0)).item())


def test_noise_of_a_token_does_not_depend_on_the_other_rows_or_tokens() -> None:
    keys = noise.row_keys(ints(3, 5, -7), ints(0, 1, 0), ints(10, 20, 30))
    table = noise.gumbel(keys[:, None], torch.arange(100))
    alone = noise.gumbel(noise.row_keys(ints(5), ints(1), ints(20)), ints(42))
    assert torch.equal(table[1, 42], alone[0])


@pytest.mark.parametrize("argument", ["seed", "choice", "position", "token"])
def test_flipping_one_input_bit_flips_half_of_the_output_bits(argument: str) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randint(-(2**63), 2**63 - 1, (4, 500), generator=generator)
    row = ("seed", "choice", "position", "token").index(argument)

    def bits(values: Tensor) -> Tensor:
        drawn = noise.uniform(noise.row_keys(values[0], values[1], values[2]), values[3] >> 33)
        return (drawn * 2**52).long()

    for bit in (33, 40, 50) if argument == "token" else (0, 1, 17, 40, 63):
        flipped = base.clone()
        flipped[row] ^= signed(1 << bit)
        changed = bits(base) ^ bits(flipped)
        share = sum(((changed >> place) & 1).double().mean().item() for place in range(52)) / 52
        assert share == pytest.approx(0.5, abs=0.02), f"bit {bit} of {argument}"


def test_moments_are_those_of_the_gumbel_distribution() -> None:
    drawn = noise.gumbel(noise.row_keys(ints(11), ints(0), ints(0)), torch.arange(200_000))
    assert drawn.mean().item() == pytest.approx(0.5772156649, abs=0.01)
    assert drawn.var().item() == pytest.approx(math.pi**2 / 6, abs=0.03)


def test_neighbouring_seeds_choices_and_positions_are_uncorrelated() -> None:
    token_ids = torch.arange(50_000)
    base = noise.gumbel(noise.row_keys(ints(1), ints(0), ints(0)), token_ids)
    for seed, choice, position in ((2, 0, 0), (1, 1, 0), (1, 0, 1), (0, 0, 1), (0, 1, 0)):
        other = noise.gumbel(noise.row_keys(ints(seed), ints(choice), ints(position)), token_ids)
        assert abs(torch.corrcoef(torch.stack([base, other]))[0, 1].item()) < 0.02
        assert abs(torch.corrcoef(torch.stack([base[1:], other[:-1]]))[0, 1].item()) < 0.02
