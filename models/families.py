"""Families: what the name of an architecture says about a model that its config.json does not, as one table.

Read by the config, the parameter table and the decoder, in the coordinator and in every rank. A new family is a row
here if it is made of parts that are already computed. It knows no torch and no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, auto

FULL, SLIDING = "full_attention", "sliding_attention"  # the kinds of layers in layer_types


class Windows(Enum):
    """Which layers attend to the last sliding_window tokens only."""

    NONE = auto()
    EVERY_LAYER = auto()  # if sliding_window is not null
    EVERY_LAYER_IF_USED = auto()  # if sliding_window is not null and use_sliding_window is true
    UPPER_LAYERS = auto()  # by layer_types, or from max_window_layers on; and only if use_sliding_window is true
    ALL_BUT_EVERY_NTH = auto()  # by layer_types, or all layers but each sliding_window_pattern-th


class Gating(Enum):
    """How a router chooses, and which keys of config.json say more about it."""

    SOFTMAX = auto()  # the greatest of a softmax
    DEEPSEEK_V2 = auto()  # the same, of groups that have the greatest, if topk_method says so
    DEEPSEEK_V3 = auto()  # the greatest of sigmoids that a bias corrects, of groups whose best two are the greatest


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerNorms:
    """Names of a layer's norms in the checkpoint; None where a family has none."""

    before_attention: str = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str = "post_attention_layernorm"
    after_mlp: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertKeys:
    """A family with experts: keys of config.json, and names of a layer's tensors in the checkpoint.

    The router is `{block}.gate`, expert 3 has `{block}.experts.3.{gate}` and so on: down(activation(gate(x)) * up(x)).
    DeepSeek's have `{block}.shared_experts` beside them, an MLP of n_shared_experts * neurons for every token.
    rounds_shares: the chosen experts' shares are rounded to the dtype of the model, and float32 otherwise.
    """

    experts: str
    neurons: str
    block: str
    gate: str
    up: str
    down: str
    always_normalizes: bool = False
    rounds_shares: bool = False
    gating: Gating = Gating.SOFTMAX


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One architecture. defaults: what transformers takes for keys that are missing from config.json.

    text_config: the key under which a model of several modalities has the language model's config; prefix goes before
    the names of its tensors. qkv_bias None: attention_bias of config.json gives all four projections a bias.
    """

    defaults: Mapping[str, object] = field(default_factory=dict)
    text_config: str | None = None
    prefix: str = ""
    norms: LayerNorms = LayerNorms()
    experts: ExpertKeys | None = None
    qkv_bias: bool | None = None
    windows: Windows = Windows.NONE
    fuses_projections: bool = False  # the checkpoint has qkv_proj and gate_up_proj in place of five tensors
    rotates_partly: bool = False  # partial_rotary_factor is read
    rotates_locally: bool = False  # layers with a window have a rope of their own
    normalizes_heads: bool = False  # each query and key head passes through an RMSNorm before the rotation
    norms_from_one: bool = False  # RMSNorm multiplies by 1 + weight
    scales_embeddings: bool = False  # by sqrt(hidden_size)
    caps_attention: bool = False  # attn_logit_softcapping is read
    latent: bool = False  # keys and values are compressed: models/latent.py
    rotates_in_float32: bool = False  # rotations are computed in float32 whatever the dtype, as complex numbers


GEMMA2 = Family(
    defaults={
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 2,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    norms=LayerNorms(
        after_attention="post_attention_layernorm",
        before_mlp="pre_feedforward_layernorm",
        after_mlp="post_feedforward_layernorm",
    ),
    windows=Windows.ALL_BUT_EVERY_NTH,
    norms_from_one=True,
    scales_embeddings=True,
    caps_attention=True,
)
GEMMA3 = replace(
    GEMMA2,
    defaults={
        "vocab_size": 262_208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131_072,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
    },
    rotates_locally=True,
    normalizes_heads=True,
    caps_attention=False,
)
QWEN2 = Family(defaults={"sliding_window": 4096, "max_window_layers": 28}, qkv_bias=True, windows=Windows.UPPER_LAYERS)
DEEPSEEK_EXPERTS = ExpertKeys(
    experts="n_routed_experts",
    neurons="moe_intermediate_size",
    block="mlp",
    gate="gate_proj",
    up="up_proj",
    down="down_proj",
    gating=Gating.DEEPSEEK_V2,
)
DEEPSEEK_V2 = Family(
    defaults={
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "moe_intermediate_size": 1407,
    },
    experts=DEEPSEEK_EXPERTS,
    qkv_bias=False,
    latent=True,
    rotates_in_float32=True,
)
DEEPSEEK_V3 = replace(
    DEEPSEEK_V2,
    defaults={
        **DEEPSEEK_V2.defaults,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "moe_intermediate_size": 2048,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    },
    experts=replace(DEEPSEEK_EXPERTS, gating=Gating.DEEPSEEK_V3),
    rotates_in_float32=False,
)

FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(defaults={"sliding_window": 4096}, qkv_bias=False, windows=Windows.EVERY_LAYER),
    "Qwen2ForCausalLM": QWEN2,
    "Qwen3ForCausalLM": replace(
        QWEN2, defaults={**QWEN2.defaults, "head_dim": 128}, qkv_bias=None, normalizes_heads=True
    ),
    "MixtralForCausalLM": Family(
        defaults={"rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_local_experts": 8, "num_experts_per_tok": 2},
        experts=ExpertKeys(
            experts="num_local_experts",
            neurons="intermediate_size",
            block="block_sparse_moe",
            gate="w1",
            up="w3",
            down="w2",
            always_normalizes=True,
        ),
        qkv_bias=False,
        windows=Windows.EVERY_LAYER,
    ),
    "Qwen3MoeForCausalLM": Family(
        defaults={
            "sliding_window": 4096,
            "moe_intermediate_size": 768,
            "num_local_experts": 128,
            "num_experts_per_tok": 8,
        },
        experts=ExpertKeys(
            experts="num_experts",
            neurons="moe_intermediate_size",
            block="mlp",
            gate="gate_proj",
            up="up_proj",
            down="down_proj",
            rounds_shares=True,
        ),
        windows=Windows.EVERY_LAYER_IF_USED,
        normalizes_heads=True,
    ),
    "Phi3ForCausalLM": Family(
        defaults={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
        qkv_bias=False,
        windows=Windows.EVERY_LAYER,
        fuses_projections=True,
        rotates_partly=True,
    ),
    "Gemma2ForCausalLM": GEMMA2,
    "Gemma3ForCausalLM": GEMMA3,
    "Gemma3ForConditionalGeneration": replace(GEMMA3, text_config="text_config", prefix="language_model."),
    "DeepseekV2ForCausalLM": DEEPSEEK_V2,
    "DeepseekV3ForCausalLM": DEEPSEEK_V3,
}
