"""Routing: which layers have experts in place of an MLP, how many, and how a token chooses among them.

Read from config.json as transformers 4 and 5 write it, by the coordinator and by every rank. It knows no torch, no
weights and no rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from models.families import ExpertKeys
from models.json_source import JsonSource


@dataclass(frozen=True, slots=True)
class Routing:
    """The experts of a layer: gated MLPs of `neurons` each, of which a token passes through experts_per_token.

    normalizes: the chosen experts' shares are divided by their sum. shared_neurons: of an MLP beside them, 0 for none.
    """

    experts: int
    experts_per_token: int
    neurons: int
    normalizes: bool
    shared_neurons: int = 0


def read_routing(config: JsonSource, keys: ExpertKeys | None, layers: int) -> tuple[Routing | None, ...]:
    """Each layer's routing; None for a layer with an MLP. keys: None for a family without experts."""
    if keys is None:
        return (None,) * layers
    # transformers 5 writes num_local_experts for every family, and before it each family had its own key.
    name = keys.experts if config.get(keys.experts) is not None else "num_local_experts"
    experts, chosen = config.count(name), config.count("num_experts_per_tok")
    if chosen > experts:
        config.refuse(f"num_experts_per_tok={chosen} is more than {name}={experts}")
    shared = config.count("n_shared_experts", 0, minimum=0) if keys.shared else 0
    if not keys.shared and (config.get("shared_expert_intermediate_size") or config.get("n_shared_experts")):
        config.refuse("shared experts are not supported for this architecture")
    normalizes = keys.always_normalizes or config.flag("norm_topk_prob")
    neurons = config.count(keys.neurons)
    routing = Routing(experts, chosen, neurons, normalizes, shared * neurons)
    dense = _first_dense_layers(config, layers) if keys.shared else _dense_layers(config, layers)
    return tuple(None if layer in dense else routing for layer in range(layers))


def _dense_layers(config: JsonSource, layers: int) -> set[int]:
    """Layers that mlp_only_layers names, and all but each decoder_sparse_step-th."""
    named = config.get("mlp_only_layers", [])
    if not isinstance(named, list) or not all(type(layer) is int and 0 <= layer < layers for layer in named):
        config.refuse(f"mlp_only_layers must be a list of layers of 0 to {layers - 1}, found {named!r}")
    every = config.count("decoder_sparse_step", 1)
    return set(named) | {layer for layer in range(layers) if (layer + 1) % every}


def _first_dense_layers(config: JsonSource, layers: int) -> set[int]:
    """The first first_k_dense_replace layers, and all but those whose number moe_layer_freq divides."""
    first, every = config.count("first_k_dense_replace", 0, minimum=0), config.count("moe_layer_freq", 1)
    return {layer for layer in range(layers) if layer < first or layer % every}
