"""What a rank tells the coordinator of its experts: how often each was chosen, when that has changed.

In every rank, with its heartbeats. Knows no device: the counters are read by `models/expert_load.py`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

import structlog

from echelon.internal.v1 import control_pb2
from models.expert_load import ExpertLoads, LayerLoad

LEAST_S = 1.0  # between two messages: with hundreds of experts in tens of layers they are large

log = structlog.get_logger("rank")


class ExpertLoadNews:
    """Of one epoch."""

    def __init__(self, loads: ExpertLoads) -> None:
        self.loads = loads
        self._told: Mapping[int, LayerLoad] = {}
        self._looked_s = -math.inf

    def forget_told(self) -> None:
        """Whoever listens now has heard nothing yet."""
        self._told, self._looked_s = {}, -math.inf

    def news(self) -> control_pb2.ExpertLoads | None:
        """All counts, if any has changed since they were told; looked at once a second."""
        now_s = time.monotonic()
        if now_s - self._looked_s < LEAST_S:
            return None
        self._looked_s = now_s
        try:
            found = self.loads.read()
        except RuntimeError as error:  # of the device: what runs there tells it as a fault, and a rank's life goes on
            log.warning("choices of experts cannot be read", error=str(error))
            return None
        if not found or found == self._told:
            return None
        self._told = found
        return control_pb2.ExpertLoads(layers=[_to_proto(layer, load) for layer, load in found.items()])


def _to_proto(layer: int, load: LayerLoad) -> control_pb2.LayerLoad:
    slots = [expert for rank in load.slots for expert in rank]
    width = len(load.slots[0]) if load.slots else 0
    return control_pb2.LayerLoad(layer=layer, rows=load.rows, slots=slots, slots_per_rank=width)
