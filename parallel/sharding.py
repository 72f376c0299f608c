"""Where the pieces of a tensor live: placements, and the slice of a full tensor that each rank holds.

Pure arithmetic on shapes, read by the model tables, the planner, the loader and the tests, in the coordinator and in
ranks. It knows no torch, no model and no process group.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

Shape = tuple[int, ...]
Region = tuple[slice, ...]


@dataclass(frozen=True, slots=True)
class Replicated:
    """Every rank holds the whole tensor."""


@dataclass(frozen=True, slots=True)
class Split:
    """dim consists of equal units (heads, neurons) that are dealt out in order, section by section.

    sections: the units of each of the matrices that the tensor stacks along dim: (heads,), or (query heads, key heads,
    value heads). More ranks than units: each unit is held by size / units neighbouring ranks, as key/value heads are.
    """

    dim: int
    sections: tuple[int, ...]

    def __post_init__(self) -> None:
        assert self.dim == 0 or len(self.sections) == 1, f"sections are stacked along dim 0, not {self.dim}"


@dataclass(frozen=True, slots=True)
class SplitVocabulary:
    """dim 0 is the vocabulary, cut into equal runs of ceil(vocabulary / size) rows; the last ones are padded."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """A number for each block of a matrix, which lies where its block does; no rank's part begins within a block.

    placement, matrix: of the matrix, its placement and full shape. block: its rows and columns.
    """

    placement: Placement
    matrix: Shape
    block: tuple[int, int]

    @property
    def shape(self) -> Shape:
        return self.over(self.matrix)

    def over(self, shape: Shape) -> Shape:
        """Blocks of such a part of the matrix."""
        return tuple(-(-length // size) for length, size in zip(shape, self.block, strict=True))


Placement = Replicated | Split | SplitVocabulary | Blocks


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
        case Split(dim, sections):
            assert shape[dim] % sum(sections) == 0, f"dim {dim} of {shape} is not made of {sections} units"
            held = sum(units_held(units, size) for units in sections)
            return (*shape[:dim], shape[dim] // sum(sections) * held, *shape[dim + 1 :])
        case SplitVocabulary():
            return (math.ceil(shape[0] / size), *shape[1:])
        case Blocks(of, matrix):
            return placement.over(held_shape(matrix, of, size))


def held_regions(shape: Shape, placement: Placement, rank: int, size: int) -> tuple[Region, ...]:
    """The parts of the full tensor that rank reads; one behind the other they are held_shape without padding."""
    assert 0 <= rank < size, f"rank {rank} of {size}"
    whole = tuple(slice(0, length) for length in shape)
    match placement:
        case Replicated():
            return (whole,)
        case Split(dim, sections):
            unit = shape[dim] // sum(sections)
            firsts = itertools.accumulate(sections, initial=0)
            runs = [
                (first + rank * units // size, units_held(units, size))
                for first, units in zip(firsts, sections, strict=False)
            ]
            return tuple(
                (*whole[:dim], slice(start * unit, (start + units) * unit), *whole[dim + 1 :]) for start, units in runs
            )
        case SplitVocabulary():
            rows = math.ceil(shape[0] / size)
            return ((slice(min(rank * rows, shape[0]), min((rank + 1) * rows, shape[0])), *whole[1:]),)
        case Blocks(of, matrix, block):
            return tuple(
                tuple(slice(part.start // n, -(-part.stop // n)) for part, n in zip(region, block, strict=True))
                for region in held_regions(matrix, of, rank, size)
            )


def region_shape(region: Region) -> Shape:
    """The shape of the tensor that a region cuts out."""
    return tuple(part.stop - part.start for part in region)
