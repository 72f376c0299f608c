"""crc32c of parts of a file, read in pieces that are large enough for other threads to go on meanwhile.

In ranks that write or restore a shard, and in `echelon checkpoint verify`. It knows no tensor and no torch.
"""

from __future__ import annotations

import os
from pathlib import Path

import google_crc32c
import numpy as np
import numpy.typing as npt

from models.files import read_header

PIECE_BYTES = 4 << 20  # from 1 MiB on google_crc32c lets the interpreter go
CACHED_BYTES = 256 << 10


def read_into(
    descriptor: int, first_byte: int, target: npt.NDArray[np.uint8], crc: int = 0, step_bytes: int = CACHED_BYTES
) -> int:
    """Fills an array with what a file has from a place on; the crc32c of what had crc, and that behind it.

    Nothing is copied, and step_bytes at a time are looked at while they are in the processor's cache. Steps of less
    than 1 MiB hold the interpreter. Raises OSError.
    """
    done = 0
    while done < len(target):
        piece = target[done : done + step_bytes]
        count = os.preadv(descriptor, [piece.data], first_byte + done)
        if count == 0:
            raise OSError(f"the file ends at byte {first_byte + done}")
        crc = int(google_crc32c.extend(crc, piece[:count]))
        done += count
    return crc


def checksum(descriptor: int, first_byte: int, count: int) -> int:
    """crc32c of so many bytes of a file. Raises OSError."""
    crc, piece = 0, np.empty(min(PIECE_BYTES, count), dtype=np.uint8)
    for done in range(0, count, PIECE_BYTES):
        crc = read_into(descriptor, first_byte + done, piece[: count - done], crc, PIECE_BYTES)
    return crc


def tensor_checksums(weights: Path) -> dict[str, int]:
    """crc32c by tensor of a file of weights, by its header. Raises ConfigError where that is broken, or OSError."""
    starts = sorted((entry.first_byte, name) for name, entry in read_header(weights).items())
    ends = [*(first for first, _ in starts[1:]), weights.stat().st_size]
    with weights.open("rb") as file:
        return {
            name: checksum(file.fileno(), first, end - first) for (first, name), end in zip(starts, ends, strict=True)
        }
