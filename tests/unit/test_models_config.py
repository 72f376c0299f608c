"""read_model_config: both spellings of transformers, and one clear error for each thing that is wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from echelon.errors import ConfigError
from models import layers, registry
from models.config import ACTIVATIONS, DefaultSampling, LayerConfig, read_model_config
from models.families import FAMILIES, FULL, SLIDING
from models.rope import LinearScaling, Llama3Scaling, LongRopeScaling, Rope, YarnScaling
from models.routing import Routing
from tests.tiny import LLAMA3_ROPE, YARN_ROPE, make_checkpoint

ROPES = "supported: default, linear, dynamic, llama3, yarn, longrope"
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"]}
PHI3 = {"architectures": ["Phi3ForCausalLM"]}
MOE = {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4, "num_experts_per_tok": 2}
GEMMA3 = {"architectures": ["Gemma3ForCausalLM"], "rope_parameters": None}
LLAMA3_SCALING = Llama3Scaling(8.0, 1.0, 4.0, 64)


def test_reads_what_transformers_5_writes(tmp_path: Path) -> None:
    config = read_model_config(make_checkpoint(tmp_path, rope_parameters=LLAMA3_ROPE, dtype="bfloat16"))
    assert config.architecture == "LlamaForCausalLM"
    assert config.layers == (LayerConfig(None, Rope(10_000.0, LLAMA3_SCALING)),) * 2
    assert config.dtype == "bfloat16"
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 16)


def test_reads_what_transformers_4_wrote(tmp_path: Path) -> None:
    scaling = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    old: dict[str, Any] = {"rope_parameters": None, "rope_theta": 500_000.0, "rope_scaling": scaling, "dtype": None}
    config = read_model_config(make_checkpoint(tmp_path, **old, torch_dtype="float16"))
    assert config.layers == (LayerConfig(None, Rope(500_000.0, LLAMA3_SCALING)),) * 2
    assert config.dtype == "float16"


def test_rope_scalings_with_their_defaults(tmp_path: Path) -> None:
    def rope(name: str, **parameters: object) -> Rope:
        directory = make_checkpoint(tmp_path / name, rope_parameters={"rope_theta": 500.0, **parameters})
        return read_model_config(directory).layers[0].rope

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
    assert config.layers[0].rope == Rope(10_000.0)
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
        ("mixtral", True, False, False),
        ("qwen3-moe", True, True, True),
        ("phi3", True, False, False),
        ("gemma2", True, True, True),
        ("gemma3", False, False, False),
    ],
)
def test_biases_are_those_of_the_family(
    tmp_path: Path, family: str, attention_bias: bool, qkv_bias: bool, output_bias: bool
) -> None:
    config = read_model_config(make_checkpoint(tmp_path, family, attention_bias=attention_bias))
    assert (config.qkv_bias, config.output_bias) == (qkv_bias, output_bias)


@pytest.mark.parametrize(
    ("family", "overrides", "windows"),
    [
        ("llama", {"sliding_window": 7}, (None, None, None)),
        ("mistral", {}, (None, None, None)),  # null is none
        ("mistral", {"sliding_window": 7}, (7, 7, 7)),
        ("mistral", {"sliding_window": None}, (4096, 4096, 4096)),  # left out
        ("mixtral", {"sliding_window": 7}, (7, 7, 7)),
        ("mixtral", {"sliding_window": None}, (None, None, None)),  # left out
        ("qwen3-moe", {"sliding_window": 7}, (None, None, None)),
        ("qwen3-moe", {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 2}, (7, 7, 7)),
        ("phi3", {"sliding_window": 7}, (7, 7, 7)),
        ("phi3", {}, (None, None, None)),
        ("qwen2", {"sliding_window": 7, "max_window_layers": 1}, (None, None, None)),
        ("qwen2", {"sliding_window": 7, "use_sliding_window": True}, (None, None, None)),  # from layer 28 on
        ("qwen2", {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 1}, (None, 7, 7)),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 0}, (4096, 4096, 4096)),
        (
            "qwen3",
            {"sliding_window": 7, "use_sliding_window": True, "layer_types": [SLIDING, FULL, FULL]},
            (7, None, None),
        ),
        ("gemma2", {}, (9, None, 9)),
        ("gemma2", {"layer_types": [FULL, SLIDING, SLIDING], "sliding_window": None}, (None, 4096, 4096)),
        ("gemma3", {"layer_types": None}, (9, 9, 9)),  # each sixth sees everything
        ("gemma3", {"layer_types": None, "sliding_window_pattern": 3}, (9, 9, None)),
    ],
)
def test_windows_of_the_layers(
    tmp_path: Path, family: str, overrides: dict[str, Any], windows: tuple[int | None, ...]
) -> None:
    config = read_model_config(make_checkpoint(tmp_path, family, num_hidden_layers=3, **overrides))
    assert tuple(layer.window for layer in config.layers) == windows


def test_gemma_3_turns_layers_with_a_window_by_a_rope_of_their_own(tmp_path: Path) -> None:
    config = read_model_config(make_checkpoint(tmp_path, "gemma3"))
    assert [layer.rope for layer in config.layers] == [Rope(10_000.0), Rope(1_000_000.0, LinearScaling(8.0))]
    old = make_checkpoint(tmp_path / "old", "gemma3", rope_parameters=None)
    assert [layer.rope for layer in read_model_config(old).layers] == [Rope(10_000.0), Rope(1_000_000.0)]


def test_a_multimodal_config_as_sparse_as_gemma_3_ships_it(tmp_path: Path) -> None:
    text = {"hidden_size": 2560, "num_hidden_layers": 7, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text | {"sliding_window": 1024}}
    (tmp_path / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16", "eos_token_id": [1, 106]}))
    read = read_model_config(tmp_path)
    assert (read.hidden_size, read.num_attention_heads, read.num_key_value_heads, read.head_dim) == (2560, 8, 4, 256)
    assert (read.vocab_size, read.dtype, read.end_ids, read.tie_word_embeddings) == (
        262_208,
        "bfloat16",
        (1, 106),
        True,
    )
    assert [layer.window for layer in read.layers] == [1024] * 5 + [None, 1024]
    assert read.layers[5].rope == Rope(1_000_000.0, LinearScaling(8.0)) and read.layers[6].rope == Rope(10_000.0)
    assert (read.activation, read.attention_scale) == ("gelu_pytorch_tanh", 256**-0.5)


def test_what_gemma_2_takes_for_missing_keys_and_for_null(tmp_path: Path) -> None:
    keys = ("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "hidden_activation")
    left_out: dict[str, Any] = dict.fromkeys((*keys, "tie_word_embeddings"))
    missing = make_checkpoint(tmp_path / "missing", "gemma2", **left_out)
    config = read_model_config(missing)
    assert (config.attention_cap, config.logit_cap, config.attention_scale) == (50.0, 30.0, 1 / 16)
    assert config.activation == "gelu_pytorch_tanh" and config.tie_word_embeddings
    written = json.loads((missing / "config.json").read_text())
    (missing / "config.json").write_text(json.dumps(written | dict.fromkeys(keys[:2])))
    null = read_model_config(missing)
    assert (null.attention_cap, null.logit_cap) == (None, None)


@pytest.mark.parametrize(
    ("max_context", "factors"), [(None, (2.0,) * 8), (65, (2.0,) * 8), (64, (1.0,) * 8), (9, (1.0,) * 8)]
)
def test_longrope_has_the_factors_of_the_longest_request(
    tmp_path: Path, max_context: int | None, factors: tuple[float, ...]
) -> None:
    make_checkpoint(tmp_path, "phi3", rope_parameters=LONGROPE, original_max_position_embeddings=64)
    rope = read_model_config(tmp_path, max_context).layers[0].rope
    assert isinstance(rope.scaling, LongRopeScaling) and rope.scaling.factors == factors
    assert rope.attention_factor == math.sqrt(1 + math.log(512 / 64) / math.log(64))


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
    sampling = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1}
    generation = tmp_path / "generation_config.json"
    generation.write_text(json.dumps(sampling | {"do_sample": True}))
    assert read_model_config(tmp_path).default_sampling == DefaultSampling(0.6, 0.95, 20, 0.05, 1.1)
    generation.write_text(json.dumps(sampling | {"do_sample": True, "top_k": 0, "min_p": 0.0}))
    assert read_model_config(tmp_path).default_sampling == DefaultSampling(0.6, 0.95, repetition_penalty=1.1)
    generation.write_text(json.dumps(sampling))  # a penalty is no matter of drawing
    assert read_model_config(tmp_path).default_sampling == DefaultSampling(repetition_penalty=1.1)


@pytest.mark.parametrize(
    "wrong", [{"min_p": 1.5}, {"top_p": 2}, {"min_p": -0.1}, {"repetition_penalty": 0}, {"temperature": "hot"}]
)
def test_refuses_default_sampling_that_no_request_could_ask_for(tmp_path: Path, wrong: dict[str, object]) -> None:
    make_checkpoint(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": True, **wrong}))
    with pytest.raises(ConfigError, match=rf"generation_config\.json: {next(iter(wrong))} must be a number"):
        read_model_config(tmp_path)


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
        ({"quantization_config": {"quant_method": "awq"}}, ["quant_method='awq'", "unquantised"]),
        ({"layer_types": [FULL, SLIDING]}, ["layer_types", "every layer of this architecture is 'full_attention'"]),
        ({"layer_types": [FULL]}, ["layer_types", "num_hidden_layers=2", "['full_attention']"]),
        (QWEN2 | {"layer_types": [FULL, "chunked_attention"]}, ["layer_types", "'chunked_attention'"]),
        (QWEN2 | {"layer_types": [FULL, SLIDING]}, ["layer_types", "no sliding_window in use"]),
        (QWEN2 | {"use_sliding_window": True, "max_window_layers": -1}, ["max_window_layers", ">= 0", "-1"]),
        (MOE | {"num_experts_per_tok": 5}, ["num_experts_per_tok=5 is more than num_experts=4"]),
        (MOE | {"num_experts": 0}, ["num_experts", ">= 1", "0"]),
        (MOE | {"mlp_only_layers": [2]}, ["mlp_only_layers", "0 to 1", "[2]"]),
        (MOE | {"mlp_only_layers": "all"}, ["mlp_only_layers", "'all'"]),
        (MOE | {"decoder_sparse_step": 0}, ["decoder_sparse_step", "0"]),
        (MOE | {"shared_expert_intermediate_size": 64}, ["shared experts"]),
        (MOE | {"layer_types": [FULL, SLIDING]}, ["layer_types", "every layer of this architecture"]),
        (GEMMA3 | {"attn_logit_softcapping": 50.0}, ["attn_logit_softcapping=50.0 is not supported"]),
        (GEMMA3 | {"use_bidirectional_attention": True}, ["use_bidirectional_attention"]),
        (GEMMA3 | {"rope_parameters": {"rope_theta": 1e6}}, ["rope_parameters", "for each kind of layer"]),
        ({"rope_parameters": {FULL: {"rope_theta": 1e6}}}, ["rope_parameters", "once for all layers"]),
        ({"architectures": ["Gemma3ForConditionalGeneration"]}, ["text_config", "missing"]),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 0}, ["sliding_window", "0"]),
        ({"rope_parameters": {"rope_type": "ntk"}}, ["rope_parameters.rope_type='ntk' is not", ROPES]),
        ({"rope_parameters": None, "rope_scaling": {"type": "ntk"}}, ["rope_scaling.type='ntk' is not", ROPES]),
        ({"rope_parameters": {"rope_type": "longrope"}}, ["rope_parameters.short_factor", "missing"]),
        (PHI3 | {"rope_parameters": LONGROPE | {"long_factor": [1, "2"]}}, ["rope_parameters.long_factor", "'2'"]),
        (PHI3 | {"rope_parameters": LONGROPE | {"long_factor": [1.0] * 6}}, ["long_factor has 6 numbers", "8 pairs"]),
        (PHI3 | {"partial_rotary_factor": 0.7}, ["0.7 of head_dim=16 turns 11 numbers", "even"]),
        (PHI3 | {"partial_rotary_factor": 1.5}, ["1.5 of head_dim=16 turns 24 numbers", "2 to 16"]),
        (PHI3 | {"rope_parameters": LONGROPE, "original_max_position_embeddings": 1}, ["attention_factor"]),
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


def test_what_is_accepted_is_built() -> None:
    assert registry.BUILDERS.keys() == FAMILIES.keys()
    assert layers.ACTIVATIONS.keys() == set(ACTIVATIONS)


def test_routing_as_mixtral_ships_it(tmp_path: Path) -> None:
    config = {"architectures": ["MixtralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14_336}
    sizes = {"num_attention_heads": 32, "num_hidden_layers": 2, "vocab_size": 32_000, "max_position_embeddings": 32_768}
    (tmp_path / "config.json").write_text(json.dumps(config | sizes | {"sliding_window": None}))
    read = read_model_config(tmp_path)
    assert [layer.routing for layer in read.layers] == [Routing(8, 2, 14_336, normalizes=True)] * 2
    assert (read.layers[0].rope, read.rms_norm_eps) == (Rope(1_000_000.0), 1e-5)


def test_routing_by_the_keys_of_transformers_4_and_5(tmp_path: Path) -> None:
    new = make_checkpoint(tmp_path / "new", "qwen3-moe", num_experts=None, num_local_experts=6)
    assert read_model_config(new).layers[0].routing == Routing(6, 3, 24, normalizes=False)
    old = make_checkpoint(tmp_path / "old", "qwen3-moe", norm_topk_prob=True)
    assert read_model_config(old).layers[0].routing == Routing(8, 3, 24, normalizes=True)
    assert {layer.routing for layer in read_model_config(make_checkpoint(tmp_path / "dense")).layers} == {None}


@pytest.mark.parametrize(
    ("keys", "sparse"),
    [({}, {0, 1, 2, 3}), ({"decoder_sparse_step": 2}, {1, 3}), ({"mlp_only_layers": [0, 3]}, {1, 2})],
)
def test_which_layers_have_experts(tmp_path: Path, keys: dict[str, Any], sparse: set[int]) -> None:
    config = read_model_config(make_checkpoint(tmp_path, "qwen3-moe", num_hidden_layers=4, **keys))
    assert {layer for layer, found in enumerate(config.layers) if found.routing is not None} == sparse


@pytest.mark.parametrize("content", ["{", "[]", b"\xff\xfe"])
def test_refuses_a_broken_file(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_model_config(tmp_path)
