"""How often the routers of a stage have chosen each expert: counters on the device, read without waiting for it.

In rank processes, beside the steps. A rank speaks for the rows that it has routed itself, so that what the ranks of a
stage say adds up to every row once. It knows no message and no step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from models.decoder import DecoderModel
from models.moe import MixtureOfExperts
from parallel.context import ParallelContext
from parallel.expert import ExchangedExperts, SplitExperts
from parallel.expert_map import ExpertMap


@dataclass(frozen=True, slots=True)
class LayerLoad:
    """rows: by expert, that have chosen it. slots: the experts of each rank that holds some, () where every rank holds
    a part of each."""

    rows: tuple[int, ...]
    slots: tuple[tuple[int, ...], ...] = ()


class ExpertLoads:
    """Of a stage's layers, numbered from first_layer. Built once the model has been warmed up: it begins at zero."""

    def __init__(self, model: DecoderModel, context: ParallelContext, first_layer: int) -> None:
        self._layers: dict[int, tuple[Tensor, ExpertMap | None]] = {}
        for number, layer in enumerate(model.layers, first_layer):
            if not isinstance(layer.mlp, MixtureOfExperts):
                continue
            match layer.mlp.dispatcher:
                case ExchangedExperts() as exchange:
                    self._layers[number] = exchange.map.loads, exchange.map
                case SplitExperts(counted=Tensor() as counted) if context.tensor.rank == 0:  # all route all rows
                    self._layers[number] = counted, None
        for loads, placed in self._layers.values():
            loads.zero_()
            if placed is not None:
                placed.balanced.zero_()
        self._coming: tuple[Tensor, torch.cuda.Event] | None = None

    def snapshot(self) -> Tensor | None:
        """[layers, experts]: what has been counted by when what is queued has run; None where there is nothing to."""
        rows = [
            loads.diff(prepend=loads.new_zeros(1)) if placed is None else loads.clone()
            for loads, placed in self._layers.values()
        ]
        return torch.stack(rows) if rows else None

    def read(self) -> Mapping[int, LayerLoad]:
        """What has been counted, by layer; on CUDA by when this was called before, and nothing if it is not here."""
        if not self._layers:
            return {}
        together = torch.stack([loads for loads, _ in self._layers.values()])  # [layers, experts]
        if together.is_cuda:
            arrived = self._arrived(together)
            if arrived is None:
                return {}
            together = arrived
        return {
            number: LayerLoad(_each(rows), ()) if placed is None else LayerLoad(tuple(rows), placed.placement.slots)
            for (number, (_, placed)), rows in zip(self._layers.items(), together.tolist(), strict=True)
        }

    def _arrived(self, together: Tensor) -> Tensor | None:
        """What was sent to the host the last time, if it has come; then this is sent after it."""
        before = self._coming
        if before is not None and not before[1].query():
            return None
        host = torch.empty(together.shape, dtype=together.dtype, pin_memory=True)
        host.copy_(together, non_blocking=True)
        self._coming = host, torch.cuda.current_stream(together.device).record_event()
        return None if before is None else before[0]


def _each(together: Sequence[int]) -> tuple[int, ...]:
    """Of each expert, from those of it and the ones before; these may have been read while they grew."""
    return tuple(max(0, later - earlier) for earlier, later in pairwise((0, *together)))
