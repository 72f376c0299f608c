"""Rope: how a model turns positions into rotations, and how its context was stretched, as config.json says it.

In the coordinator and in every rank. The numbers alone; `models/layers.py` makes frequencies of them. It knows no
torch, and refuses by name what is not computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from models.json_source import JsonSource


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Every frequency divided by the factor."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1's stretch of the rotary frequencies: long wavelengths by factor, short ones not, a ramp between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN: pairs that turn less than beta_slow times in the original context stretch by factor, those that turn
    more than beta_fast times do not, a ramp between; queries and keys are each scaled by attention_factor."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding: its base, and how it was stretched to longer contexts."""

    theta: float
    scaling: LinearScaling | Llama3Scaling | YarnScaling | None = None

    @property
    def attention_factor(self) -> float:
        """What cosines and sines are multiplied by."""
        return self.scaling.attention_factor if isinstance(self.scaling, YarnScaling) else 1.0


def read_rope(config: JsonSource) -> Rope:
    """From rope_parameters (transformers 5), or from rope_theta and rope_scaling (before)."""
    key = "rope_scaling" if config.get("rope_parameters") is None else "rope_parameters"
    table = config.table(key)
    theta = config.number("rope_theta", 10_000.0) if table.get("rope_theta") is None else table.number("rope_theta")
    partial = table.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial != 1:
        config.refuse(f"{key}.partial_rotary_factor={partial!r} is not supported")
    match table.get("rope_type") or table.get("type") or "default":
        # Frequencies of the dynamic kind follow the length of the sequence beyond max_position_embeddings, which keys
        # in a cache cannot. Requests end there, and up to there it is the default.
        case "default" | "dynamic":
            return Rope(theta)
        case "linear":
            return Rope(theta, LinearScaling(table.number("factor")))
        case "llama3":
            low, high = table.number("low_freq_factor"), table.number("high_freq_factor")
            return Rope(theta, Llama3Scaling(table.number("factor"), low, high, _original_context(config, table)))
        case "yarn":
            return Rope(theta, _read_yarn(config, table))
        case kind:
            supported = "default, linear, dynamic, llama3, yarn"
            config.refuse(f"{key}: rope type {kind!r} is not supported; supported: {supported}")


def _original_context(config: JsonSource, table: JsonSource) -> int:
    """transformers looks outside the table first, and takes the model's context if both are silent."""
    name = "original_max_position_embeddings"
    if config.get(name) is not None:
        return config.count(name)
    return table.count(name, config.count("max_position_embeddings"))


def _read_yarn(config: JsonSource, table: JsonSource) -> YarnScaling:
    factor = table.number("factor")
    return YarnScaling(
        factor=factor,
        original_max_position_embeddings=_original_context(config, table),
        attention_factor=table.optional_number("attention_factor") or _attention_factor(table, factor),
        beta_fast=table.number("beta_fast", 32.0),
        beta_slow=table.number("beta_slow", 1.0),
        truncate=table.flag("truncate", default=True),
    )


def _attention_factor(table: JsonSource, factor: float) -> float:
    """What YaRN recommends for the factor, or DeepSeek's ratio of two such numbers."""

    def recommended(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    mscale, mscale_all_dim = table.optional_number("mscale"), table.optional_number("mscale_all_dim")
    if mscale is None or mscale_all_dim is None:
        return recommended(1)
    return recommended(mscale) / recommended(mscale_all_dim)
