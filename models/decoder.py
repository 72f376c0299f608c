"""DecoderModel: the pre-norm transformer decoder that the families share.

In rank processes. It turns a batch into hidden states of the sampled tokens, and those into logits; where tensors
are shared between ranks is settled by the table and the parallel layers. It knows no request and no sampling rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from models.attention import PagedAttention, PagedCache
from models.batch import ForwardBatch
from models.config import ModelConfig
from models.layers import (
    Attend,
    GatedMlp,
    RMSNorm,
    RotaryEmbedding,
    Rotation,
    SelfAttention,
    Weights,
    rotary_frequencies,
)
from models.tables import EMBEDDING, FINAL_NORM, HEAD, kv_heads_held, layer_prefix, parameter_table
from parallel.context import ParallelContext
from parallel.tensor import ColumnLinear, RowLinear, VocabularyEmbedding, VocabularyHead


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """Attention, then the MLP, each on the normalized stream and added back to it."""

    attention_norm: RMSNorm
    attention: SelfAttention
    mlp_norm: RMSNorm
    mlp: GatedMlp

    def __call__(self, hidden: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden), rotation, attend)
        return hidden + self.mlp(self.mlp_norm(hidden))


@dataclass(frozen=True, slots=True)
class DecoderModel:
    """A whole decoder. shards: the resident tensor behind each checkpoint name, filled by the loader."""

    embedding: VocabularyEmbedding
    rotary: RotaryEmbedding
    sliding_window: int | None
    layers: Sequence[DecoderLayer]
    norm: RMSNorm
    head: VocabularyHead
    shards: Mapping[str, Tensor]

    def __call__(self, batch: ForwardBatch, kv_cache: PagedCache) -> Tensor:
        """Normalized hidden states of the sampled tokens, [S, hidden]; keys and values of all tokens are stored."""
        hidden = self.embedding(batch.token_ids)
        rotation = self.rotary(batch.positions, hidden.dtype)
        attend = PagedAttention(batch, kv_cache, self.sliding_window)
        for layer in self.layers:
            hidden = layer(hidden, rotation, attend)
        return self.norm(hidden.index_select(0, batch.sample_index))

    def row_logits(self, hidden: Tensor) -> Tensor:
        """[k, vocabulary] logits of rows rank * k .. of hidden, k = ceil(S / tensor size); surplus rows are zeros."""
        return self.head(hidden)

    @property
    def resident_bytes(self) -> int:
        """Bytes of every distinct tensor that the parameters occupy."""
        storages = {shard.untyped_storage().data_ptr(): shard.untyped_storage() for shard in self.shards.values()}
        return sum(storage.nbytes() for storage in storages.values())


def build_decoder(config: ModelConfig, context: ParallelContext) -> DecoderModel:
    """The model with its tensors allocated on the context's device, uninitialized."""
    weights = Weights(parameter_table(config), context)
    embedding = weights.take(EMBEDDING)
    layers = tuple(_build_layer(config, context, weights, layer) for layer in range(config.num_hidden_layers))
    norm = RMSNorm(weights.take(FINAL_NORM), config.rms_norm_eps)
    head = embedding if config.tie_word_embeddings else weights.take(HEAD)
    return DecoderModel(
        embedding=VocabularyEmbedding(embedding, context.tensor),
        rotary=RotaryEmbedding(
            rotary_frequencies(config.head_dim, config.rope).to(context.device), config.rope.attention_factor
        ),
        sliding_window=config.sliding_window,
        layers=layers,
        norm=norm,
        head=VocabularyHead(head, config.vocab_size, context.tensor),
        shards=weights.shards(),
    )


def _build_layer(config: ModelConfig, context: ParallelContext, weights: Weights, layer: int) -> DecoderLayer:
    prefix = layer_prefix(layer)

    def norm(name: str) -> RMSNorm:
        return RMSNorm(weights.take(f"{prefix}.{name}.weight"), config.rms_norm_eps)

    def bias(held: bool, *names: str) -> Tensor | None:
        return weights.take(*(f"{prefix}.self_attn.{name}.bias" for name in names)) if held else None

    def column(*names: str) -> Tensor:
        return weights.take(*(f"{prefix}.{name}.weight" for name in names))

    heads, kv_heads = config.num_attention_heads // context.tensor.size, kv_heads_held(config, context.tensor.size)
    attention = SelfAttention(
        layer=layer,
        head_dim=config.head_dim,
        head_counts=[heads, kv_heads, kv_heads],
        qkv=ColumnLinear(
            column("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            bias(config.qkv_bias, "q_proj", "k_proj", "v_proj"),
        ),
        query_norm=norm("self_attn.q_norm") if config.normalizes_heads else None,
        key_norm=norm("self_attn.k_norm") if config.normalizes_heads else None,
        output=RowLinear(column("self_attn.o_proj"), bias(config.output_bias, "o_proj"), context.tensor),
    )
    mlp = GatedMlp(
        gate_up=ColumnLinear(column("mlp.gate_proj", "mlp.up_proj")),
        down=RowLinear(column("mlp.down_proj"), None, context.tensor),
    )
    return DecoderLayer(norm("input_layernorm"), attention, norm("post_attention_layernorm"), mlp)
