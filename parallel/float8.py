"""Matrices that stay 8 bit floats on their device, with a scale for each block: half the bytes of bfloat16.

In rank processes. A product of few rows reads them as they are, by a kernel where there is one; of many it is one of 8
bit floats, where the device multiplies those: rows are rounded to them, as DeepSeek serves its models. Every other one
is with what they stand for, which is made for it and dropped: what it computes is what a matrix that was dequantised as
it was loaded would. It knows no model and no file.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel import kernels

# Measured on an H200 (benchmarks/results/2026-11-23-float8-h200.jsonl): the kernel is the fastest up to FEW_ROWS; up to
# SOME_ROWS it is where a product with quantised rows has too few neurons to keep all processors busy.
FEW_ROWS, SOME_ROWS, MANY_NEURONS = 16, 64, 6144
ROW_BLOCK = (1, 128)  # of numbers of a row that share a scale
LEAST_SCALE = 1e-12


class Way(Enum):
    """How a product with 8 bit floats is computed where there are kernels for it."""

    WEIGHTS_ALONE = auto()  # they become the dtype of the rows in registers
    ROWS_TOO = auto()  # rows become 8 bit floats
    DEQUANTISED = auto()  # the matrix becomes one of the dtype of the rows


def way_of(rows: int, neurons: int, quantises: bool) -> Way:
    """The fastest one that was measured. quantises: whether the device multiplies 8 bit floats."""
    if quantises and (rows > SOME_ROWS or (rows > FEW_ROWS and neurons >= MANY_NEURONS)):
        return Way.ROWS_TOO
    return Way.WEIGHTS_ALONE if rows <= SOME_ROWS else Way.DEQUANTISED


@dataclass(frozen=True, slots=True)
class Float8:
    """values [.., rows, columns] times scales [.., row blocks, column blocks] float32, one for each block of the
    matrix. block: its rows and columns; of stacked matrices each begins with a new block."""

    values: Tensor
    scales: Tensor
    block: tuple[int, int]

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    def stacked(self, count: int) -> Float8:
        """The same as so many matrices, [count, rows, columns]."""
        values, scales = (part.view(count, -1, part.shape[-1]) for part in (self.values, self.scales))
        return Float8(values, scales, self.block)

    def meant(self, dtype: torch.dtype) -> Tensor:
        """What the values stand for, as a loader makes it: a product in float32, rounded once."""
        if self.has_kernels(dtype):
            from parallel.kernels.float8 import dequantised

            return dequantised(self, dtype)
        rows, columns = self.shape[-2:]
        by_row = self.scales.repeat_interleave(self.block[0], -2)[..., :rows, :]
        return self.values.float().mul_(by_row.repeat_interleave(self.block[1], -1)[..., :columns]).to(dtype)

    def has_kernels(self, dtype: torch.dtype) -> bool:
        """Whether there are kernels that multiply rows of this dtype by these matrices."""
        return (
            dtype in kernels.DTYPES
            and self.block[1] % kernels.FLOAT8_COLUMNS == 0
            and kernels.can_run(self.values.device)
            and kernels.has_float8(self.values.device)
        )

    def multiplies_rows(self, dtype: torch.dtype) -> bool:
        """Whether torch has a product of such rows, as 8 bit floats, with this matrix: cuBLAS has one for Hopper."""
        neurons, inputs = self.shape[-2:]
        whole = inputs % ROW_BLOCK[1] == 0 and neurons % 16 == 0 and self.block == (128, 128)
        return whole and dtype == torch.bfloat16 and kernels.multiplies_float8(self.values.device)


Matrix = Tensor | Float8


def stored(matrix: Matrix) -> tuple[Tensor, ...]:
    """What a matrix is made of, 8 bit floats as bytes, for what copies tensors."""
    return (matrix.values.view(torch.uint8), matrix.scales) if isinstance(matrix, Float8) else (matrix,)


def stacked(matrix: Matrix, count: int) -> Matrix:
    """Matrices on top of each other, as so many: [count, rows, columns]."""
    return matrix.stacked(count) if isinstance(matrix, Float8) else matrix.view(count, -1, matrix.shape[-1])


def meant(matrix: Matrix, dtype: torch.dtype) -> Tensor:
    """A matrix as torch multiplies it."""
    return matrix.meant(dtype) if isinstance(matrix, Float8) else matrix


def quantised_rows(rows: Tensor) -> Float8:
    """rows [r, columns] -> 8 bit floats with a scale for each 128 numbers of a row: the greatest of them over 448, the
    greatest that e4m3 has. Source: DeepSeek-V3 (2024), section 3.3.2. The reference of a kernel."""
    count, columns = rows.shape
    groups = F.pad(rows.float(), (0, -columns % ROW_BLOCK[1])).view(count, -1, ROW_BLOCK[1])
    scales = groups.abs().amax(-1).clamp_min(LEAST_SCALE) / torch.finfo(torch.float8_e4m3fn).max
    values = (groups / scales.unsqueeze(-1)).to(torch.float8_e4m3fn)
    return Float8(values.view(count, -1)[:, :columns].contiguous(), scales, ROW_BLOCK)


def linear(x: Tensor, weight: Float8, bias: Tensor | None = None) -> Tensor:
    """x [r, columns] -> x W^T + b, [r, rows]. Every product of a layer but those of experts."""
    if not weight.has_kernels(x.dtype):
        return F.linear(x, weight.meant(x.dtype), bias)
    from parallel.kernels.float8 import linear_of_few_rows
    from parallel.kernels.float8_rows import linear_of_quantised

    match way_of(len(x), weight.shape[0], weight.multiplies_rows(x.dtype)):
        case Way.WEIGHTS_ALONE:
            made = linear_of_few_rows(x, weight)
        case Way.ROWS_TOO:
            made = linear_of_quantised(x, weight)
        case Way.DEQUANTISED:
            return F.linear(x, weight.meant(x.dtype), bias)
    return made if bias is None else made.add_(bias)
