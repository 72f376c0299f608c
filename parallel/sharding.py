"""Where the pieces of a tensor live: placements, and the slice of a full tensor that each rank holds.

Pure arithmetic on shapes, read by the model tables, the planner, the loader and the tests, in the coordinator and in
ranks. It knows no torch, no model and no process group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

Shape = tuple[int, ...]
Region = tuple[slice, ...]


@dataclass(frozen=True, slots=True)
class Replicated:
    """Every rank holds the whole tensor."""


@dataclass(frozen=True, slots=True)
class Split:
    """dim consists of equal units (heads, neurons) that are dealt out in order.

    More ranks than units: each unit is held by size / units neighbouring ranks, as key/value heads are.
    """

    dim: int
    units: int


@dataclass(frozen=True, slots=True)
class SplitVocabulary:
    """dim 0 is the vocabulary, cut into equal runs of ceil(vocabulary / size) rows; the last ones are padded."""


Placement = Replicated | Split | SplitVocabulary


def can_split(units: int, size: int) -> bool:
    """Whether size ranks can share units evenly, or hold whole copies of them evenly."""
    return units % size == 0 or size % units == 0


def units_held(units: int, size: int) -> int:
    """How many of the units one of size ranks holds."""
    assert can_split(units, size), f"{units} units over {size} ranks"
    return max(1, units // size)


def held_shape(shape: Shape, placement: Placement, size: int) -> Shape:
    """The shape that each of size ranks keeps resident, padding included; equal on all of them."""
    match placement:
        case Replicated():
            return shape
        case Split(dim, units):
            assert shape[dim] % units == 0, f"dim {dim} of {shape} is not made of {units} units"
            return (*shape[:dim], shape[dim] // units * units_held(units, size), *shape[dim + 1 :])
        case SplitVocabulary():
            return (math.ceil(shape[0] / size), *shape[1:])


def held_region(shape: Shape, placement: Placement, rank: int, size: int) -> Region:
    """The part of the full tensor that rank reads: held_shape without padding."""
    assert 0 <= rank < size, f"rank {rank} of {size}"
    held = held_shape(shape, placement, size)
    region = [slice(0, length) for length in shape]
    match placement:
        case Split(dim, units):
            unit = shape[dim] // units
            start = rank * units // size * unit
            region[dim] = slice(start, start + held[dim])
        case SplitVocabulary():
            region[0] = slice(min(rank * held[0], shape[0]), min((rank + 1) * held[0], shape[0]))
    return tuple(region)


def region_shape(region: Region) -> Shape:
    """The shape of the tensor that a region cuts out."""
    return tuple(part.stop - part.start for part in region)
