"""Rotary frequencies: bit for bit those of transformers, for every way to stretch them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import DeepseekV2Config, Gemma3TextConfig, LlamaConfig, Phi3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2RotaryEmbedding, apply_rotary_emb
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding, apply_rotary_pos_emb

from models.config import read_model_config
from models.families import FULL, SLIDING
from models.layers import RotaryEmbedding, Rotation, rotary_frequencies
from models.registry import build_model
from models.rope import Rope
from parallel.context import solo_context
from tests.tiny import LLAMA3_ROPE, YARN_ROPE, make_checkpoint

QWEN_YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768}
TABLES: dict[str, dict[str, object]] = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.3},
    "llama3": {**LLAMA3_ROPE, "original_max_position_embeddings": 8192},
    "yarn-short": dict(YARN_ROPE),
    "yarn": dict(QWEN_YARN),
    "yarn-betas": {**QWEN_YARN, "beta_fast": 16.0, "beta_slow": 4.0},
    "yarn-untruncated": {**QWEN_YARN, "truncate": False},
    "yarn-attention-factor": {**QWEN_YARN, "attention_factor": 0.75},
    "yarn-two-scales": {**QWEN_YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
    "yarn-one-scale": {**QWEN_YARN, "mscale": 0.7},
    "yarn-no-scale": {**QWEN_YARN, "mscale": 0.7, "mscale_all_dim": 0},
    "yarn-no-ramp": {**QWEN_YARN, "factor": 1.0, "beta_fast": 1.0, "truncate": False},
    "yarn-of-the-model's-context": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0},
}


POSITIONS = torch.tensor([0, 1, 77, 40_000, 131_071])


@pytest.mark.parametrize("head_dim", [10, 128])
@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_rotations_equal_transformers(tmp_path: Path, table: dict[str, object], head_dim: int) -> None:
    make_checkpoint(tmp_path, head_dim=head_dim, rope_parameters=table, max_position_embeddings=131072)
    rope = read_model_config(tmp_path).layers[0].rope
    theirs = LlamaRotaryEmbedding(LlamaConfig(**json.loads((tmp_path / "config.json").read_text())))
    frequencies = rotary_frequencies(head_dim, rope)
    assert torch.equal(frequencies, theirs.inv_freq)
    assert_same(rope, head_dim, POSITIONS, *theirs(torch.empty(0, dtype=torch.float64), POSITIONS[None]))


def assert_same(rope: Rope, head_dim: int, positions: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """The rotation of these positions has transformers' cosines and sines, [1, T, rotary_dim], bit for bit."""
    rotary = RotaryEmbedding(rotary_frequencies(head_dim, rope), rope.attention_factor)
    rotation = rotary(positions, torch.float64)
    assert torch.equal(rotation.cos.squeeze(1), cos[0]) and torch.equal(rotation.sin.squeeze(1), sin[0])


@pytest.mark.parametrize("given", [{}, {"factor": 2.0}, {"factor": 0.5}, {"attention_factor": 1.3}], ids=str)
@pytest.mark.parametrize("partial", [0.75, 1.0])
@pytest.mark.parametrize("max_context", [64, 512])
def test_longrope_equals_transformers_at_the_context_that_is_served(
    tmp_path: Path, given: dict[str, object], partial: float, max_context: int
) -> None:
    pairs = round(8 * partial)
    table: dict[str, object] = {
        "rope_type": "longrope",
        "rope_theta": 5e3,
        "short_factor": [1 + 0.1 * pair for pair in range(pairs)],
        "long_factor": [1 + 2.5 * pair for pair in range(pairs)],
        "partial_rotary_factor": partial,
        **given,
    }
    make_checkpoint(tmp_path, "phi3", rope_parameters=table, original_max_position_embeddings=64)
    theirs = Phi3RotaryEmbedding(Phi3Config(**json.loads((tmp_path / "config.json").read_text())))
    positions = torch.arange(max_context)
    expected = theirs(torch.empty(0, dtype=torch.float64), positions[None])
    assert_same(read_model_config(tmp_path, max_context).layers[0].rope, 16, positions, *expected)


def test_a_rotation_turns_the_first_numbers_of_a_head_alone() -> None:
    cos, sin = (torch.rand(3, 1, 4, dtype=torch.float64) for _ in range(2))
    query, key = (torch.rand(3, 2, 10, dtype=torch.float64) for _ in range(2))
    theirs = apply_rotary_pos_emb(query, key, cos.squeeze(1), sin.squeeze(1))
    assert torch.equal(Rotation(cos, sin)(query), theirs[0]) and torch.equal(theirs[0][..., 4:], query[..., 4:])


def test_pairs_of_neighbours_come_apart_as_they_turn() -> None:
    cos, sin = (torch.rand(3, 1, 2, dtype=torch.float64).repeat(1, 1, 2) for _ in range(2))
    query, key = (torch.rand(3, 2, 4, dtype=torch.float64) for _ in range(2))
    theirs = apply_rotary_pos_emb_interleave(query, key, cos.squeeze(1), sin.squeeze(1))
    rotation = Rotation(cos, sin, interleaved=True)
    assert torch.equal(rotation(query), theirs[0]) and torch.equal(rotation(key), theirs[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_deepseek_v2_turns_in_float32_whatever_the_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    make_checkpoint(tmp_path, "deepseek-v2", rope_parameters=YARN_ROPE | {"mscale": 1.0, "mscale_all_dim": 0.7})
    theirs = DeepseekV2RotaryEmbedding(DeepseekV2Config(**json.loads((tmp_path / "config.json").read_text())))
    model = build_model(read_model_config(tmp_path), solo_context(torch.device("cpu"), dtype))
    (rotation,) = model.rotations(POSITIONS, dtype).values()
    query = torch.rand(len(POSITIONS), 4, 6, dtype=torch.float64).to(dtype)
    expected, _ = apply_rotary_emb(
        query.transpose(0, 1)[None], query.transpose(0, 1)[None], theirs(query, POSITIONS[None])
    )
    apart = expected[0].transpose(0, 1).unflatten(-1, (3, 2)).mT.flatten(-2)
    assert rotation(query).dtype == dtype
    torch.testing.assert_close(rotation(query), apart, rtol=0, atol=2e-7 if dtype is torch.float64 else 2**-8)


@pytest.mark.parametrize("old_keys", [False, True])
def test_gemma_3_has_one_for_each_kind_of_layer(tmp_path: Path, old_keys: bool) -> None:
    scaling = {"rope_type": "linear", "factor": 3.0}
    new: dict[str, object] = {"rope_parameters": {FULL: scaling | {"rope_theta": 7e5}, SLIDING: {"rope_theta": 3e3}}}
    old = {"rope_parameters": None, "rope_theta": 7e5, "rope_local_base_freq": 3e3, "rope_scaling": scaling}
    make_checkpoint(tmp_path, "gemma3", **(old if old_keys else new))
    theirs = Gemma3RotaryEmbedding(Gemma3TextConfig(**json.loads((tmp_path / "config.json").read_text())))
    for kind, layer in zip((SLIDING, FULL), read_model_config(tmp_path).layers, strict=True):
        assert_same(layer.rope, 16, POSITIONS, *theirs(torch.empty(0, dtype=torch.float64), POSITIONS[None], kind))


def test_an_original_context_outside_the_table_counts_first(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, rope_parameters=YARN_ROPE, original_max_position_embeddings=32)
    theirs = LlamaRotaryEmbedding(LlamaConfig(**json.loads((tmp_path / "config.json").read_text())))
    assert torch.equal(rotary_frequencies(16, read_model_config(tmp_path).layers[0].rope), theirs.inv_freq)
