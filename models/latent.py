"""Latent attention (MLA): keys and values of all heads kept as one compressed vector a token, and a rotated key.

Read from config.json and listed in the parameter table; models/latent_attention.py computes it. Source: DeepSeek-V2
(2024), section 2.1. It knows no torch, no weights and no rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from models.json_source import JsonSource
from parallel.sharding import Placement, Replicated, Shape, Split


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """query_rank: of compressed queries, None if they are not; rank: of keys and values, which are what is cached.

    plain_dim and rotary_dim: the parts of a head's query and key, of which the second is rotated and shared by all
    heads; value_dim: of a head's value.
    """

    query_rank: int | None
    rank: int
    plain_dim: int
    rotary_dim: int
    value_dim: int

    @property
    def head_dim(self) -> int:
        """Of queries and keys."""
        return self.plain_dim + self.rotary_dim

    @property
    def cached_numbers(self) -> int:
        """Of a token in a layer, on every tensor rank: heads have no parts of their own."""
        return self.rank + self.rotary_dim


class LatentTensor(NamedTuple):
    """One of a layer's attention, by its name behind `self_attn.`."""

    name: str
    shape: Shape
    placement: Placement


def read_latent(config: JsonSource) -> LatentAttention:
    """The keys of config.json."""
    if config.flag("attention_bias"):
        config.refuse("attention_bias=true is not supported for this architecture")
    rotary_dim = config.count("qk_rope_head_dim")
    if rotary_dim % 2 != 0:
        config.refuse(f"qk_rope_head_dim={rotary_dim} is odd; rotary embeddings turn pairs of dimensions")
    return LatentAttention(
        query_rank=None if config.get("q_lora_rank") is None else config.count("q_lora_rank"),
        rank=config.count("kv_lora_rank"),
        plain_dim=config.count("qk_nope_head_dim"),
        rotary_dim=rotary_dim,
        value_dim=config.count("v_head_dim"),
    )


def latent_tensors(latent: LatentAttention, hidden: int, heads: int) -> Iterator[LatentTensor]:
    """What a layer's attention holds: what compresses is on every rank, what has heads is split by them."""
    by_head = Split(0, (heads,))
    queries = heads * latent.head_dim
    if latent.query_rank is None:
        yield LatentTensor("q_proj", (queries, hidden), by_head)
    else:
        yield LatentTensor("q_a_proj", (latent.query_rank, hidden), Replicated())
        yield LatentTensor("q_a_layernorm", (latent.query_rank,), Replicated())
        yield LatentTensor("q_b_proj", (queries, latent.query_rank), by_head)
    yield LatentTensor("kv_a_proj_with_mqa", (latent.cached_numbers, hidden), Replicated())
    yield LatentTensor("kv_a_layernorm", (latent.rank,), Replicated())
    yield LatentTensor("kv_b_proj", (heads * (latent.plain_dim + latent.value_dim), latent.rank), by_head)
    yield LatentTensor("o_proj", (hidden, heads * latent.value_dim), Split(1, (heads,)))
