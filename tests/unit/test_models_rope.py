"""Rotary frequencies: bit for bit those of transformers, for every way to stretch them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from models.config import read_model_config
from models.layers import RotaryEmbedding, rotary_frequencies
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
    "yarn-no-ramp": {**QWEN_YARN, "factor": 1.0, "beta_fast": 1.0, "truncate": False},
    "yarn-of-the-model's-context": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0},
}


@pytest.mark.parametrize("head_dim", [10, 128])
@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_rotations_equal_transformers(tmp_path: Path, table: dict[str, object], head_dim: int) -> None:
    make_checkpoint(tmp_path, head_dim=head_dim, rope_parameters=table, max_position_embeddings=131072)
    rope = read_model_config(tmp_path).rope
    theirs = LlamaRotaryEmbedding(LlamaConfig(**json.loads((tmp_path / "config.json").read_text())))
    frequencies = rotary_frequencies(head_dim, rope)
    assert torch.equal(frequencies, theirs.inv_freq)
    positions = torch.tensor([0, 1, 77, 40_000, 131_071])
    rotation = RotaryEmbedding(frequencies, rope.attention_factor)(positions, torch.float64)
    cos, sin = theirs(torch.empty(0, dtype=torch.float64), positions[None])
    assert torch.equal(rotation.cos.squeeze(1), cos[0]) and torch.equal(rotation.sin.squeeze(1), sin[0])


def test_an_original_context_outside_the_table_counts_first(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, rope_parameters=YARN_ROPE, original_max_position_embeddings=32)
    theirs = LlamaRotaryEmbedding(LlamaConfig(**json.loads((tmp_path / "config.json").read_text())))
    assert torch.equal(rotary_frequencies(16, read_model_config(tmp_path).rope), theirs.inv_freq)
