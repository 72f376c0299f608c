"""read_model_config: both spellings of transformers, and one clear error for each thing that is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from echelon.errors import ConfigError
from models.config import DefaultSampling, read_model_config
from models.rope import LinearScaling, Llama3Scaling, Rope, YarnScaling
from tests.tiny import LLAMA3_ROPE, YARN_ROPE, make_checkpoint

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


def test_rope_scalings_with_their_defaults(tmp_path: Path) -> None:
    def rope(name: str, **parameters: object) -> Rope:
        directory = make_checkpoint(tmp_path / name, rope_parameters={"rope_theta": 500.0, **parameters})
        return read_model_config(directory).rope

    assert rope("linear", type="linear", factor=2) == Rope(500.0, LinearScaling(2.0))
    assert rope("dynamic", rope_type="dynamic", factor=2) == Rope(500.0)
    yarn = YarnScaling(factor=1.0, original_max_position_embeddings=512, attention_factor=1.0)
    assert rope("yarn", rope_type="yarn", factor=1) == Rope(500.0, yarn)
    given = {"attention_factor": 0.5, "beta_fast": 20, "beta_slow": 2, "truncate": False}
    assert rope("given", **(YARN_ROPE | given)) == Rope(10_000.0, YarnScaling(8.0, 64, 0.5, 20.0, 2.0, False))


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


@pytest.mark.parametrize(
    ("family", "attention_bias", "qkv_bias", "output_bias"),
    [
        ("llama", True, True, True),
        ("llama", False, False, False),
        ("mistral", True, False, False),
        ("qwen2", False, True, False),
        ("qwen2", True, True, False),
        ("qwen3", True, True, True),
    ],
)
def test_biases_are_those_of_the_family(
    tmp_path: Path, family: str, attention_bias: bool, qkv_bias: bool, output_bias: bool
) -> None:
    config = read_model_config(make_checkpoint(tmp_path, family, attention_bias=attention_bias))
    assert (config.qkv_bias, config.output_bias) == (qkv_bias, output_bias)


def test_only_mistral_reads_the_window_and_has_one_unless_it_is_null(tmp_path: Path) -> None:
    null = make_checkpoint(tmp_path / "null", "mistral")
    assert '"sliding_window": null' in (null / "config.json").read_text()
    assert read_model_config(null).sliding_window is None
    given = make_checkpoint(tmp_path / "given", "mistral", sliding_window=7)
    assert read_model_config(given).sliding_window == 7
    missing = make_checkpoint(tmp_path / "missing", "mistral", sliding_window=None)
    assert read_model_config(missing).sliding_window == 4096
    unused = make_checkpoint(tmp_path / "unused", "qwen2", sliding_window=7, use_sliding_window=False)
    assert read_model_config(unused).sliding_window is None


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
        ({"use_sliding_window": True}, ["use_sliding_window=true is not supported", "only some layers"]),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types", "'sliding_attention'"]),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 0}, ["sliding_window", "0"]),
        ({"rope_parameters": {"rope_type": "longrope"}}, ["'longrope'", "default, linear, dynamic, llama3, yarn"]),
        ({"rope_parameters": {"rope_type": "linear"}}, ["rope_parameters.factor", "missing"]),
        ({"rope_parameters": {**LLAMA3_ROPE, "factor": None}}, ["rope_parameters.factor", "missing"]),
        ({"rope_parameters": {**YARN_ROPE, "factor": "8"}}, ["rope_parameters.factor", "'8'"]),
        ({"rope_parameters": {**YARN_ROPE, "truncate": 0}}, ["rope_parameters.truncate", "true or false"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5"]),
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
