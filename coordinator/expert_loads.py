"""How often experts were chosen, as the ranks last told, added up by layer.

On the coordinator's loop, between the internal and the public server. Knows no gRPC.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from echelon.types import ExpertLoad

Layers = Sequence[ExpertLoad]


class ExpertLoads:
    """The last word of each rank. It counts since its epoch began, and so its next word takes the place of this one."""

    def __init__(self) -> None:
        self._told: dict[tuple[int, int], tuple[int, Layers]] = {}

    def told(self, replica: int, rank: int, epoch: int, layers: Layers) -> None:
        """A rank of this epoch has chosen so in its layers; other ranks of its stage speak of other rows."""
        self._told[replica, rank] = epoch, layers

    def describe(self, epochs: Mapping[int, int]) -> list[ExpertLoad]:
        """Each layer of each replica, of the epoch that it is in now, by replica and number."""
        layers: defaultdict[tuple[int, int], list[ExpertLoad]] = defaultdict(list)
        for (replica, _), (epoch, told) in sorted(self._told.items()):
            if epochs.get(replica) == epoch:
                for load in told:
                    layers[replica, load.layer].append(load)
        return [_total(loads) for _, loads in sorted(layers.items())]


def _total(loads: Sequence[ExpertLoad]) -> ExpertLoad:
    """Of the ranks that compute a layer; they agree on where its experts lie."""
    first = loads[0]
    rows = tuple(map(sum, zip(*(load.rows for load in loads), strict=True)))
    return ExpertLoad(replica=first.replica, epoch=first.epoch, layer=first.layer, rows=rows, slots=first.slots)
