"""read_model_config: both spellings of transformers, and one clear error for each thing that is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from echelon.errors import ConfigError
from models.config import DefaultSampling, Llama3Scaling, Rope, read_model_config
from tests.tiny import LLAMA3_ROPE, make_checkpoint

LLAMA3_SCALING = Llama3Scaling(8.0, 1.0, 4.0, 64)


def test_reads_what_transformers_5_writes(tmp_path: Path) -> None:
    config = read_model_config(make_checkpoint(tmp_path, rope_parameters=LLAMA3_ROPE, dtype="bfloat16"))
    assert config.architecture == "LlamaForCausalLM"
    assert config.rope == Rope(10_000.0, LLAMA3_SCALING)
    assert config.dtype == "bfloat16"
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 16)


def test_reads_what_transformers_4_wrote(tmp_path: Path) -> None:
    scaling = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    old: dict[str, Any] = {"rope_parameters": None, "rope_theta": 500_000.0, "rope_scaling": scaling, "dtype": None}
    config = read_model_config(make_checkpoint(tmp_path, **old, torch_dtype="float16"))
    assert config.rope == Rope(500_000.0, LLAMA3_SCALING)
    assert config.dtype == "float16"


def test_absent_keys_take_the_family_defaults(tmp_path: Path) -> None:
    config = read_model_config(
        make_checkpoint(tmp_path, head_dim=None, num_key_value_heads=None, rope_parameters=None, rms_norm_eps=None)
    )
    assert config.head_dim == 64 // 4
    assert config.num_key_value_heads == config.num_attention_heads
    assert config.rope == Rope(10_000.0)
    assert config.rms_norm_eps == 1e-6


def test_qwen3_heads_are_128_wide_unless_said_otherwise(tmp_path: Path) -> None:
    assert read_model_config(make_checkpoint(tmp_path, "qwen3", head_dim=None)).head_dim == 128


def test_end_ids_come_from_the_generation_config_first(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, eos_token_id=[5, 6])
    generation = tmp_path / "generation_config.json"
    generation.write_text('{"eos_token_id": [7, 8]}')
    assert read_model_config(tmp_path).end_ids == (7, 8)
    generation.write_text('{"eos_token_id": 9}')
    assert read_model_config(tmp_path).end_ids == (9,)
    generation.unlink()
    assert read_model_config(tmp_path).end_ids == (5, 6)


def test_default_sampling_applies_only_if_the_model_asks_to_sample(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    sampling = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
    generation = tmp_path / "generation_config.json"
    generation.write_text(json.dumps(sampling | {"do_sample": True}))
    assert read_model_config(tmp_path).default_sampling == DefaultSampling(0.6, 0.95, 20)
    generation.write_text(json.dumps(sampling))
    assert read_model_config(tmp_path).default_sampling == DefaultSampling()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, ["GemmaForCausalLM", "LlamaForCausalLM", "Qwen3ForCausalLM"]),
        ({"architectures": None}, ["architectures", "LlamaForCausalLM"]),
        ({"hidden_size": None}, ["hidden_size", "missing"]),
        ({"vocab_size": "many"}, ["vocab_size", "'many'"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers", "0"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads=3", "num_attention_heads=4"]),
        ({"head_dim": 15}, ["head_dim=15", "odd"]),
        ({"hidden_act": "gelu"}, ["hidden_act='gelu'", "silu"]),
        ({"mlp_bias": True}, ["mlp_bias"]),
        ({"use_sliding_window": True}, ["use_sliding_window"]),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, ["yarn", "default, llama3"]),
        ({"rope_parameters": {**LLAMA3_ROPE, "factor": None}}, ["rope_parameters.factor", "None"]),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, ["partial_rotary_factor"]),
        ({"rms_norm_eps": -1.0}, ["rms_norm_eps", "-1.0"]),
        ({"tie_word_embeddings": 1}, ["tie_word_embeddings", "true or false"]),
        ({"eos_token_id": "end"}, ["eos_token_id", "'end'"]),
        ({"dtype": "int8"}, ["int8", "bfloat16"]),
    ],
)
def test_refuses_with_file_and_key(tmp_path: Path, overrides: dict[str, object], words: list[str]) -> None:
    make_checkpoint(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    config = json.loads((tmp_path / "config.json").read_text()) | overrides
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError) as caught:
        read_model_config(tmp_path)
    for word in ["config.json", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize("content", ["{", "[]", b"\xff\xfe"])
def test_refuses_a_broken_file(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_model_config(tmp_path)
