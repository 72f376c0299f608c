"""DecoderModel: the pre-norm transformer decoder that the families share.

In rank processes. It turns a batch into hidden states of the sampled tokens, and those into logits; where tensors
are shared between ranks is settled by the table and the parallel layers. It knows no request and no sampling rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.attention import AttentionRule, PagedAttention, PagedCache
from models.batch import ForwardBatch
from models.config import ModelConfig
from models.layers import (
    ACTIVATIONS,
    Attend,
    GatedMlp,
    RMSNorm,
    RotaryEmbedding,
    Rotation,
    SelfAttention,
    Weights,
    rotary_frequencies,
)
from models.rope import Rope
from models.tables import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    attention_inputs,
    kv_heads_held,
    mlp_inputs,
    parameter_table,
    tensor_name,
)
from parallel.context import ParallelContext
from parallel.tensor import ColumnLinear, RowLinear, VocabularyEmbedding, VocabularyHead

Normalize = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """Attention, then the MLP, each on the normalized stream; what they make is added to it, or first normalized."""

    rope: Rope
    before_attention: Normalize
    attention: SelfAttention
    after_attention: Normalize
    before_mlp: Normalize
    mlp: GatedMlp
    after_mlp: Normalize

    def __call__(self, hidden: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        hidden = hidden + self.after_attention(self.attention(self.before_attention(hidden), rotation, attend))
        return hidden + self.after_mlp(self.mlp(self.before_mlp(hidden)))


@dataclass(frozen=True, slots=True)
class DecoderModel:
    """A whole decoder. shards: the resident tensor behind each checkpoint name, filled by the loader.

    embedding_scale multiplies embeddings, logit_cap c bends each logit x to c * tanh(x / c); None leaves them alone.
    """

    config: ModelConfig
    embedding: VocabularyEmbedding
    embedding_scale: float | None
    rotaries: Mapping[Rope, RotaryEmbedding]
    layers: Sequence[DecoderLayer]
    norm: RMSNorm
    head: VocabularyHead
    shards: Mapping[str, Tensor]

    def __call__(self, batch: ForwardBatch, kv_cache: PagedCache) -> Tensor:
        """Normalized hidden states of the sampled tokens, [S, hidden]; keys and values of all tokens are stored."""
        hidden = self.embedding(batch.token_ids)
        if self.embedding_scale is not None:
            hidden = hidden * self.embedding_scale
        rotations = {rope: rotary(batch.positions, hidden.dtype) for rope, rotary in self.rotaries.items()}
        attend = PagedAttention(batch, kv_cache, {layer.window for layer in self.config.layers})
        for layer in self.layers:
            hidden = layer(hidden, rotations[layer.rope], attend)
        return self.norm(hidden.index_select(0, batch.sample_index))

    def row_logits(self, hidden: Tensor) -> Tensor:
        """[k, vocabulary] logits of rows rank * k .. of hidden, k = ceil(S / tensor size); surplus rows are zeros."""
        logits = self.head(hidden)
        cap = self.config.logit_cap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    @property
    def resident_bytes(self) -> int:
        """Bytes of every distinct tensor that the parameters occupy."""
        storages = {shard.untyped_storage().data_ptr(): shard.untyped_storage() for shard in self.shards.values()}
        return sum(storage.nbytes() for storage in storages.values())


def build_decoder(config: ModelConfig, context: ParallelContext) -> DecoderModel:
    """The model with its tensors allocated on the context's device, uninitialized."""
    weights = Weights(parameter_table(config), context)
    embedding = weights.take(tensor_name(config, EMBEDDING))
    layers = tuple(_build_layer(config, context, weights, layer) for layer in range(config.num_hidden_layers))
    norm = RMSNorm(weights.take(tensor_name(config, FINAL_NORM)), config.rms_norm_eps, config.family.norms_from_one)
    head = embedding if config.tie_word_embeddings else weights.take(tensor_name(config, HEAD))
    return DecoderModel(
        config=config,
        embedding=VocabularyEmbedding(embedding, context.tensor),
        embedding_scale=_embedding_scale(config, context.dtype),
        rotaries={rope: _rotary(config, rope, context.device) for rope in {layer.rope for layer in config.layers}},
        layers=layers,
        norm=norm,
        head=VocabularyHead(head, config.vocab_size, context.tensor),
        shards=weights.shards(),
    )


def _embedding_scale(config: ModelConfig, dtype: torch.dtype) -> float | None:
    """Rounded to the dtype, as Gemma was trained."""
    if not config.family.scales_embeddings:
        return None
    return torch.tensor(math.sqrt(config.hidden_size), dtype=dtype).item()


def _rotary(config: ModelConfig, rope: Rope, device: torch.device) -> RotaryEmbedding:
    return RotaryEmbedding(rotary_frequencies(config.head_dim, rope).to(device), rope.attention_factor)


def _build_layer(config: ModelConfig, context: ParallelContext, weights: Weights, layer: int) -> DecoderLayer:
    family, norms = config.family, config.family.norms

    def take(*parts: str, kind: str = "weight") -> Tensor:
        return weights.take(*(tensor_name(config, part, layer, kind) for part in parts))

    def bias(held: bool, *parts: str) -> Tensor | None:
        return take(*parts, kind="bias") if held else None

    def norm(part: str) -> RMSNorm:
        return RMSNorm(take(part), config.rms_norm_eps, family.norms_from_one)

    def norm_if_any(part: str | None) -> Normalize:
        return _unchanged if part is None else norm(part)

    heads, kv_heads = config.num_attention_heads // context.tensor.size, kv_heads_held(config, context.tensor.size)
    attention = SelfAttention(
        layer=layer,
        rule=AttentionRule(config.layers[layer].window, config.attention_scale, config.attention_cap),
        head_dim=config.head_dim,
        head_counts=[heads, kv_heads, kv_heads],
        qkv=ColumnLinear(take(*attention_inputs(config)), bias(config.qkv_bias, *attention_inputs(config))),
        query_norm=norm("self_attn.q_norm") if family.normalizes_heads else None,
        key_norm=norm("self_attn.k_norm") if family.normalizes_heads else None,
        output=RowLinear(take("self_attn.o_proj"), bias(config.output_bias, "self_attn.o_proj"), context.tensor),
    )
    return DecoderLayer(
        rope=config.layers[layer].rope,
        before_attention=norm(norms.before_attention),
        attention=attention,
        after_attention=norm_if_any(norms.after_attention),
        before_mlp=norm(norms.before_mlp),
        mlp=GatedMlp(
            gate_up=ColumnLinear(take(*mlp_inputs(config))),
            activation=ACTIVATIONS[config.activation],
            down=RowLinear(take("mlp.down_proj"), None, context.tensor),
        ),
        after_mlp=norm_if_any(norms.after_mlp),
    )


def _unchanged(hidden: Tensor) -> Tensor:
    return hidden
