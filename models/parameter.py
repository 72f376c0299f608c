"""A tensor of a model: its full shape, its placement, and what of it each rank holds, in which dtype.

Pure, in the coordinator and in ranks. `models/tables.py` lists them. It knows no torch, no file and no model.
"""

from __future__ import annotations

from dataclasses import dataclass

from models.config import DTYPE_BYTES
from models.quantization import Block
from parallel.degrees import Degrees, Place
from parallel.sharding import Placement, Region, Shape, held_regions, held_shape

WIDE_BYTES, FLOAT8_BYTES = DTYPE_BYTES["float32"], 1


@dataclass(frozen=True, slots=True)
class Parameter:
    """A tensor by its name in the checkpoint; layer is None outside the decoder layers, expert None outside experts.

    shared: of the MLP beside a layer's experts. wide: kept in float32 at least, whatever the dtype of the model. block:
    of a matrix that stays 8 bit floats, whatever that dtype; scales: the name of those of its blocks.
    """

    name: str
    shape: Shape
    placement: Placement
    layer: int | None = None
    expert: int | None = None
    shared: bool = False
    wide: bool = False
    block: Block | None = None
    scales: str = ""

    def held_shape(self, degrees: Degrees) -> Shape:
        """The shape that each rank which holds a part of it keeps resident."""
        return held_shape(self.shape, self.placement, self._splitting_ranks(degrees))

    def held_regions(self, place: Place) -> tuple[Region, ...]:
        """The parts of the full tensor that a rank reads, and stacks along dim 0."""
        size = self._splitting_ranks(place.degrees)
        rank = place.tensor_rank if self.expert is None else place.expert_tensor_rank
        return held_regions(self.shape, self.placement, rank % size, size)

    def held_dtype(self, dtype: str) -> str:
        """The dtype that it has in a model of this one."""
        wide = self.held_bytes(DTYPE_BYTES[dtype]) > DTYPE_BYTES[dtype]
        return "float8_e4m3fn" if self.block else "float32" if wide else dtype

    def held_bytes(self, dtype_bytes: int) -> int:
        """Of each of its numbers in a model of so many."""
        return FLOAT8_BYTES if self.block else max(dtype_bytes, WIDE_BYTES) if self.wide else dtype_bytes

    def _splitting_ranks(self, degrees: Degrees) -> int:
        return splitting_ranks(degrees, expert=self.expert is not None, shared=self.shared)


def splitting_ranks(degrees: Degrees, *, expert: bool, shared: bool) -> int:
    """Ranks that have parts of a tensor of an expert, of what is shared beside them, or of anything else.

    What is shared is whole where each rank minds rows of its own, so that it needs no exchange besides the experts'.
    """
    if expert:
        return degrees.expert_tensor
    return 1 if shared and degrees.exchanges_rows else degrees.tensor
