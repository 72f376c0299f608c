"""DecoderModel: the pre-norm transformer decoder that the families share.

In rank processes. It turns a batch into hidden states of the sampled tokens, and those into logits; where tensors
are shared between ranks is settled by the table and the parallel layers. It knows no request and no sampling rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from models.attention import PagedAttention, PagedCache
from models.attention_rule import AttentionRule
from models.batch import ForwardBatch
from models.config import ModelConfig
from models.latent_attention import LatentSelfAttention, build_latent_attention
from models.layers import (
    Attend,
    RMSNorm,
    RotaryEmbedding,
    Rotation,
    SelfAttention,
    Weights,
    rotary_frequencies,
)
from models.mlp import Mlp, build_mlp
from models.prediction import Layer as PredictionLayer
from models.prediction import Prediction, build_prediction
from models.rope import Rope
from models.tables import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    attention_inputs,
    held_layers,
    held_parameters,
    kv_heads_held,
    tensor_name,
)
from parallel.context import ParallelContext
from parallel.expert import ExpertStep
from parallel.float8 import Matrix
from parallel.tensor import ColumnLinear, RowLinear, VocabularyEmbedding, VocabularyHead

Normalize = Callable[[Tensor], Tensor]


class Stream(NamedTuple):
    """What layers pass on, [T, hidden]: the norm that comes next adds what was made last, in the same launch."""

    hidden: Tensor
    made: Tensor | None = None

    def whole(self) -> Tensor:
        return self.hidden if self.made is None else self.hidden + self.made


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """Attention, then the MLP, each on the normalized stream; what they make is added to it, or first normalized."""

    rope: Rope
    before_attention: RMSNorm
    attention: SelfAttention | LatentSelfAttention
    after_attention: Normalize
    before_mlp: RMSNorm
    mlp: Mlp
    after_mlp: Normalize

    def __call__(self, stream: Stream, rotation: Rotation, attend: Attend, step: ExpertStep) -> Stream:
        hidden, normalized = self.before_attention.of_sum(*stream)
        made = self.after_attention(self.attention(normalized, rotation, attend))
        hidden, normalized = self.before_mlp.of_sum(hidden, made)
        return Stream(hidden, self.after_mlp(self.mlp(normalized, step)))


@dataclass(frozen=True, slots=True)
class DecoderModel:
    """One stage of a decoder, or a whole one. shards: the resident tensor behind each checkpoint name, for the loader.

    The first stage has the embedding, the last one norm and head. embedding_scale multiplies embeddings, logit_cap c
    bends each logit x to c * tanh(x / c); None leaves them alone.
    """

    config: ModelConfig
    embedding: VocabularyEmbedding | None
    embedding_scale: float | None
    rotaries: Mapping[Rope, RotaryEmbedding]
    layers: Sequence[DecoderLayer]
    norm: RMSNorm | None
    head: VocabularyHead | None
    prediction: Prediction | None
    shards: Mapping[str, Tensor]

    def __call__(self, batch: ForwardBatch, kv_cache: PagedCache, hidden: Tensor | None = None) -> Tensor:
        """hidden [T, hidden]: what the stage before has made of the batch, None on the first stage.

        The last stage returns normalized hidden states of the sampled tokens, [S, hidden], any other those of all
        tokens, [T, hidden]. Keys and values of all tokens are stored.
        """
        hidden = self.through(batch, kv_cache, hidden)
        return hidden if self.norm is None else self.sampled(batch, hidden)

    def through(self, batch: ForwardBatch, kv_cache: PagedCache, hidden: Tensor | None = None) -> Tensor:
        """The same on any stage for all tokens, [T, hidden], not normalized."""
        if self.embedding is not None:
            hidden = self.embedding(batch.token_ids)
            if self.embedding_scale is not None:
                hidden = hidden * self.embedding_scale
        assert hidden is not None, "a stage behind the first computes on what the one before sent"
        rotations = self.rotations(batch.positions, hidden.dtype)
        attend = PagedAttention(batch, kv_cache, {layer.attention.rule.window for layer in self.layers})
        stream = Stream(hidden)
        for layer in self.layers:
            stream = layer(stream, rotations[layer.rope], attend, batch.experts)
        return stream.whole()

    def sampled(self, batch: ForwardBatch, hidden: Tensor) -> Tensor:
        """[T, hidden] from the last layer -> those of the sampled tokens, normalized: [S, hidden]."""
        return self.normalized(hidden.index_select(0, batch.sample_index))

    def normalized(self, hidden: Tensor) -> Tensor:
        """Hidden states from the last layer, as the head reads them."""
        assert self.norm is not None, "the last stage has the norm"
        return self.norm(hidden)

    def predict(self, batch: ForwardBatch, kv_cache: PagedCache, hidden: Tensor, next_ids: Tensor) -> Tensor:
        """hidden [T, hidden] from the last layer, normalized, next_ids [T] behind the batch's -> of what follows
        the sampled tokens' next ids, normalized: [S, hidden]. Keys of all tokens are stored, behind those of layers."""
        assert self.prediction is not None, "the last stage predicts, where that is asked for"
        rule = self.layers[-1].attention.rule
        rotation = self.rotations(batch.positions, hidden.dtype)[self.layers[-1].rope]
        attend = PagedAttention(batch, kv_cache, {rule.window})
        made = self.prediction(next_ids, hidden, rotation, attend, batch.experts)
        return self.prediction.norm(made.index_select(0, batch.sample_index))

    def rotations(self, positions: Tensor, dtype: torch.dtype) -> Mapping[Rope, Rotation]:
        """Of these positions, [T], by each rope of the stage; dtype: of what is turned."""
        return {
            rope: rotary(positions, torch.float32 if rope.in_float32 else dtype)
            for rope, rotary in self.rotaries.items()
        }

    def part_logits(self, hidden: Tensor) -> Tensor:
        """hidden [S, hidden] -> [S, rows held]: this rank's part of the vocabulary, as the head takes it further."""
        assert self.head is not None, "the last stage has the head"
        logits = self.head.part(hidden)
        cap = self.config.logit_cap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def row_logits(self, hidden: Tensor) -> Tensor:
        """[k, vocabulary] logits of rows rank * k .. of hidden, k = ceil(S / tensor size); surplus rows are zeros."""
        assert self.head is not None, "the last stage has the head"
        return self.head.dealt(self.part_logits(hidden))

    @property
    def resident_bytes(self) -> int:
        """Bytes of every distinct tensor that the parameters occupy."""
        storages = {shard.untyped_storage().data_ptr(): shard.untyped_storage() for shard in self.shards.values()}
        return sum(storage.nbytes() for storage in storages.values())


def build_decoder(config: ModelConfig, context: ParallelContext) -> DecoderModel:
    """The stage of this rank with its tensors allocated on the context's device, uninitialized."""
    place, held = context.place, held_layers(config, context.place)
    weights = Weights(held_parameters(config, place), context)
    tied = place.last_stage and config.tie_word_embeddings
    predicts = place.last_stage and config.prediction is not None
    table = weights.take(tensor_name(config, EMBEDDING)) if place.first_stage or tied or predicts else None
    layers = tuple(_build_layer(config, context, weights, layer, layer - held.start) for layer in held)
    norm = weights.take(tensor_name(config, FINAL_NORM)) if place.last_stage else None
    head = table if tied else weights.take(tensor_name(config, HEAD)) if place.last_stage else None
    embedding = None if table is None else VocabularyEmbedding(table, context.tensor)
    prediction = None
    if predicts and embedding is not None:
        layer = _build_layer(config, context, weights, config.num_hidden_layers, len(held))
        prediction = build_prediction(config, weights, embedding, _alone(layer))
    return DecoderModel(
        config=config,
        embedding=embedding if place.first_stage else None,
        embedding_scale=_embedding_scale(config, context.dtype),
        rotaries={rope: _rotary(config, rope, context.device) for rope in {config.layers[n].rope for n in held}},
        layers=layers,
        norm=None if norm is None else RMSNorm(norm, config.rms_norm_eps, config.family.norms_from_one),
        head=None if head is None else VocabularyHead(head, config.vocab_size, context.tensor),
        prediction=prediction,
        shards=weights.shards(),
    )


def _embedding_scale(config: ModelConfig, dtype: torch.dtype) -> float | None:
    """Rounded to the dtype, as Gemma was trained."""
    if not config.family.scales_embeddings:
        return None
    return torch.tensor(math.sqrt(config.hidden_size), dtype=dtype).item()


def _rotary(config: ModelConfig, rope: Rope, device: torch.device) -> RotaryEmbedding:
    frequencies = rotary_frequencies(config.turning_dim, rope).to(device)
    return RotaryEmbedding(frequencies, rope.attention_factor, rope.interleaved)


def _build_layer(
    config: ModelConfig, context: ParallelContext, weights: Weights, layer: int, cached_layer: int
) -> DecoderLayer:
    """cached_layer: its number among those that the rank caches."""
    family, norms = config.family, config.family.norms

    def norm(part: str) -> RMSNorm:
        return RMSNorm(weights.take(tensor_name(config, part, layer)), config.rms_norm_eps, family.norms_from_one)

    def norm_if_any(part: str | None) -> Normalize:
        return _unchanged if part is None else norm(part)

    build_attention = _build_attention if config.latent is None else build_latent_attention
    return DecoderLayer(
        rope=config.layer(layer).rope,
        before_attention=norm(norms.before_attention),
        attention=build_attention(config, context, weights, layer, cached_layer),
        after_attention=norm_if_any(norms.after_attention),
        before_mlp=norm(norms.before_mlp),
        mlp=build_mlp(config, context, weights, layer),
        after_mlp=norm_if_any(norms.after_mlp),
    )


def _build_attention(
    config: ModelConfig, context: ParallelContext, weights: Weights, layer: int, cached_layer: int
) -> SelfAttention:
    family, inputs = config.family, attention_inputs(config)

    def matrix(*parts: str) -> Matrix:
        return weights.matrix(*(tensor_name(config, part, layer) for part in parts))

    def bias(held: bool, *parts: str) -> Tensor | None:
        return weights.take(*(tensor_name(config, part, layer, "bias") for part in parts)) if held else None

    def head_norm(part: str) -> RMSNorm | None:
        if not family.normalizes_heads:
            return None
        weight = weights.take(tensor_name(config, part, layer))
        return RMSNorm(weight, config.rms_norm_eps, family.norms_from_one)

    heads, kv_heads = config.num_attention_heads // context.tensor.size, kv_heads_held(config, context.tensor.size)
    return SelfAttention(
        layer=cached_layer,
        rule=AttentionRule(config.layer(layer).window, config.attention_scale, config.attention_cap),
        head_dim=config.head_dim,
        head_counts=[heads, kv_heads, kv_heads],
        qkv=ColumnLinear(matrix(*inputs), bias(config.qkv_bias, *inputs)),
        query_norm=head_norm("self_attn.q_norm"),
        key_norm=head_norm("self_attn.k_norm"),
        output=RowLinear(matrix("self_attn.o_proj"), bias(config.output_bias, "self_attn.o_proj"), context.tensor),
    )


def _alone(layer: DecoderLayer) -> PredictionLayer:
    """A layer that no other follows: hidden states -> hidden states."""

    def compute(hidden: Tensor, rotation: Rotation, attend: Attend, step: ExpertStep) -> Tensor:
        return layer(Stream(hidden), rotation, attend, step).whole()

    return compute


def _unchanged(hidden: Tensor) -> Tensor:
    return hidden
