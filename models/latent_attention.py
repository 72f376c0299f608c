"""Latent attention (MLA), absorbed: queries are turned into the latent space, where all heads read what is cached.

In rank processes. Of each token the cache holds the compressed vector behind its norm, and the rotated key beside it:
no key and no value of a head is ever made. Source: DeepSeek-V2 (2024), section 2.1.2 and appendix C. It knows its own
tensors and the attention it is handed, no batch and no cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.attention import AttentionRule
from models.config import ModelConfig
from models.latent import LatentAttention
from models.layers import Attend, RMSNorm, Rotation, Weights
from models.tables import tensor_name
from parallel.context import ParallelContext
from parallel.tensor import ColumnLinear, RowLinear

# Of the norms between the projections, as DeepSeek's code and transformers' have it: rms_norm_eps is for the others.
_EPSILON = 1e-6


@dataclass(frozen=True, slots=True)
class Queries:
    """This rank's heads of queries, [T, heads * head_dim]; compressed first where the model does."""

    compress: ColumnLinear | None
    norm: RMSNorm | None
    project: ColumnLinear

    def __call__(self, hidden: Tensor) -> Tensor:
        if self.compress is not None and self.norm is not None:
            hidden = self.norm(self.compress(hidden))
        return self.project(hidden)


@dataclass(frozen=True, slots=True)
class LatentSelfAttention:
    """Projections around attention in the latent space, whose one key/value head serves all heads.

    compress: what is cached, before norm and rotation, the same on all tensor ranks. expand: [heads held *
    (plain_dim + value_dim), rank], by head W_UK, which makes the plain part of its keys, and W_UV, which makes its
    values.
    """

    layer: int
    rule: AttentionRule
    shape: LatentAttention
    queries: Queries
    compress: ColumnLinear
    norm: RMSNorm
    expand: Tensor
    output: RowLinear

    def __call__(self, hidden: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        """hidden [T, hidden] -> the same shape; q (W_UK c) = (q W_UK) c, and the sum of W_UV c is W_UV of the sum."""
        shape = self.shape
        to_keys, to_values = self.expand.view(-1, shape.plain_dim + shape.value_dim, shape.rank).split(
            [shape.plain_dim, shape.value_dim], dim=1
        )
        query = self.queries(hidden).view(len(hidden), len(to_keys), shape.head_dim)
        plain, turning = query.split([shape.plain_dim, shape.rotary_dim], dim=-1)
        absorbed = torch.bmm(plain.transpose(0, 1), to_keys).transpose(0, 1)  # [T, heads, rank]
        compressed, key = self.compress(hidden).unsqueeze(1).split([shape.rank, shape.rotary_dim], dim=-1)
        read = attend(
            self.layer,
            self.rule,
            torch.cat((absorbed, rotation(turning)), dim=-1),
            torch.cat((self.norm(compressed), rotation(key)), dim=-1),
            None,
        )
        values = torch.bmm(read.transpose(0, 1), to_values.mT)  # [heads, T, value_dim]
        return self.output(values.transpose(0, 1).flatten(1))


def build_latent_attention(
    config: ModelConfig, context: ParallelContext, weights: Weights, layer: int, cached_layer: int
) -> LatentSelfAttention:
    """The layer's attention, taken from the weights. cached_layer: its number among those that the rank caches."""
    latent = config.latent
    assert latent is not None, f"{config.architecture} compresses nothing"

    def take(part: str) -> Tensor:
        return weights.take(tensor_name(config, f"self_attn.{part}", layer))

    def norm(part: str) -> RMSNorm:
        return RMSNorm(take(part), _EPSILON, config.family.norms_from_one)

    compresses = latent.query_rank is not None
    return LatentSelfAttention(
        layer=cached_layer,
        rule=AttentionRule(
            config.layers[layer].window, config.attention_scale, config.attention_cap, key_holds=latent.rank
        ),
        shape=latent,
        queries=Queries(
            compress=ColumnLinear(take("q_a_proj")) if compresses else None,
            norm=norm("q_a_layernorm") if compresses else None,
            project=ColumnLinear(take("q_b_proj" if compresses else "q_proj")),
        ),
        compress=ColumnLinear(take("kv_a_proj_with_mqa")),
        norm=norm("kv_a_layernorm"),
        expand=take("kv_b_proj"),
        output=RowLinear(take("o_proj"), None, context.tensor),
    )
