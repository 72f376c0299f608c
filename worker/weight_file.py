"""Reads parts of the tensors in a safetensors file, through one small buffer, and not a byte of the rest.

In every rank. Runs of rows are read; runs of columns, which are many and short, are copied out of a mapping whose pages
are given back at once, for a mapped page stays resident until then. Knows no model and no layout.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.stored import ELEMENT_BYTES, FLOAT8, StoredTensor
from parallel.sharding import Region, region_shape

BUFFER_BYTES = 32 << 20
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    FLOAT8: torch.float8_e4m3fn,
}
STORED_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read_buffer(device: torch.device) -> Tensor:
    """For the bytes on their way to a device; it copies faster from pinned memory."""
    return torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")


class WeightFile:
    """One open file. buffer: uint8, of at least one row of every part that is read."""

    def __init__(self, path: Path, buffer: Tensor) -> None:
        self._path = path
        self._buffer = buffer
        self._bytes = buffer.numpy()
        self._descriptor = os.open(path, os.O_RDONLY)
        self._map = mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._map.close()
        os.close(self._descriptor)

    def parts(self, stored: StoredTensor, region: Region, most_rows: int | None = None) -> Iterator[Tensor]:
        """A region of a tensor, some rows of it at a time, as stored; each is overwritten by the next.

        most_rows: at a time, if not as many as the buffer holds. Dims behind the second must be whole. Raises OSError.
        """
        shape, held = stored.shape, region_shape(region)
        assert held[2:] == shape[2:], f"{region} of {shape} is not made of runs of columns"
        element_bytes = ELEMENT_BYTES[stored.dtype]
        row_bytes, run_bytes = math.prod(shape[1:]) * element_bytes, math.prod(held[1:]) * element_bytes
        skipped_bytes = region[1].start * math.prod(shape[2:]) * element_bytes if len(region) > 1 else 0
        rows_at_once = len(self._bytes) // row_bytes
        assert rows_at_once > 0, f"a row of {row_bytes} bytes for a buffer of {len(self._bytes)}"
        rows_at_once = min(rows_at_once, most_rows or rows_at_once)
        for first in range(region[0].start, region[0].stop, rows_at_once):
            rows = min(rows_at_once, region[0].stop - first)
            filled, first_byte = self._bytes[: rows * run_bytes], stored.first_byte + first * row_bytes
            if run_bytes == row_bytes:
                self._read(filled.data, first_byte)
            else:
                self._copy(filled.reshape(rows, run_bytes), first_byte, row_bytes, skipped_bytes)
            yield self._buffer[: rows * run_bytes].view(DTYPES[stored.dtype]).view(rows, *held[1:])

    def _read(self, target: memoryview, first_byte: int) -> None:
        while target:
            read_bytes = os.preadv(self._descriptor, [target], first_byte)
            if read_bytes == 0:
                raise self._cut(first_byte)
            target, first_byte = target[read_bytes:], first_byte + read_bytes

    def _copy(self, target: npt.NDArray[np.uint8], first_byte: int, row_bytes: int, skipped_bytes: int) -> None:
        """From every row its run, [rows, run bytes]."""
        rows, run_bytes = target.shape
        end = first_byte + rows * row_bytes
        if (size := os.fstat(self._descriptor).st_size) < end:
            raise self._cut(size)  # what lies behind the end of a mapped file ends the process
        mapped = np.frombuffer(self._map, np.uint8, rows * row_bytes, first_byte).reshape(rows, row_bytes)
        target[:] = mapped[:, skipped_bytes : skipped_bytes + run_bytes]
        self._map.madvise(mmap.MADV_DONTNEED)  # all of it: the kernel maps pages around those that are touched

    def _cut(self, size: int) -> OSError:
        return OSError(f"{self._path} ends at byte {size}, though it was longer when it was checked")
