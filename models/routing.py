"""Routing: which layers have experts in place of an MLP, how many, and how a token chooses among them.

Read from config.json as transformers 4 and 5 write it, by the coordinator and by every rank; what is not computed is
refused here by its key. It knows no torch, no weights and no rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from models.families import ExpertKeys, Gating
from models.json_source import JsonSource

# What scoring_func and topk_method may be; the first is what a missing key means.
_SCORES: Mapping[Gating, str] = {Gating.DEEPSEEK_V2: "softmax", Gating.DEEPSEEK_V3: "sigmoid"}
_GREEDY, _GROUP_LIMITED = "greedy", "group_limited_greedy"
_METHODS: Mapping[Gating, tuple[str, ...]] = {
    Gating.DEEPSEEK_V2: (_GREEDY, _GROUP_LIMITED),
    Gating.DEEPSEEK_V3: ("noaux_tc",),
}
_JUDGED_BY_V3 = 2  # experts that a group is judged by


@dataclass(frozen=True, slots=True)
class Groups:
    """Experts lie in `count` groups of neighbours; a token chooses among those of the `chosen` best groups."""

    count: int
    chosen: int


@dataclass(frozen=True, slots=True)
class Routing:
    """The experts of a layer: gated MLPs of `neurons` each, of which a token passes through experts_per_token.

    normalizes: the chosen experts' shares are divided by their sum; then scale multiplies them. groups: None where all
    experts may be chosen. shared_neurons: of an MLP beside them, 0 for none.
    """

    experts: int
    experts_per_token: int
    neurons: int
    normalizes: bool
    shared_neurons: int = 0
    gating: Gating = Gating.SOFTMAX
    groups: Groups | None = None
    scale: float = 1.0

    @property
    def corrected(self) -> bool:
        """Whether a bias is added to scores before experts are chosen."""
        return self.gating is Gating.DEEPSEEK_V3


def read_routing(config: JsonSource, keys: ExpertKeys | None, layers: int) -> tuple[Routing | None, ...]:
    """Each layer's routing; None for a layer with an MLP. keys: None for a family without experts."""
    if keys is None:
        return (None,) * layers
    # transformers 5 writes num_local_experts for every family, and before it each family had its own key.
    name = keys.experts if config.get(keys.experts) is not None else "num_local_experts"
    experts, chosen = config.count(name), config.count("num_experts_per_tok")
    if chosen > experts:
        config.refuse(f"num_experts_per_tok={chosen} is more than {name}={experts}")
    neurons = config.count(keys.neurons)
    if keys.gating is Gating.SOFTMAX:
        if config.get("shared_expert_intermediate_size") or config.get("n_shared_experts"):
            config.refuse("shared experts are not supported for this architecture")
        normalizes = keys.always_normalizes or config.flag("norm_topk_prob")
        routing, dense = Routing(experts, chosen, neurons, normalizes), _dense_layers(config, layers)
    else:
        routing = _deepseek(config, keys.gating, Routing(experts, chosen, neurons, config.flag("norm_topk_prob")))
        dense = _first_dense_layers(config, layers)
    return tuple(None if layer in dense else routing for layer in range(layers))


def _deepseek(config: JsonSource, gating: Gating, routing: Routing) -> Routing:
    """What DeepSeek's keys add. What no published model asks for, and transformers passes over, is refused."""
    scores, methods = config.get("scoring_func", _SCORES[gating]), _METHODS[gating]
    if scores != _SCORES[gating]:
        config.refuse(f"scoring_func={scores!r} is not supported for this architecture; supported: {_SCORES[gating]}")
    spelt = config.get("topk_method", methods[0])
    method = _GREEDY if spelt == "gready" else spelt  # as DeepSeek's own code has it, and files that it wrote
    if method not in methods:
        config.refuse(f"topk_method={spelt!r} is not supported for this architecture; supported: {', '.join(methods)}")
    if gating is Gating.DEEPSEEK_V2 and routing.normalizes:
        config.refuse("norm_topk_prob=true is not supported for this architecture; supported: false")
    return Routing(
        routing.experts,
        routing.experts_per_token,
        routing.neurons,
        routing.normalizes,
        shared_neurons=config.count("n_shared_experts", 0, minimum=0) * routing.neurons,
        gating=gating,
        groups=None if method == _GREEDY else _groups(config, routing, gating),
        scale=config.number("routed_scaling_factor", 1.0),
    )


def _groups(config: JsonSource, routing: Routing, gating: Gating) -> Groups | None:
    groups = Groups(config.count("n_group", 1), config.count("topk_group", 1))
    experts, chosen = routing.experts, routing.experts_per_token
    if experts % groups.count:
        config.refuse(f"n_group={groups.count} does not divide n_routed_experts={experts}")
    if groups.chosen > groups.count:
        config.refuse(f"topk_group={groups.chosen} is more than n_group={groups.count}")
    size = experts // groups.count
    if chosen > size * groups.chosen:
        config.refuse(
            f"num_experts_per_tok={chosen} is more than topk_group={groups.chosen} groups of {size} experts have"
        )
    if gating is Gating.DEEPSEEK_V3 and size < _JUDGED_BY_V3:
        config.refuse(f"n_group={groups.count} leaves groups of {size} experts; they are judged by their best two")
    return None if groups.chosen == groups.count else groups


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
