"""Norms, rotations and gates in one launch each: they round where the layers round."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.kernel_device import DEVICE

# isort: split
# Not without Triton: this file is skipped before.
from models.kernels.rows import add_and_norm, rms_norm, rotate, silu_and_multiply
from models.layers import RMSNorm, Rotation, gated


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).half()


@pytest.mark.parametrize("from_one", [False, True])
@pytest.mark.parametrize("shape", [(1, 8), (5, 24), (3, 4, 20), (0, 8), (2, 1, 130)], ids=str)
def test_a_norm_is_the_layer(shape: tuple[int, ...], from_one: bool) -> None:
    x, weight = 3 * random(*shape), random(shape[-1], seed=1)
    expected = RMSNorm(weight, 1e-6, from_one).plain(x)
    found = rms_norm(x.to(DEVICE), weight.to(DEVICE), 1e-6, from_one)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.cpu(), expected, rtol=2e-3, atol=1e-6)  # the sum's order may turn a last bit


def test_a_norm_takes_parts_of_wider_rows() -> None:
    wide, weight = random(3, 7, 16), random(16, seed=1)
    _, part, _ = wide.split([2, 4, 1], dim=1)
    expected = RMSNorm(weight, 1e-6, False).plain(part)
    found = rms_norm(wide.to(DEVICE)[:, 2:6], weight.to(DEVICE), 1e-6, False)
    torch.testing.assert_close(found.cpu(), expected, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("from_one", [False, True])
@pytest.mark.parametrize("shape", [(1, 8), (5, 130), (0, 8)], ids=str)
def test_a_sum_and_its_norm_are_the_layers(shape: tuple[int, int], from_one: bool) -> None:
    stream, added, weight = 30 * random(*shape), random(*shape, seed=1), random(shape[-1], seed=2)
    expected = RMSNorm(weight, 1e-6, from_one).of_sum(stream, added)
    found = add_and_norm(stream.to(DEVICE), added.to(DEVICE), weight.to(DEVICE), 1e-6, from_one)
    assert torch.equal(found[0].cpu(), expected[0]) and torch.equal(expected[0], stream + added)
    torch.testing.assert_close(found[1].cpu(), expected[1], rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 2), (3, 46), (2, 2060), (0, 8)], ids=str)
def test_a_gate_is_the_activation_times_what_it_lets_through(shape: tuple[int, int]) -> None:
    gate_up = 3 * random(*shape)
    expected = gated(gate_up, F.silu)
    torch.testing.assert_close(silu_and_multiply(gate_up.to(DEVICE)).cpu(), expected, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("wide", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("heads", "head_dim", "turning"), [(1, 8, 8), (3, 20, 12), (4, 10, 6)])
def test_a_rotation_is_the_layer(heads: int, head_dim: int, turning: int, interleaved: bool, wide: torch.dtype) -> None:
    rows = random(5, heads + 2, head_dim)
    angles = torch.rand(5, 1, turning, generator=torch.Generator().manual_seed(2)) * 6
    cos, sin = angles.cos().to(wide), angles.sin().to(wide)
    expected = Rotation(cos, sin, interleaved).plain(rows[:, 1 : 1 + heads])
    found = rotate(rows.to(DEVICE)[:, 1 : 1 + heads], cos.to(DEVICE), sin.to(DEVICE), interleaved)
    torch.testing.assert_close(found.cpu(), expected, rtol=2e-3 if wide == torch.float32 else 0, atol=1e-6)
