"""What follows attention in a layer: a gated MLP, or a mixture of experts, built as the config's layer says.

In rank processes. Both take a batch's rows and how rows travel to experts. It knows the table's names, no batch.
Where an expert's tensors lie in a slot is settled here, for the loader to fill.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from models.config import ModelConfig
from models.families import Gating
from models.layers import ACTIVATIONS, GatedMlp, Weights
from models.moe import BESIDE_ROWS, Experts, MixtureOfExperts
from models.router import GroupedSoftmaxRouter, Router, SigmoidRouter, SoftmaxRouter
from models.routing import Routing
from models.tables import (
    correction_name,
    expert_names,
    held_experts,
    mlp_inputs,
    router_name,
    shared_names,
    tensor_name,
)
from parallel.balance import placement_of
from parallel.comm import Group
from parallel.context import ParallelContext
from parallel.expert import Dispatcher, ExchangedExperts, ExpertStep, SplitExperts
from parallel.expert_map import ExpertMap
from parallel.float8 import stacked
from parallel.tensor import ColumnLinear, RowLinear


class Mlp(Protocol):
    """hidden [T, hidden], equal on all tensor ranks -> what is added to it, equal again."""

    def __call__(self, hidden: Tensor, step: ExpertStep) -> Tensor: ...


def build_mlp(config: ModelConfig, context: ParallelContext, weights: Weights, layer: int) -> Mlp:
    """The layer's MLP or experts, taken from the weights."""
    routing = config.layer(layer).routing
    if routing is not None:
        return _experts(config, context, weights, layer, routing)
    inputs = (tensor_name(config, part, layer) for part in mlp_inputs(config))
    return GatedMlp(
        gate_up=ColumnLinear(weights.matrix(*inputs)),
        activation=ACTIVATIONS[config.activation],
        down=RowLinear(weights.matrix(tensor_name(config, "mlp.down_proj", layer)), None, context.tensor),
    )


def _experts(
    config: ModelConfig, context: ParallelContext, weights: Weights, layer: int, routing: Routing
) -> MixtureOfExperts:
    names = [expert_names(config, layer, expert) for expert in held_experts(config, layer, context.place)]
    gate_up = weights.matrix(*(name for gate, up, _ in names for name in (gate, up)))
    down = weights.matrix(*(down for _, _, down in names))
    slots = len(names)
    return MixtureOfExperts(
        router=_router(config, weights, layer, routing),
        experts=Experts(
            stacked(gate_up, slots),
            stacked(down, slots),
            ACTIVATIONS[config.activation],
        ),
        dispatcher=experts_dispatcher(context, routing),
        shared=_shared(config, weights, layer) if routing.shared_neurons else None,
        side=context.beside,
        beside_rows=None if context.place.degrees.exchanges_rows else BESIDE_ROWS,
    )


def _router(config: ModelConfig, weights: Weights, layer: int, routing: Routing) -> Router:
    keys, chosen = config.family.experts, routing.experts_per_token
    assert keys is not None, f"{config.architecture} has no experts"
    weight = weights.take(router_name(config, layer))
    match routing.gating:
        case Gating.SOFTMAX:
            return SoftmaxRouter(weight, chosen, routing.normalizes, keys.rounds_shares)
        case Gating.DEEPSEEK_V2:
            return GroupedSoftmaxRouter(weight, chosen, routing.groups, routing.scale)
        case Gating.DEEPSEEK_V3:
            correction = weights.take(correction_name(config, layer))
            return SigmoidRouter(weight, correction, chosen, routing.groups, routing.normalizes, routing.scale)


def _shared(config: ModelConfig, weights: Weights, layer: int) -> GatedMlp:
    """Without a collective: what stands beside the experts is added to their sums before these are."""
    gate, up, down = shared_names(config, layer)
    return GatedMlp(
        gate_up=ColumnLinear(weights.matrix(gate, up)),
        activation=ACTIVATIONS[config.activation],
        down=RowLinear(weights.matrix(down), None, Group()),
    )


def experts_dispatcher(context: ParallelContext, routing: Routing) -> Dispatcher:
    """Rows travel unless every rank has them already, and a part of every expert."""
    degrees, experts = context.place.degrees, routing.experts
    if not degrees.exchanges_rows:
        return SplitExperts(context.tensor, experts, torch.zeros(experts, dtype=torch.int64, device=context.device))
    expert_map = ExpertMap.of(placement_of(experts, degrees), experts, context.device)
    return ExchangedExperts(context.stage, context.tensor, degrees.expert_tensor, expert_map)
