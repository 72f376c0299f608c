"""Parts of a checkpoint's tensors on their way to where they stay: some rows as stored, with the scales they need.

In every rank. 8 bit floats become what they stand for here, on the device that keeps them, so that half the bytes
travel. Knows no model and no layout: a region may be cut across the blocks that share a scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from models.quantization import covering
from models.stored import ELEMENT_BYTES, StoredTensor
from parallel.sharding import Region, region_shape
from worker.weight_file import WeightFile

MOST_SCALED_NUMBERS = 4 << 20  # in a part: each takes eight bytes while it is multiplied


@dataclass(frozen=True, slots=True)
class Scales:
    """Those of a matrix, and rows and columns of the blocks that have one each."""

    stored: StoredTensor
    blocks: tuple[int, int]

    def read_bytes(self, region: Region) -> int:
        """What a region's take in the file."""
        return math.prod(region_shape(covering(region, self.blocks).region)) * ELEMENT_BYTES[self.stored.dtype]

    def read(self, file: WeightFile, region: Region) -> Tensor:
        """[rows of blocks, columns of blocks] that the region reaches into, in float32. Raises OSError."""
        covered = covering(region, self.blocks).region
        nothing = torch.empty(0, region_shape(covered)[1])  # which is all where a rank has none of the rows
        copies = [part.to(torch.float32, copy=True) for part in file.parts(self.stored, covered)]
        return torch.cat([nothing, *copies])


@dataclass(frozen=True, slots=True)
class Part:
    """values: some rows of a region, as stored; overwritten by the next part. bytes: that were read for it.

    scales: float32 [rows, columns of blocks], and the one of these that each column has; None where nothing is scaled.
    """

    values: Tensor
    bytes: int
    scales: tuple[Tensor, Tensor] | None = None

    def meant(self, device: torch.device) -> Tensor:
        """What the values stand for: themselves; or, on the device, their products with their scales, in float32."""
        if self.scales is None:
            return self.values
        by_row, column = (tensor.to(device) for tensor in self.scales)
        return self.values.to(device).float().mul_(by_row[:, column])


def plain_parts(file: WeightFile, stored: StoredTensor, region: Region) -> Iterator[Part]:
    """A region of a tensor that is stored as it is meant."""
    for values in file.parts(stored, region):
        yield Part(values, values.nbytes)


def scaled_parts(
    file: WeightFile, stored: StoredTensor, region: Region, grid: Tensor, scales: Scales
) -> Iterator[Part]:
    """A region of a matrix of 8 bit floats. grid: of its scales, as `Scales.read` gave them."""
    (rows, columns), covered = region, covering(region, scales.blocks)
    column = (torch.arange(columns.start, columns.stop) - covered.first_column) // scales.blocks[1]
    row = (torch.arange(rows.start, rows.stop) - covered.first_row) // scales.blocks[0]
    first, read_bytes = 0, scales.read_bytes(region)
    for values in file.parts(stored, region, max(1, MOST_SCALED_NUMBERS // stored.shape[1])):
        by_row = grid[row[first : first + len(values)]]
        yield Part(values, values.nbytes + read_bytes, (by_row, column))
        first, read_bytes = first + len(values), 0
