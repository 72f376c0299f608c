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
from parallel.degrees import Degrees, Place
from parallel.partition import cut
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

    def held_shape(self, degrees: Degrees) -> Shape:
        """The shape that each rank which holds a part of it keeps resident."""
        return held_shape(self.shape, self.placement, degrees.tensor)

    def held_regions(self, place: Place) -> tuple[Region, ...]:
        """The parts of the full tensor that a rank reads, and stacks along dim 0."""
        return held_regions(self.shape, self.placement, place.tensor_rank, place.degrees.tensor)


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


def stage_layers(config: ModelConfig, pipeline: int) -> tuple[range, ...]:
    """The decoder layers of each stage, cut so that the stages read alike many numbers, the head's among them."""
    numbers = [0.0] * config.num_hidden_layers
    head = config.vocab_size * config.hidden_size
    for parameter in parameter_table(config):
        if parameter.layer is not None:
            numbers[parameter.layer] += math.prod(parameter.shape)
    return cut(numbers, pipeline, last=head)


def held_layers(config: ModelConfig, place: Place) -> range:
    """The decoder layers that a rank computes."""
    return stage_layers(config, place.degrees.pipeline)[place.pipeline_rank]


def held_parameters(config: ModelConfig, place: Place) -> tuple[Parameter, ...]:
    """What a rank holds a part of: its stage's layers, and what comes before the first or after the last layer.

    A tied head is the embedding, so the last stage holds that too.
    """
    layers = held_layers(config, place)
    outside = set()
    if place.first_stage or (place.last_stage and config.tie_word_embeddings):
        outside.add(tensor_name(config, EMBEDDING))
    if place.last_stage:
        outside |= {tensor_name(config, FINAL_NORM), tensor_name(config, HEAD)}
    return tuple(p for p in parameter_table(config) if (p.name in outside if p.layer is None else p.layer in layers))


def parameter_bytes(config: ModelConfig, place: Place, dtype_bytes: int) -> int:
    """Exactly the resident bytes of a rank's parameters; padding makes them the same on all tensor ranks."""
    shapes = (parameter.held_shape(place.degrees) for parameter in held_parameters(config, place))
    return dtype_bytes * sum(map(math.prod, shapes))


def kv_heads_held(config: ModelConfig, tensor_size: int) -> int:
    """Key/value heads on each tensor rank; with fewer heads than ranks, neighbours hold the same one."""
    return units_held(config.num_key_value_heads, tensor_size)


def kv_bytes_per_block(config: ModelConfig, place: Place, block_tokens: int, dtype_bytes: int) -> int:
    """Bytes that one block of keys and values takes on a rank, over all its layers."""
    heads = kv_heads_held(config, place.degrees.tensor)
    return block_tokens * 2 * len(held_layers(config, place)) * heads * config.head_dim * dtype_bytes


def check_degrees(config: ModelConfig, degrees: Degrees) -> None:
    """Raises ConfigError with the arithmetic and the remedy if the model cannot be cut over so many ranks."""
    if degrees.pipeline > config.num_hidden_layers:
        raise ConfigError(
            f"pipeline={degrees.pipeline} stages for num_hidden_layers={config.num_hidden_layers}: each stage needs a "
            f"layer; pipeline may be 1 to {config.num_hidden_layers} ({degrees})",
            field="pipeline",
        )
    if degrees.expert > 1:
        raise ConfigError(f"expert={degrees.expert}: {config.architecture} has no experts; leave it 1", field="expert")
    problem = _tensor_problem(config, degrees.tensor)
    if problem is not None:
        allowed = (t for t in range(1, config.num_attention_heads + 1) if _tensor_problem(config, t) is None)
        raise ConfigError(f"{problem}; tensor may be {', '.join(map(str, allowed))} ({degrees})", field="tensor")


def _tensor_problem(config: ModelConfig, tensor: int) -> str | None:
    for name in ("num_attention_heads", "intermediate_size"):
        units = getattr(config, name)
        if units % tensor != 0:
            return f"tensor={tensor} does not divide {name}={units}"
    if not can_split(config.num_key_value_heads, tensor):
        heads = config.num_key_value_heads
        return f"tensor={tensor} neither divides num_key_value_heads={heads} nor is a multiple of it"
    return None
