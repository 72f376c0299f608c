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
from models.latent import latent_tensors
from models.routing import Routing
from parallel.degrees import Degrees, Place, divisors
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
    """A tensor by its name in the checkpoint; layer is None outside the decoder layers, expert None outside experts."""

    name: str
    shape: Shape
    placement: Placement
    layer: int | None = None
    expert: int | None = None

    def held_shape(self, degrees: Degrees) -> Shape:
        """The shape that each rank which holds a part of it keeps resident."""
        return held_shape(self.shape, self.placement, degrees.tensor if self.expert is None else degrees.expert_tensor)

    def held_regions(self, place: Place) -> tuple[Region, ...]:
        """The parts of the full tensor that a rank reads, and stacks along dim 0."""
        rank, size = place.tensor_rank, place.degrees.tensor
        if self.expert is not None:
            rank, size = place.expert_tensor_rank, place.degrees.expert_tensor
        return held_regions(self.shape, self.placement, rank, size)


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


def router_name(config: ModelConfig, layer: int) -> str:
    """The router of a layer with experts."""
    keys = config.family.experts
    assert keys is not None, f"{config.architecture} has no experts"
    return tensor_name(config, f"{keys.block}.gate", layer)


def expert_names(config: ModelConfig, layer: int, expert: int) -> tuple[str, str, str]:
    """An expert's matrices: what gates, what is gated, and what makes the output of both."""
    keys = config.family.experts
    assert keys is not None, f"{config.architecture} has no experts"
    gate, up, down = (
        tensor_name(config, f"{keys.block}.experts.{expert}.{part}", layer) for part in (keys.gate, keys.up, keys.down)
    )
    return gate, up, down


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
    hidden, norms = config.hidden_size, config.family.norms
    for part in (norms.before_attention, norms.after_attention, norms.before_mlp, norms.after_mlp):
        if part is not None:
            yield Parameter(tensor_name(config, part, layer), (hidden,), Replicated(), layer)
    if config.latent is not None:
        for part, shape, placement in latent_tensors(config.latent, hidden, config.num_attention_heads):
            yield Parameter(tensor_name(config, f"self_attn.{part}", layer), shape, placement, layer)
    else:
        yield from _attention(config, layer)
    routing = config.layers[layer].routing
    yield from _mlp(config, layer) if routing is None else _experts(config, layer, routing)


def _attention(config: ModelConfig, layer: int) -> Iterator[Parameter]:
    hidden, heads, head_dim = config.hidden_size, config.num_attention_heads, config.head_dim

    def parameter(part: str, shape: Shape, placement: Placement, kind: str = "weight") -> Parameter:
        return Parameter(tensor_name(config, part, layer, kind), shape, placement, layer)

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


def _mlp(config: ModelConfig, layer: int) -> Iterator[Parameter]:
    hidden, neurons = config.hidden_size, config.intermediate_size
    for part, sections in mlp_inputs(config).items():
        yield Parameter(tensor_name(config, part, layer), (sum(sections), hidden), Split(0, sections), layer)
    yield Parameter(tensor_name(config, "mlp.down_proj", layer), (hidden, neurons), Split(1, (neurons,)), layer)


def _gated(config: ModelConfig, block: str, layer: int, neurons: int) -> Iterator[Parameter]:
    """An MLP of three matrices, split by tensor."""
    for part in ("gate_proj", "up_proj"):
        name = tensor_name(config, f"{block}.{part}", layer)
        yield Parameter(name, (neurons, config.hidden_size), Split(0, (neurons,)), layer)
    name = tensor_name(config, f"{block}.down_proj", layer)
    yield Parameter(name, (config.hidden_size, neurons), Split(1, (neurons,)), layer)


def _experts(config: ModelConfig, layer: int, routing: Routing) -> Iterator[Parameter]:
    hidden, neurons = config.hidden_size, routing.neurons
    keys = config.family.experts
    yield Parameter(router_name(config, layer), (routing.experts, hidden), Replicated(), layer)
    if keys is not None and keys.corrected:
        name = tensor_name(config, f"{keys.block}.gate", layer, "e_score_correction_bias")
        yield Parameter(name, (routing.experts,), Replicated(), layer)
    if keys is not None and routing.shared_neurons:
        yield from _gated(config, f"{keys.block}.{keys.shared}", layer, routing.shared_neurons)
    for expert in range(routing.experts):
        gate, up, down = expert_names(config, layer, expert)
        yield Parameter(gate, (neurons, hidden), Split(0, (neurons,)), layer, expert)
        yield Parameter(up, (neurons, hidden), Split(0, (neurons,)), layer, expert)
        yield Parameter(down, (hidden, neurons), Split(1, (neurons,)), layer, expert)


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
    experts = {layer: held_experts(config, layer, place) for layer in layers}
    return tuple(
        parameter
        for parameter in parameter_table(config)
        if (parameter.name in outside if parameter.layer is None else parameter.layer in layers)
        and (parameter.expert is None or parameter.expert in experts[parameter.layer or 0])
    )


def held_experts(config: ModelConfig, layer: int, place: Place) -> range:
    """The experts of a layer that a rank holds, or its part of, before any is moved."""
    routing = config.layers[layer].routing
    held = 0 if routing is None else routing.experts // place.degrees.expert
    return range(place.expert_rank * held, (place.expert_rank + 1) * held)


def parameter_bytes(config: ModelConfig, place: Place, dtype_bytes: int) -> int:
    """Exactly the resident bytes of a rank's parameters; padding makes them the same on all tensor ranks."""
    shapes = (parameter.held_shape(place.degrees) for parameter in held_parameters(config, place))
    return dtype_bytes * sum(map(math.prod, shapes))


def kv_heads_held(config: ModelConfig, tensor_size: int) -> int:
    """Key/value heads on each tensor rank; with fewer heads than ranks, neighbours hold the same one."""
    return units_held(config.num_key_value_heads, tensor_size)


def cached_numbers(config: ModelConfig, tensor_size: int) -> int:
    """Numbers that a tensor rank caches for a token in each of its layers."""
    if config.latent is not None:
        return config.latent.cached_numbers
    return 2 * kv_heads_held(config, tensor_size) * config.head_dim


def kv_bytes_per_block(config: ModelConfig, place: Place, block_tokens: int, dtype_bytes: int) -> int:
    """Bytes that one block of keys and values takes on a rank, over all its layers."""
    return block_tokens * len(held_layers(config, place)) * cached_numbers(config, place.degrees.tensor) * dtype_bytes


def check_degrees(config: ModelConfig, degrees: Degrees) -> None:
    """Raises ConfigError with the arithmetic and the remedy if the model cannot be cut over so many ranks."""
    if degrees.pipeline > config.num_hidden_layers:
        raise ConfigError(
            f"pipeline={degrees.pipeline} stages for num_hidden_layers={config.num_hidden_layers}: each stage needs a "
            f"layer; pipeline may be 1 to {config.num_hidden_layers} ({degrees})",
            field="pipeline",
        )
    problem = _tensor_problem(config, degrees.tensor)
    if problem is not None:
        allowed = (t for t in range(1, config.num_attention_heads + 1) if _tensor_problem(config, t) is None)
        raise ConfigError(f"{problem}; tensor may be {', '.join(map(str, allowed))} ({degrees})", field="tensor")
    problem = _expert_problem(config, degrees.expert, degrees.expert_tensor)
    if problem is not None:
        splits = ((expert, degrees.stage_ranks // expert) for expert in divisors(degrees.stage_ranks))
        fitting = [expert for expert, split in splits if _expert_problem(config, expert, split) is None]
        remedy = f"expert may be {', '.join(map(str, fitting))}" if fitting else "change data or tensor"
        raise ConfigError(f"{problem}; {remedy} ({degrees})", field="expert")


def _tensor_problem(config: ModelConfig, tensor: int) -> str | None:
    for name, units in _split_units(config):
        if units % tensor != 0:
            return f"tensor={tensor} does not divide {name}={units}"
    if not can_split(config.num_key_value_heads, tensor):
        heads = config.num_key_value_heads
        return f"tensor={tensor} neither divides num_key_value_heads={heads} nor is a multiple of it"
    return None


def _split_units(config: ModelConfig) -> Iterator[tuple[str, int]]:
    """What tensor ranks share equally, by its key in config.json."""
    yield "num_attention_heads", config.num_attention_heads
    if any(layer.routing is None for layer in config.layers):
        yield "intermediate_size", config.intermediate_size
    for shared in {layer.routing.shared_neurons for layer in config.layers if layer.routing is not None} - {0}:
        yield "n_shared_experts * moe_intermediate_size", shared


def _expert_problem(config: ModelConfig, expert: int, expert_tensor: int) -> str | None:
    keys = config.family.experts
    if keys is None:
        return f"expert={expert}: {config.architecture} has no experts" if expert > 1 else None
    for routing in {layer.routing for layer in config.layers if layer.routing is not None}:
        if routing.experts % expert != 0:
            return f"expert={expert} does not divide {keys.experts}={routing.experts}"
        if routing.neurons % expert_tensor != 0:
            return (
                f"expert={expert} lets {expert_tensor} ranks split each expert, which does not divide "
                f"{keys.neurons}={routing.neurons}"
            )
    return None
