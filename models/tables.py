"""The parameter table: every tensor of a model, its full shape and its placement.

The one list that the loader, the planner, the models' allocation and the tests read, so that they cannot disagree.
Pure, in the coordinator and in ranks; it knows no torch and no file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from models.config import ModelConfig
from models.families import ExpertKeys
from models.latent import latent_tensors
from models.parameter import Parameter
from models.quantization import Block, Quantization
from models.routing import Routing
from parallel.balance import placement_of
from parallel.degrees import Place
from parallel.partition import cut
from parallel.sharding import (
    Blocks,
    Placement,
    Replicated,
    Shape,
    Split,
    SplitVocabulary,
    units_held,
)

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens", "model.norm", "lm_head"
# Of a layer for multi-token prediction, beside a decoder layer's; its embedding and its head are the model's own.
PREDICTION_NORMS, PREDICTION_INPUT = ("enorm", "hnorm", "shared_head.norm"), "eh_proj"
_NOT_FLOAT8 = (".gate.weight", ".kv_b_proj.weight")  # of routers, and what heads take apart


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
    return tensor_name(config, f"{_expert_keys(config).block}.gate", layer)


def correction_name(config: ModelConfig, layer: int) -> str:
    """What a router adds to scores before it chooses."""
    return tensor_name(config, f"{_expert_keys(config).block}.gate", layer, "e_score_correction_bias")


def expert_names(config: ModelConfig, layer: int, expert: int) -> tuple[str, str, str]:
    """An expert's matrices: what gates, what is gated, and what makes the output of both."""
    return _gated_names(config, layer, f"experts.{expert}")


def shared_names(config: ModelConfig, layer: int) -> tuple[str, str, str]:
    """The same of the MLP beside the experts."""
    return _gated_names(config, layer, "shared_experts")


def _gated_names(config: ModelConfig, layer: int, block: str) -> tuple[str, str, str]:
    keys = _expert_keys(config)
    gate, up, down = (
        tensor_name(config, f"{keys.block}.{block}.{part}", layer) for part in (keys.gate, keys.up, keys.down)
    )
    return gate, up, down


def _expert_keys(config: ModelConfig) -> ExpertKeys:
    keys = config.family.experts
    assert keys is not None, f"{config.architecture} has no experts"
    return keys


def parameter_table(config: ModelConfig) -> tuple[Parameter, ...]:
    """Every tensor of the model. A tied head is the embedding, and is not listed."""
    vocabulary = (config.vocab_size, config.hidden_size)
    parameters = [Parameter(tensor_name(config, EMBEDDING), vocabulary, SplitVocabulary())]
    for layer in range(config.num_hidden_layers):
        parameters.extend(_with_scales(config, _layer(config, layer)))
    if config.prediction is not None:
        parameters.extend(_prediction(config, config.num_hidden_layers))
    parameters.append(Parameter(tensor_name(config, FINAL_NORM), (config.hidden_size,), Replicated()))
    if not config.tie_word_embeddings:
        parameters.append(Parameter(tensor_name(config, HEAD), vocabulary, SplitVocabulary()))
    return tuple(parameters)


def _with_scales(config: ModelConfig, parameters: Iterator[Parameter]) -> Iterator[Parameter]:
    """What stays 8 bit floats is marked, and followed by the scales of its blocks."""
    quantization = config.quantization or Quantization()
    for parameter in parameters:
        plain = len(parameter.shape) != 2 or parameter.name.endswith(_NOT_FLOAT8)
        if (block := quantization.held) is None or plain or _ends_within(parameter, block):
            yield parameter
            continue
        scales, blocks = quantization.scales_name(parameter.name), Blocks(parameter.placement, parameter.shape, block)
        yield replace(parameter, block=block, scales=scales)
        yield replace(parameter, name=scales, shape=blocks.shape, placement=blocks, wide=True)


def _ends_within(parameter: Parameter, block: Block) -> bool:
    """Whether what gates and what is gated end within a block, so that what is stacked on them would begin there. All
    of an expert is held alike."""
    match parameter.placement:
        case Split(0, sections) if sum(sections) == parameter.shape[0]:  # neurons, not heads
            return any(neurons % block[0] for neurons in sections)
        case Split(1, (neurons,)) if parameter.expert is not None:
            return neurons % block[0] != 0
    return False


def is_of_prediction(config: ModelConfig, name: str) -> bool:
    """Whether a tensor of a checkpoint is of its layers for multi-token prediction, in the table or not."""
    layers = range(config.num_hidden_layers, config.num_hidden_layers + config.prediction_layers)
    return name.startswith(tuple(f"{config.family.prefix}model.layers.{layer}." for layer in layers))


def _prediction(config: ModelConfig, layer: int) -> Iterator[Parameter]:
    hidden = config.hidden_size
    for part in PREDICTION_NORMS:
        yield Parameter(tensor_name(config, part, layer), (hidden,), Replicated(), layer)
    yield Parameter(tensor_name(config, PREDICTION_INPUT, layer), (hidden, 2 * hidden), Replicated(), layer)
    yield from _layer(config, layer)


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
    routing = config.layer(layer).routing
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


def _experts(config: ModelConfig, layer: int, routing: Routing) -> Iterator[Parameter]:
    hidden, neurons = config.hidden_size, routing.neurons
    yield Parameter(router_name(config, layer), (routing.experts, hidden), Replicated(), layer)
    if routing.corrected:
        yield Parameter(correction_name(config, layer), (routing.experts,), Replicated(), layer, wide=True)
    if shared := routing.shared_neurons:
        gate, up, down = shared_names(config, layer)
        yield Parameter(gate, (shared, hidden), Split(0, (shared,)), layer, shared=True)
        yield Parameter(up, (shared, hidden), Split(0, (shared,)), layer, shared=True)
        yield Parameter(down, (hidden, shared), Split(1, (shared,)), layer, shared=True)
    for expert in range(routing.experts):
        gate, up, down = expert_names(config, layer, expert)
        yield Parameter(gate, (neurons, hidden), Split(0, (neurons,)), layer, expert)
        yield Parameter(up, (neurons, hidden), Split(0, (neurons,)), layer, expert)
        yield Parameter(down, (hidden, neurons), Split(1, (neurons,)), layer, expert)


def stage_layers(config: ModelConfig, pipeline: int) -> tuple[range, ...]:
    """The decoder layers of each stage, cut so that stages read alike many numbers, head and prediction included."""
    numbers = [0.0] * (config.num_hidden_layers + 1)
    head = config.vocab_size * config.hidden_size
    for parameter in parameter_table(config):
        if parameter.layer is not None and not isinstance(parameter.placement, Blocks):
            numbers[parameter.layer] += math.prod(parameter.shape)
    *layers, prediction = numbers
    return cut(layers, pipeline, last=head + prediction)


def held_layers(config: ModelConfig, place: Place) -> range:
    """The decoder layers that a rank computes, that of prediction left out."""
    return stage_layers(config, place.degrees.pipeline)[place.pipeline_rank]


def cached_layers(config: ModelConfig, place: Place) -> range:
    """The layers whose keys and values a rank caches: what it computes, and on the last stage that of prediction."""
    held = held_layers(config, place)
    return range(held.start, held.stop + (place.last_stage and config.prediction is not None))


def held_parameters(config: ModelConfig, place: Place) -> tuple[Parameter, ...]:
    """What a rank holds a part of: its stage's layers, and what comes before the first or after the last layer.

    A tied head is the embedding, so the last stage holds that too, as it does where it predicts.
    """
    layers = cached_layers(config, place)
    outside = set()
    if place.first_stage or (place.last_stage and (config.tie_word_embeddings or config.prediction is not None)):
        outside.add(tensor_name(config, EMBEDDING))
    if place.last_stage:
        outside |= {tensor_name(config, FINAL_NORM), tensor_name(config, HEAD)}
    experts = {layer: frozenset(held_experts(config, layer, place)) for layer in layers}
    return tuple(
        parameter
        for parameter in parameter_table(config)
        if (parameter.name in outside if parameter.layer is None else parameter.layer in layers)
        and (parameter.expert is None or parameter.expert in experts[parameter.layer or 0])
    )


def held_experts(config: ModelConfig, layer: int, place: Place) -> tuple[int, ...]:
    """The experts of a layer that a rank holds, or its part of, by slot, before any is moved."""
    routing = config.layer(layer).routing
    return () if routing is None else placement_of(routing.experts, place.degrees).slots[place.expert_rank]


def parameter_bytes(config: ModelConfig, place: Place, dtype_bytes: int) -> int:
    """Exactly the resident bytes of a rank's parameters; padding makes them the same on all tensor ranks."""
    return sum(
        math.prod(parameter.held_shape(place.degrees)) * parameter.held_bytes(dtype_bytes)
        for parameter in held_parameters(config, place)
    )


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
    return block_tokens * len(cached_layers(config, place)) * cached_numbers(config, place.degrees.tensor) * dtype_bytes
