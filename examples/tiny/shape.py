"""The sizes of the tiny model, and what they come to: config.json's keys, parameters and bytes.

What decides them: 16 MB in bfloat16, tokenizer included; and each of Echelon's ways to split. 8 heads and 8 experts
divide by 2, 4 and 8; parts of experts and of the dense MLP by 2 are multiples of 8 numbers, as grouped products of
16 bytes want; 6 layers are cut 4 and 2 for two stages, since the head counts as one. It knows no tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

MOST_BYTES = 16_000_000
BFLOAT16_BYTES = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Names are those of config.json, but for `layers`, without the one that predicts a token further.

    All experts are computed for every token and most of the outputs dropped, for that is faster at this size than to
    sort; so a few large experts cost what many small ones do, and each token passes through more of them: 8.
    """

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 512
    layers: int = 6
    first_k_dense_replace: int = 1
    num_attention_heads: int = 8
    q_lora_rank: int = 128
    kv_lora_rank: int = 64
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 16
    v_head_dim: int = 32
    n_routed_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 112
    context: int = 1024
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        """Of queries and keys."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def routed_layers(self) -> int:
        """Layers with experts; the one that predicts a token further is one of them."""
        return self.layers - self.first_k_dense_replace + 1

    @property
    def attention_parameters(self) -> int:
        """Of one layer, its two norms included."""
        heads, hidden = self.num_attention_heads, self.hidden_size
        queries = self.q_lora_rank * (hidden + 1 + heads * self.head_dim)
        cached = hidden * (self.kv_lora_rank + self.qk_rope_head_dim) + self.kv_lora_rank
        expanded = self.kv_lora_rank * heads * (self.qk_nope_head_dim + self.v_head_dim)
        return queries + cached + expanded + heads * self.v_head_dim * hidden + 2 * hidden

    @property
    def expert_parameters(self) -> int:
        return 3 * self.hidden_size * self.moe_intermediate_size

    @property
    def routed_parameters(self) -> int:
        """Of one layer with experts: they, the one that all tokens pass, the router and its correction."""
        experts = (self.n_routed_experts + 1) * self.expert_parameters
        return self.attention_parameters + experts + self.n_routed_experts * (self.hidden_size + 1)

    @property
    def dense_parameters(self) -> int:
        return self.attention_parameters + 3 * self.hidden_size * self.intermediate_size

    @property
    def prediction_parameters(self) -> int:
        """Of the layer that predicts a token further: a layer, the projection into it, and three norms."""
        return self.routed_parameters + 2 * self.hidden_size**2 + 3 * self.hidden_size

    @property
    def parameters(self) -> int:
        """All that the checkpoint holds; the head is the embedding."""
        routed = (self.layers - self.first_k_dense_replace) * self.routed_parameters
        outside = self.vocab_size * self.hidden_size + self.hidden_size
        return outside + self.first_k_dense_replace * self.dense_parameters + routed + self.prediction_parameters

    @property
    def active_parameters(self) -> int:
        """That a token passes in the layers, the head included, without the layer that predicts a token further."""
        idle = (self.n_routed_experts - self.num_experts_per_tok) * self.expert_parameters
        routed = (self.layers - self.first_k_dense_replace) * (self.routed_parameters - idle)
        return self.vocab_size * self.hidden_size + self.first_k_dense_replace * self.dense_parameters + routed

    def config(self, begin_id: int, end_id: int) -> dict[str, object]:
        """config.json, as transformers writes it for this architecture."""
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "moe_intermediate_size": self.moe_intermediate_size,
            "num_hidden_layers": self.layers,
            "num_nextn_predict_layers": 1,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_attention_heads,
            "head_dim": self.qk_rope_head_dim,  # transformers': the part that turns
            "q_lora_rank": self.q_lora_rank,
            "kv_lora_rank": self.kv_lora_rank,
            "qk_nope_head_dim": self.qk_nope_head_dim,
            "qk_rope_head_dim": self.qk_rope_head_dim,
            "v_head_dim": self.v_head_dim,
            "first_k_dense_replace": self.first_k_dense_replace,
            "n_routed_experts": self.n_routed_experts,
            "n_shared_experts": 1,
            "num_experts_per_tok": self.num_experts_per_tok,
            "n_group": 1,
            "topk_group": 1,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.0,
            "hidden_act": "silu",
            "max_position_embeddings": self.context,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "rope_interleave": True,
            "attention_bias": False,
            "tie_word_embeddings": True,
            "bos_token_id": begin_id,
            "eos_token_id": end_id,
            "dtype": "bfloat16",
        }
