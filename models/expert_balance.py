"""Balances experts over the ranks of a stage by what their routers have chosen since the last time.

In rank processes, between two steps, called by every rank of the stage. All see the same sums of loads and decide
alike, so no rank tells another what to do. It knows no step and no command.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from models.decoder import DecoderModel
from models.moe import MixtureOfExperts
from parallel.balance import ExpertLayout, imbalance, place_experts
from parallel.context import ParallelContext
from parallel.expert import ExchangedExperts
from parallel.expert_moves import move_experts


@dataclass(frozen=True, slots=True)
class Rebalanced:
    """One layer: the heaviest rank over the mean of ranks before and after, for the same loads; slots that came from
    other ranks to this one."""

    before: float
    after: float
    received: int


def rebalance_experts(model: DecoderModel, context: ParallelContext, first_layer: int = 0) -> Mapping[int, Rebalanced]:
    """Every layer of the stage whose experts travel, by its number, counted from first_layer.

    1. Loads since the last time are added over the stage.
    2. A layer's new placement starts from its old one and moves few experts (`parallel/balance.py`).
    3. Weights and map change over in place.
    """
    done = {}
    for number, mlp, dispatcher in _exchanging(model, first_layer):
        held = dispatcher.map
        loads = [float(load) for load in dispatcher.stage.all_reduce(held.loads - held.balanced).tolist()]
        held.balanced.copy_(held.loads)
        layout = ExpertLayout(len(loads), context.place.degrees.expert, held.slots_per_rank)
        old, new = held.placement, place_experts(loads, layout, held.placement)
        received = move_experts(mlp.experts.parts(), held, new, dispatcher.stage, dispatcher.expert_tensor)
        done[number] = Rebalanced(imbalance(old, loads), imbalance(new, loads), received)
    return done


def _exchanging(model: DecoderModel, first_layer: int) -> Iterable[tuple[int, MixtureOfExperts, ExchangedExperts]]:
    for number, layer in enumerate(model.layers, first_layer):
        if isinstance(layer.mlp, MixtureOfExperts) and isinstance(layer.mlp.dispatcher, ExchangedExperts):
            yield number, layer.mlp, layer.mlp.dispatcher
