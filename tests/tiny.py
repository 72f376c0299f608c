"""Tiny random checkpoints in Hugging Face format, tokenizer included, written in well under two seconds.

Weights are float32 (or what `dtype` says) and scaled so that log-probabilities vary and depend on the whole prompt.
Any key of config.json can be overridden; keys overridden by None are left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from models.config import ModelConfig, read_model_config
from models.families import FULL, SLIDING
from models.parameter import Parameter
from models.tables import EMBEDDING, HEAD, parameter_table

BEGIN = "<|begin_of_text|>"
END = "<|end_of_text|>"
TOKENIZER_VOCABULARY = 320
POISON = 511
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 64}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% if tools %}[tools] {{ tools | tojson }}{{ '\n' }}{% endif %}"
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}{{ call['function'] | tojson }}{% endfor %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
TEXT = """An echelon is a formation in which each unit stands a little behind and to the side of the one ahead.
Geese fly so, cyclists ride so in a crosswind, and a pipeline of micro-batches draws the same staircase in time.
The quick brown fox jumps over the lazy dog. Der schnelle braune Fuchs springt. Le renard brun saute. 敏捷的棕色狐狸。
"""

# Caps, scales and windows are such that tiny models feel them: a window ends within prompts, chunks and blocks.
_GEMMA: dict[str, object] = {
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 24,
    "sliding_window": 9,
    "tie_word_embeddings": True,
}
_GEMMA3 = _GEMMA | {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "rope_parameters": {
        FULL: {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0},
        SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    },
    "layer_types": [SLIDING, FULL],
}
# head_dim is what transformers writes: the part that turns.
_DEEPSEEK: dict[str, object] = {
    "num_key_value_heads": 4,
    "head_dim": 6,
    "q_lora_rank": 28,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 12,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
}
FAMILIES: Mapping[str, dict[str, object]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "sliding_window": None,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "qwen3-moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
    },
    "phi3": {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "pad_token_id": None},
    "gemma2": _GEMMA
    | {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 1.0,
    },
    "gemma3": _GEMMA3,
    "deepseek-v2": _DEEPSEEK | {"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2"},
    "deepseek-v2-lite": _DEEPSEEK
    | {"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "q_lora_rank": None},
    "deepseek-v3": _DEEPSEEK | {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"},
    "gemma3-multimodal": _GEMMA3 | {"architectures": ["Gemma3ForConditionalGeneration"]},
}
# What a model of several modalities has beside its language model; the weights of it are not written.
_VISION: dict[str, object] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def make_checkpoint(
    directory: Path, family: str = "llama", *, seed: int = 0, shards: int = 1, **overrides: object
) -> Path:
    """Writes a checkpoint and returns its directory. vocab_size may be padded beyond the tokenizer's."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    tokenizer.save(str(directory / "tokenizer.json"))
    end_id = tokenizer.token_to_id(END)
    config: dict[str, object] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": tokenizer.get_vocab_size(),
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "dtype": "float32",
        "bos_token_id": tokenizer.token_to_id(BEGIN),
        "eos_token_id": end_id,
    }
    config |= FAMILIES[family] | overrides
    config = {key: value for key, value in config.items() if value is not None or key not in overrides}
    if family.endswith("-multimodal"):
        outer = {key: config.pop(key) for key in ("architectures", "dtype", "eos_token_id")}
        parts = {"text_config": config, "vision_config": _VISION, "mm_tokens_per_image": 4}
        config = {**outer, "model_type": family.removesuffix("-multimodal"), **parts}
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", {"eos_token_id": [end_id]})
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BEGIN,
            "eos_token": END,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    write_weights(directory, seed=seed, shards=shards)
    return directory


def make_poisoned_checkpoint(directory: Path, family: str = "llama", **overrides: Any) -> Path:
    """One whose last token, beyond its tokenizer's vocabulary, is poison: its embedding is NaN."""
    make_checkpoint(directory, family, vocab_size=POISON + 1, **overrides)
    weights = load_file(directory / "model.safetensors")
    weights["model.embed_tokens.weight"][POISON] = np.nan
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def write_weights(directory: Path, *, seed: int, shards: int = 1) -> None:
    """Random weights for the directory's config.json, in one file or in several with an index."""
    random = np.random.default_rng(seed)
    config = read_model_config(directory)
    tensors = {parameter.name: _random_tensor(parameter, config, random) for parameter in parameter_table(config)}
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        members = names[shard::shards]
        save_file({name: tensors[name] for name in members}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(members, file)
    _write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def _random_tensor(parameter: Parameter, config: ModelConfig, random: np.random.Generator) -> npt.NDArray[np.float32]:
    noise = random.standard_normal(parameter.shape, dtype=np.float32)
    if parameter.name.endswith("norm.weight"):
        return np.float32(0.0 if config.family.norms_from_one else 1.0) + np.float32(0.1) * noise
    if parameter.name.endswith(".bias"):
        return np.float32(0.1) * noise
    # DeepSeek's rotation and router are float32 in transformers, and round otherwise in each shape of batch: layers and
    # logits this small hold that well below 1e-6.
    small = config.latent is not None
    scale = 0.25 if small and HEAD in parameter.name else 1.0 if small else 2.0
    if EMBEDDING in parameter.name:
        # Small where sqrt(hidden_size) multiplies it. It is the head too then, and transformers computes the softmax
        # of Gemma-2's attention in float32: logits this small hold its rounding well below 1e-6.
        scale = 0.25 if config.family.scales_embeddings else 1.0
    return np.float32(scale / math.sqrt(parameter.shape[-1])) * noise


def _tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer: any text can be encoded, and a begin token goes before it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_VOCABULARY,
        special_tokens=[BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    begin_id = tokenizer.token_to_id(BEGIN)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, begin_id)]
    )
    return tokenizer


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
