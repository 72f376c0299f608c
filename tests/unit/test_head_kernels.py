"""Norms, rotations and the store of keys and values in one launch: what the layers make and keep, step by step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernel_device import DEVICE

# isort: split
# Not without Triton: this file is skipped before.
from models.attention import Places
from models.attention_rule import AttentionRule
from models.kernels.heads import place_heads, place_latent
from models.latent import LatentAttention
from models.latent_attention import LatentSelfAttention, Queries
from models.layers import RMSNorm, Rotation, SelfAttention
from parallel import kernels
from parallel.comm import Group
from parallel.tensor import ColumnLinear, RowLinear

TOKENS, SLOTS = 5, [7, 0, 3, 4, 11]
RULE = AttentionRule(None, 1.0, None)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).half().to(DEVICE)


def rotation(turning: int, wide: torch.dtype, interleaved: bool) -> Rotation:
    angles = torch.rand(TOKENS, 1, turning, generator=torch.Generator().manual_seed(2)) * 6
    return Rotation(angles.cos().to(DEVICE, wide), angles.sin().to(DEVICE, wide), interleaved)


def places(kv_heads: int, key_dim: int, value_dim: int | None) -> Places:
    """Three blocks of four tokens, that hold what must stay."""
    shape = 3, 4, kv_heads
    values = None if value_dim is None else random(*shape, value_dim, seed=4)
    return Places(random(*shape, key_dim, seed=3), values, torch.tensor(SLOTS, device=DEVICE))


def attention(head_counts: list[int], dim: int, norms: bool, from_one: bool) -> SelfAttention:
    nothing = random(1, 1)
    query_norm, key_norm = (RMSNorm(random(dim, seed=seed), 1e-6, from_one) if norms else None for seed in (5, 6))
    output = RowLinear(nothing, None, Group())
    return SelfAttention(0, RULE, dim, head_counts, ColumnLinear(nothing), query_norm, key_norm, output)


@pytest.fixture(autouse=True)
def plain_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels are compared with."""
    monkeypatch.setattr(kernels, "can_run", lambda device: False)


@pytest.mark.parametrize("wide", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("norms", ["none", "plain", "from-one"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "turning", "interleaved"),
    [(4, 2, 16, 16, False), (20, 10, 12, 8, False), (3, 1, 10, 6, True), (9, 3, 6, 6, True)],
)
def test_heads_are_the_layers_and_stored(
    heads: int, kv_heads: int, dim: int, turning: int, interleaved: bool, norms: str, wide: torch.dtype
) -> None:
    layer = attention([heads, kv_heads, kv_heads], dim, norms != "none", norms == "from-one")
    given, turn = 3 * random(TOKENS, heads + 2 * kv_heads, dim), rotation(turning, wide, interleaved)
    expected, found = places(kv_heads, dim, dim), places(kv_heads, dim, dim)
    query = layer.placed(given, turn, expected)
    made = place_heads(given, layer.query_norm, layer.key_norm, turn, found)
    exactly = norms == "none" and wide == torch.float16
    close = 0 if exactly else 2e-3
    torch.testing.assert_close(made, query, rtol=close, atol=close)
    torch.testing.assert_close(found.keys, expected.keys, rtol=close, atol=close)
    assert found.values is not None and expected.values is not None and torch.equal(found.values, expected.values)


@pytest.mark.parametrize("wide", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("heads", "rank", "plain_dim", "turning"), [(3, 24, 5, 6), (17, 20, 8, 16)])
def test_a_latent_is_the_layers_and_stored(
    heads: int, rank: int, plain_dim: int, turning: int, interleaved: bool, wide: torch.dtype
) -> None:
    one, norm = random(1, 1), RMSNorm(random(rank, seed=5), 1e-6, False)
    nothing, output = ColumnLinear(one), RowLinear(one, None, Group())
    shape = LatentAttention(None, rank, plain_dim, turning, 4)
    layer = LatentSelfAttention(0, RULE, shape, Queries(None, None, nothing), nothing, norm, one, output)
    query, given = random(TOKENS, heads, plain_dim + turning), 3 * random(TOKENS, rank + turning, seed=1)
    turn, expected, found = rotation(turning, wide, interleaved), *(places(1, rank + turning, None) for _ in range(2))
    turned = layer.placed(query, given, turn, expected)
    torch.testing.assert_close(place_latent(query, given, norm, turn, found), turned, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(found.keys, expected.keys, rtol=2e-3, atol=2e-3)


def test_no_tokens_are_stored_nowhere() -> None:
    layer, found = attention([2, 1, 1], 8, True, False), places(1, 8, 8)
    turn = Rotation(random(0, 1, 8), random(0, 1, 8))
    none = Places(found.keys, found.values, torch.zeros(0, dtype=torch.int64, device=DEVICE))
    assert place_heads(random(0, 4, 8), layer.query_norm, layer.key_norm, turn, none).shape == (0, 2, 8)
    assert place_latent(random(0, 3, 12), random(0, 16), RMSNorm(random(8), 1e-6, False), turn, none).shape == (0, 3, 8)
