"""The parameter table: every tensor of a model, its full shape and its placement.

The one list that the loader, the planner, the models' allocation and the tests read, so that they cannot disagree.
Pure, in the coordinator and in ranks; it knows no torch and no file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from echelon.errors import ConfigError
from models.config import ModelConfig
from parallel.sharding import (
    Placement,
    Region,
    Replicated,
    Shape,
    Split,
    SplitVocabulary,
    can_split,
    held_regions,
    held_shape,
    units_held,
)

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens", "model.norm", "lm_head"


@dataclass(frozen=True, slots=True)
class Parameter:
    """A tensor by its name in the checkpoint; layer is None outside the decoder layers."""

    name: str
    shape: Shape
    placement: Placement
    layer: int | None = None

    def held_shape(self, tensor_size: int) -> Shape:
        """The shape each tensor rank keeps resident."""
        return held_shape(self.shape, self.placement, tensor_size)

    def held_regions(self, tensor_rank: int, tensor_size: int) -> tuple[Region, ...]:
        """The parts of the full tensor that a tensor rank reads, and stacks along dim 0."""
        return held_regions(self.shape, self.placement, tensor_rank, tensor_size)


def tensor_name(config: ModelConfig, part: str, layer: int | None = None, kind: str = "weight") -> str:
    """The name in the checkpoint of a part of the model, or of a decoder layer."""
    place = "" if layer is None else f"model.layers.{layer}."
    return f"{config.family.prefix}{place}{part}.{kind}"


def attention_inputs(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """The matrices that make queries, keys and values, in this order, with the heads in each."""
    heads, key_value_heads = config.num_attention_heads, config.num_key_value_heads
    if config.family.fuses_projections:
        return {"self_attn.qkv_proj": (heads, key_value_heads, key_value_heads)}
    return {
        "self_attn.q_proj": (heads,),
        "self_attn.k_proj": (key_value_heads,),
        "self_attn.v_proj": (key_value_heads,),
    }


def mlp_inputs(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """The matrices that make what is gated and what gates, the gate first, with the neurons in each."""
    neurons = config.intermediate_size
    if config.family.fuses_projections:
        return {"mlp.gate_up_proj": (neurons, neurons)}
    return {"mlp.gate_proj": (neurons,), "mlp.up_proj": (neurons,)}


def parameter_table(config: ModelConfig) -> tuple[Parameter, ...]:
    """Every tensor of the model. A tied head is the embedding, and is not listed."""
    vocabulary = (config.vocab_size, config.hidden_size)
    parameters = [Parameter(tensor_name(config, EMBEDDING), vocabulary, SplitVocabulary())]
    for layer in range(config.num_hidden_layers):
        parameters.extend(_layer(config, layer))
    parameters.append(Parameter(tensor_name(config, FINAL_NORM), (config.hidden_size,), Replicated()))
    if not config.tie_word_embeddings:
        parameters.append(Parameter(tensor_name(config, HEAD), vocabulary, SplitVocabulary()))
    return tuple(parameters)


def _layer(config: ModelConfig, layer: int) -> Iterator[Parameter]:
    hidden, intermediate, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    heads, norms = config.num_attention_heads, config.family.norms

    def parameter(part: str, shape: Shape, placement: Placement, kind: str = "weight") -> Parameter:
        return Parameter(tensor_name(config, part, layer, kind), shape, placement, layer)

    for part in (norms.before_attention, norms.after_attention, norms.before_mlp, norms.after_mlp):
        if part is not None:
            yield parameter(part, (hidden,), Replicated())
    for part, sections in attention_inputs(config).items():
        rows = sum(sections) * head_dim
        yield parameter(part, (rows, hidden), Split(0, sections))
        if config.qkv_bias:
            yield parameter(part, (rows,), Split(0, sections), "bias")
    if config.family.normalizes_heads:
        yield parameter("self_attn.q_norm", (head_dim,), Replicated())
        yield parameter("self_attn.k_norm", (head_dim,), Replicated())
    yield parameter("self_attn.o_proj", (hidden, heads * head_dim), Split(1, (heads,)))
    if config.output_bias:
        yield parameter("self_attn.o_proj", (hidden,), Replicated(), "bias")
    for part, sections in mlp_inputs(config).items():
        yield parameter(part, (sum(sections), hidden), Split(0, sections))
    yield parameter("mlp.down_proj", (hidden, intermediate), Split(1, (intermediate,)))


def parameter_bytes(config: ModelConfig, tensor_rank: int, tensor_size: int, dtype_bytes: int) -> int:
    """Exactly the resident bytes of a tensor rank's parameters; padding makes them the same on every rank."""
    assert 0 <= tensor_rank < tensor_size, f"tensor rank {tensor_rank} of {tensor_size}"
    return dtype_bytes * sum(math.prod(p.held_shape(tensor_size)) for p in parameter_table(config))


def kv_heads_held(config: ModelConfig, tensor_size: int) -> int:
    """Key/value heads on each tensor rank; with fewer heads than ranks, neighbours hold the same one."""
    return units_held(config.num_key_value_heads, tensor_size)


def kv_bytes_per_block(config: ModelConfig, tensor_size: int, block_tokens: int, dtype_bytes: int) -> int:
    """Bytes that one block of keys and values takes on each rank, over all layers."""
    per_token = 2 * config.num_hidden_layers * kv_heads_held(config, tensor_size) * config.head_dim * dtype_bytes
    return block_tokens * per_token


def check_degrees(config: ModelConfig, tensor: int) -> None:
    """Raises ConfigError with the arithmetic and the remedy if the model cannot be cut over so many ranks."""
    problem = _degree_problem(config, tensor)
    if problem is None:
        return
    allowed = (t for t in range(1, config.num_attention_heads + 1) if _degree_problem(config, t) is None)
    raise ConfigError(f"{problem}; tensor may be {', '.join(map(str, allowed))}", field="tensor")


def _degree_problem(config: ModelConfig, tensor: int) -> str | None:
    if tensor < 1:
        return f"tensor={tensor} is not a number of ranks"
    for name in ("num_attention_heads", "intermediate_size"):
        units = getattr(config, name)
        if units % tensor != 0:
            return f"tensor={tensor} does not divide {name}={units}"
    if not can_split(config.num_key_value_heads, tensor):
        heads = config.num_key_value_heads
        return f"tensor={tensor} neither divides num_key_value_heads={heads} nor is a multiple of it"
    return None
