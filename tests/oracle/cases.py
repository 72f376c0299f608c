"""What the oracle compares: checkpoints of every family, with the sizes and keys that tell right from nearly right.

Sequences are longer than every window and than the original context of the LongRoPE cases, whose long factors then
hold for all positions here as in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from models.families import FULL, SLIDING
from tests.tiny import LLAMA3_ROPE, YARN_ROPE

PROMPT_TOKENS = (23, 40)
GREEDY_TOKENS = 64
LONGEST = max(PROMPT_TOKENS) + GREEDY_TOKENS


@dataclass(frozen=True, slots=True)
class Case:
    """config: keys of config.json over those of the tiny family. tensor: the numbers of ranks to run on."""

    family: str
    config: Mapping[str, Any] = field(default_factory=dict)
    tensor: tuple[int, ...] = (1, 2)
    shards: int = 1
    max_context: int | None = None


# head_dim is not hidden / heads, key/value heads are odd, and nothing is a multiple of anything.
ODD: dict[str, object] = {
    "hidden_size": 60,
    "intermediate_size": 99,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 14,
    "vocab_size": 331,
}
LONGROPE: dict[str, object] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5],
    "long_factor": [1.0, 1.5, 2.5, 6.0, 20.0, 40.0],
    "partial_rotary_factor": 0.75,  # 6 pairs in a head of 16
}
THREE_LAYERS = {"num_hidden_layers": 3, "sliding_window": 9, "use_sliding_window": True}

DEEPSEEK_YARN = YARN_ROPE | {"mscale": 1.0, "mscale_all_dim": 0.7, "beta_fast": 16.0}
DEEPSEEK_ODD: dict[str, object] = {
    "hidden_size": 60,
    "intermediate_size": 99,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "head_dim": 10,
    "qk_rope_head_dim": 10,
    "qk_nope_head_dim": 7,
    "v_head_dim": 9,
    "kv_lora_rank": 21,
    "vocab_size": 331,
}
DEEPSEEK_GROUPS = {"topk_method": "group_limited_greedy", "num_hidden_layers": 3}

CASES: dict[str, Case] = {
    "llama": Case("llama"),
    "llama3-rope": Case("llama", {"rope_parameters": LLAMA3_ROPE}, shards=3),
    "llama-biased": Case(
        "llama",
        ODD | {"intermediate_size": 94, "num_key_value_heads": 2, "tie_word_embeddings": True, "attention_bias": True},
    ),
    "llama-one-kv-head": Case("llama", {"num_key_value_heads": 1}),
    "llama-5-heads-of-1": Case("llama", {"hidden_size": 50, "num_attention_heads": 5, "num_key_value_heads": 1}, (1,)),
    "llama-3-heads-of-3": Case(
        "llama", {"hidden_size": 66, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": None}, (1, 3)
    ),
    "linear-rope": Case("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "dynamic-rope": Case(  # to the very end of what it may serve
        "llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
            "max_position_embeddings": LONGEST,
        },
    ),
    "yarn-rope": Case("llama", {"rope_parameters": YARN_ROPE}),
    "mistral": Case("mistral"),
    "mistral-window": Case("mistral", {"sliding_window": 9}),
    "qwen2": Case("qwen2", {"tie_word_embeddings": True}),
    "qwen2-yarn": Case(
        "qwen2",
        {
            "rope_parameters": YARN_ROPE | {"attention_factor": 1.5, "beta_fast": 24.0, "truncate": False},
            "num_key_value_heads": 1,
            "vocab_size": 331,
        },
    ),
    "qwen2-upper-windows": Case("qwen2", THREE_LAYERS | {"max_window_layers": 1}),
    "qwen3": Case("qwen3", {"tie_word_embeddings": True}),
    "qwen3-odd": Case("qwen3", ODD, (1, 3)),
    "qwen3-layer-types": Case("qwen3", THREE_LAYERS | {"layer_types": [SLIDING, FULL, SLIDING]}),
    "mixtral": Case("mixtral"),
    "mixtral-odd": Case("mixtral", ODD | {"num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 9}, (3,)),
    "mixtral-old-keys": Case("mixtral", {"rope_parameters": None, "rms_norm_eps": None}),
    "qwen3-moe": Case("qwen3-moe", {"norm_topk_prob": True}, shards=3),
    "qwen3-moe-some-dense": Case(
        "qwen3-moe",
        {
            "num_hidden_layers": 4,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "num_experts": None,
            "num_local_experts": 6,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-moe-window": Case("qwen3-moe", {"use_sliding_window": True, "sliding_window": 9, "num_experts_per_tok": 8}),
    "phi3": Case("phi3"),
    "phi3-odd": Case("phi3", ODD | {"sliding_window": 9}, (1, 3)),
    "phi3-one-kv-head": Case("phi3", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "phi3-long": Case("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16}),
    "phi3-short": Case(
        "phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": LONGEST}, max_context=LONGEST
    ),
    "phi3-old-keys": Case(
        "phi3",
        {
            "rope_parameters": None,
            "rope_theta": 5e3,
            "partial_rotary_factor": 0.75,
            "rope_scaling": {
                "type": "longrope",
                "long_factor": LONGROPE["long_factor"],
                "short_factor": LONGROPE["short_factor"],
            },
            "original_max_position_embeddings": 20,
        },
    ),
    "gemma2": Case("gemma2"),
    "gemma2-odd": Case("gemma2", ODD | {"attention_bias": True}, (1, 3)),
    "gemma2-one-kv-head": Case("gemma2", {"num_key_value_heads": 1}),
    "gemma2-layer-types": Case("gemma2", {"attn_logit_softcapping": None, "layer_types": [FULL, SLIDING]}),
    "gemma3": Case("gemma3"),
    "gemma3-odd": Case("gemma3", ODD | {"layer_types": None, "sliding_window_pattern": 2}, (1, 3)),
    "gemma3-old-keys": Case(
        "gemma3",
        {
            "rope_parameters": None,
            "rope_theta": 5e5,
            "rope_local_base_freq": 1e3,
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3-multimodal": Case("gemma3-multimodal"),
    "deepseek-v2": Case(
        "deepseek-v2", DEEPSEEK_GROUPS | {"rope_parameters": DEEPSEEK_YARN, "routed_scaling_factor": 1.5}
    ),
    "deepseek-v2-lite": Case("deepseek-v2-lite", DEEPSEEK_ODD | {"n_shared_experts": 2}, (1, 3)),
    "deepseek-v3": Case("deepseek-v3", {"rope_parameters": DEEPSEEK_YARN, "num_hidden_layers": 3}, shards=3),
    "deepseek-v3-halves": Case("deepseek-v3", DEEPSEEK_ODD | {"rope_interleave": False, "rms_norm_eps": 1e-3}, (1, 3)),
    "deepseek-v3-lite": Case(  # V3's router behind queries of one matrix, all experts in one group, as Moonlight has it
        "deepseek-v2-lite",
        {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "n_group": 1, "topk_group": 1},
    ),
    "deepseek-v3-dense": Case("deepseek-v3", {"first_k_dense_replace": 2, "tie_word_embeddings": True}),
}
LAYOUTS = [(name, tensor) for name, case in CASES.items() for tensor in case.tensor]
# Keys that older files have, and sizes that other cases have too: for the long run.
LONG = {"llama-5-heads-of-1", "llama-3-heads-of-3", "qwen2-yarn", "qwen3-layer-types", "phi3-one-kv-head", "phi3-short"}
LONG |= {"phi3-old-keys", "gemma2-one-kv-head", "gemma2-layer-types", "gemma3-old-keys"}
LONG |= {"deepseek-v2-lite", "deepseek-v3-halves", "deepseek-v3-lite", "deepseek-v3-dense"}
PARAMETERS = [
    pytest.param(name, tensor, id=f"{name}-{tensor}", marks=[pytest.mark.long] if name in LONG else [])
    for name, tensor in LAYOUTS
]
