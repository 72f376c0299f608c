"""Latent attention (MLA): of each token the cache holds a compressed vector, behind its norm, and one rotated key.

In rank processes. Decode is absorbed: queries are turned into the latent space, where all heads read what is cached,
and no key or value of a head is made. Long chunks of prompts make them, as they then cost less. Source: DeepSeek-V2
(2024), section 2.1.2 and appendix C. It knows its own tensors and the attention it is handed, no batch and no cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention import Places
from models.attention_rule import AttentionRule
from models.config import ModelConfig
from models.latent import LatentAttention
from models.layers import Attend, RMSNorm, Rotation, Weights, takes_rows
from models.tables import tensor_name
from parallel.context import ParallelContext
from parallel.float8 import Matrix
from parallel.tensor import ColumnLinear, RowLinear

# Of the norms between the projections, as DeepSeek's code and transformers' have it: rms_norm_eps is for the others.
_EPSILON = 1e-6
# On CUDA torch's kernels for heads as wide as the latent copy it for every head: keys of heads cost less from here on,
# the shortest chunk that was measured (docs/adr/0011-heads-read-the-latent-cache.md).
_EXPANDED_TOKENS_ON_CUDA = 16


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
class LatentQueries:
    """A batch's queries, [T, heads, plain_dim] and [T, heads, rotary_dim], of which the second are rotated.

    expand: [heads * (plain_dim + value_dim), rank], by head W_UK, which makes the plain part of its keys, and W_UV,
    which makes its values. q (W_UK c) = (q W_UK) c, and the sum of W_UV c is W_UV of the sum.
    """

    shape: LatentAttention
    expand: Tensor
    plain: Tensor
    rotated: Tensor

    @property
    def rank(self) -> int:
        return self.shape.rank

    @property
    def _by_head(self) -> tuple[Tensor, Tensor]:
        """W_UK [heads, plain_dim, rank] and W_UV [heads, value_dim, rank]."""
        parts = [self.shape.plain_dim, self.shape.value_dim]
        to_keys, to_values = self.expand.view(-1, sum(parts), self.shape.rank).split(parts, dim=1)
        return to_keys, to_values

    def absorbed(self, tokens: slice) -> Tensor:
        """[T, heads, rank + rotary_dim]."""
        query = torch.bmm(self.plain[tokens].transpose(0, 1), self._by_head[0]).transpose(0, 1)
        return torch.cat((query, self.rotated[tokens]), dim=-1)

    def values(self, read: Tensor) -> Tensor:
        """[T, heads, rank] -> [T, heads, value_dim]."""
        return torch.bmm(read.transpose(0, 1), self._by_head[1].mT).transpose(0, 1)

    def expanding_pays(self, tokens: int) -> bool:
        """On CUDA as measured; else by the products for each head and position: those that narrower keys and values
        save, and those that make them."""
        if self.plain.is_cuda:
            return tokens >= _EXPANDED_TOKENS_ON_CUDA
        shape = self.shape
        saved = shape.cached_numbers + shape.rank - shape.head_dim - shape.value_dim
        return tokens * saved > shape.rank * (shape.plain_dim + shape.value_dim)

    def made(self, compressed: Tensor) -> tuple[Tensor, Tensor]:
        """compressed [context, rank] -> plain parts of keys [context, heads, plain_dim], values [.., value_dim]."""
        parts = [self.shape.plain_dim, self.shape.value_dim]
        plain, values = F.linear(compressed, self.expand).view(len(compressed), -1, sum(parts)).split(parts, dim=-1)
        return plain, values

    def expanded(self, tokens: slice, cached: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys [heads, context, head_dim] and values [heads, context, value_dim] of heads."""
        shape, heads = self.shape, self.plain.shape[1]
        compressed, rotated = cached.split([shape.rank, shape.rotary_dim], dim=-1)
        plain, values = self.made(compressed)
        keys = torch.cat((plain, rotated.unsqueeze(1).expand(-1, heads, -1)), dim=-1)
        query = torch.cat((self.plain[tokens], self.rotated[tokens]), dim=-1)
        return query.transpose(0, 1), keys.transpose(0, 1), values.transpose(0, 1)


@dataclass(frozen=True, slots=True)
class LatentSelfAttention:
    """Projections around attention over what is cached, which is one for all heads.

    compress: makes it, before norm and rotation, the same on all tensor ranks. expand: of the heads held, as in
    LatentQueries.
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
        """hidden [T, hidden] -> the same shape."""
        shape = self.shape
        held = len(self.expand) // (shape.plain_dim + shape.value_dim)
        query = self.queries(hidden).view(len(hidden), held, shape.head_dim)
        turned = self.placed(query, self.compress(hidden), rotation, attend.places(self.layer))
        heads = LatentQueries(shape, self.expand, query[..., : shape.plain_dim], turned)
        return self.output(attend.latent(self.layer, self.rule, heads).flatten(1))

    def placed(self, query: Tensor, made: Tensor, rotation: Rotation, places: Places) -> Tensor:
        """Puts what is cached in its places: made [T, cached numbers], normalized and rotated. query [T, heads,
        head_dim] -> their parts that are rotated, [T, heads, rotary_dim]."""
        shape = self.shape
        if takes_rows(query) and query.is_contiguous() and made.is_contiguous():
            from models.kernels.heads import place_latent

            return place_latent(query, made, self.norm, rotation, places)
        compressed, key = made.unsqueeze(1).split([shape.rank, shape.rotary_dim], dim=-1)
        places.put(torch.cat((self.norm(compressed), rotation(key)), dim=-1))
        return rotation(query[..., shape.plain_dim :])


def build_latent_attention(
    config: ModelConfig, context: ParallelContext, weights: Weights, layer: int, cached_layer: int
) -> LatentSelfAttention:
    """The layer's attention, taken from the weights. cached_layer: its number among those that the rank caches."""
    latent = config.latent
    assert latent is not None, f"{config.architecture} compresses nothing"

    def take(part: str) -> Tensor:
        return weights.take(tensor_name(config, f"self_attn.{part}", layer))

    def matrix(part: str) -> Matrix:
        return weights.matrix(tensor_name(config, f"self_attn.{part}", layer))

    def norm(part: str) -> RMSNorm:
        return RMSNorm(take(part), _EPSILON, config.family.norms_from_one)

    compresses = latent.query_rank is not None
    return LatentSelfAttention(
        layer=cached_layer,
        rule=AttentionRule(config.layer(layer).window, config.attention_scale, config.attention_cap),
        shape=latent,
        queries=Queries(
            compress=ColumnLinear(matrix("q_a_proj")) if compresses else None,
            norm=norm("q_a_layernorm") if compresses else None,
            project=ColumnLinear(matrix("q_b_proj" if compresses else "q_proj")),
        ),
        compress=ColumnLinear(matrix("kv_a_proj_with_mqa")),
        norm=norm("kv_a_layernorm"),
        expand=take("kv_b_proj"),
        output=RowLinear(matrix("o_proj"), None, context.tensor),
    )
