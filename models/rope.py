"""Rope: how a model turns positions into rotations, and how its context was stretched, as config.json says it.

In the coordinator and in every rank. The numbers alone; `models/layers.py` makes frequencies of them. It knows no
torch, and refuses by name what is not computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from models.families import FULL, SLIDING, Family
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
class LongRopeScaling:
    """LongRoPE: each pair's wavelength times a factor of its own; queries and keys are each scaled by
    attention_factor."""

    factors: tuple[float, ...]
    attention_factor: float


Scaling = LinearScaling | Llama3Scaling | YarnScaling | LongRopeScaling


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding: its base, how it was stretched, and the leading part of a head that it turns.

    interleaved: the pairs that turn are neighbours; otherwise one number is in the first half, the other in the second.
    in_float32: so it is turned, whatever the dtype.
    """

    theta: float
    scaling: Scaling | None = None
    partial_rotary_factor: float = 1.0
    interleaved: bool = False
    in_float32: bool = False

    @property
    def attention_factor(self) -> float:
        """What cosines and sines are multiplied by."""
        return self.scaling.attention_factor if isinstance(self.scaling, YarnScaling | LongRopeScaling) else 1.0

    def rotary_dim(self, head_dim: int) -> int:
        """How many of a head's numbers are turned."""
        return int(head_dim * self.partial_rotary_factor)


@dataclass(frozen=True, slots=True)
class RopeReader:
    """Reads the ropes of a config. max_context: tokens of the longest request that will be served."""

    config: JsonSource
    family: Family
    head_dim: int
    max_context: int

    def by_kind(self) -> dict[str, Rope]:
        """Of each kind of layer: from rope_parameters (transformers 5), or rope_theta and rope_scaling (before)."""
        config, new, table = self.config, self.config.get("rope_parameters") is not None, self._table()
        apart = FULL in table.values or SLIDING in table.values
        theta = config.number("rope_theta", 10_000.0)
        if apart != (self.family.rotates_locally and new):
            each = "for each kind of layer" if self.family.rotates_locally else "once for all layers"
            config.refuse(f"rope_parameters={dict(table.values)!r} is not supported; this architecture has them {each}")
        if not self.family.rotates_locally:
            rope = self._rope(table, theta)
            return {FULL: rope, SLIDING: rope}
        local_theta = config.number("rope_local_base_freq", 10_000.0)
        full = table.table(FULL) if new else table  # rope_scaling never was for layers with a window
        return {FULL: self._rope(full, theta), SLIDING: self._rope(table.table(SLIDING), local_theta)}

    def score_factor(self) -> float:
        """What the products of queries and keys are multiplied by besides. DeepSeek's: YaRN stretches them as much."""
        table = self._table()
        weight = _mscale(table, "mscale_all_dim") if self.family.latent else None
        if weight is None or _kind(table) == "default":
            return 1.0
        return _recommended(table.number("factor"), weight) ** 2

    def _table(self) -> JsonSource:
        return self.config.table("rope_scaling" if self.config.get("rope_parameters") is None else "rope_parameters")

    def _rope(self, table: JsonSource, theta: float) -> Rope:
        partial = table.optional_number("partial_rotary_factor") or self.config.number("partial_rotary_factor", 1.0)
        if partial != 1 and not self.family.rotates_partly:
            self.config.refuse(f"partial_rotary_factor={partial:g} is not supported for this architecture")
        plain = Rope(
            table.optional_number("rope_theta") or theta,
            partial_rotary_factor=partial,
            interleaved=self.family.latent and self.config.flag("rope_interleave", default=True),
            in_float32=self.family.rotates_in_float32,
        )
        rotary_dim = plain.rotary_dim(self.head_dim)
        if rotary_dim % 2 != 0 or not 0 < rotary_dim <= self.head_dim:
            self.config.refuse(
                f"partial_rotary_factor={partial:g} of head_dim={self.head_dim} turns {rotary_dim} numbers; "
                f"it must be an even number of 2 to {self.head_dim}"
            )
        return replace(plain, scaling=self._scaling(table, pairs=rotary_dim // 2))

    def _scaling(self, table: JsonSource, pairs: int) -> Scaling | None:
        match _kind(table):
            # Frequencies of the dynamic kind follow the length of the sequence beyond max_position_embeddings, which
            # keys in a cache cannot. Requests end there, and up to there it is the default.
            case "default" | "dynamic":
                return None
            case "linear":
                return LinearScaling(table.number("factor"))
            case "llama3":
                low, high = table.number("low_freq_factor"), table.number("high_freq_factor")
                return Llama3Scaling(table.number("factor"), low, high, self._original_context(table))
            case "longrope" | "su":  # the second is what Phi-3 called it first
                return self._longrope(table, pairs)
            case "yarn":
                return self._yarn(table)
            case kind:
                key = table.name("rope_type" if table.get("rope_type") else "type")
                supported = "default, linear, dynamic, llama3, yarn, longrope"
                self.config.refuse(f"{key}={kind!r} is not supported; supported: {supported}")

    def _longrope(self, table: JsonSource, pairs: int) -> LongRopeScaling:
        """transformers turns a sequence by the short factors up to the original context, and from the token behind it
        on by the long ones, computing all its keys anew. Keys in a cache stay as they are: here the long factors hold
        for all requests if any of them may grow beyond the original context, and the short ones if none can.
        """
        original = self._original_context(table)
        factors = {key: table.numbers(key) for key in ("short_factor", "long_factor")}
        for key, values in factors.items():
            if len(values) != pairs:
                table.refuse(f"{key} has {len(values)} numbers, and {pairs} pairs of each head are turned")
        attention_factor = table.optional_number("attention_factor")
        if attention_factor is None:
            if original == 1:
                self.config.refuse("rope type 'longrope' needs an attention_factor if the original context is 1 token")
            factor = table.optional_number("factor") or self.config.count("max_position_embeddings") / original
            attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
        chosen = "long_factor" if self.max_context > original else "short_factor"
        return LongRopeScaling(factors[chosen], attention_factor)

    def _yarn(self, table: JsonSource) -> YarnScaling:
        factor = table.number("factor")
        return YarnScaling(
            factor=factor,
            original_max_position_embeddings=self._original_context(table),
            attention_factor=table.optional_number("attention_factor") or _attention_factor(table, factor),
            beta_fast=table.number("beta_fast", 32.0),
            beta_slow=table.number("beta_slow", 1.0),
            truncate=table.flag("truncate", default=True),
        )

    def _original_context(self, table: JsonSource) -> int:
        """transformers looks outside the table first, and takes the model's context if both are silent."""
        name = "original_max_position_embeddings"
        if self.config.get(name) is not None:
            return self.config.count(name)
        return table.count(name, self.config.count("max_position_embeddings"))


def _kind(table: JsonSource) -> object:
    return table.get("rope_type") or table.get("type") or "default"


def _attention_factor(table: JsonSource, factor: float) -> float:
    """What YaRN recommends for the factor, or DeepSeek's ratio of two such numbers."""
    mscale, mscale_all_dim = _mscale(table, "mscale"), _mscale(table, "mscale_all_dim")
    if mscale is None or mscale_all_dim is None:
        return _recommended(factor, 1)
    return _recommended(factor, mscale) / _recommended(factor, mscale_all_dim)


def _mscale(table: JsonSource, key: str) -> float | None:
    """None where it is 0, as in transformers: the default of DeepSeek's code."""
    return table.optional_number(key) if table.get(key) != 0 else None


def _recommended(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
