"""crc32c of parts of a file, read in pieces that are large enough for other threads to go on meanwhile.

In ranks that write or restore a shard, and in `echelon checkpoint verify`. It knows no tensor and no torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import google_crc32c
import numpy as np
import numpy.typing as npt

PIECE_BYTES = 4 << 20  # from 1 MiB on google_crc32c lets the interpreter go
CACHED_BYTES = 256 << 10


def pieces(descriptor: int, first_byte: int, count: int) -> Iterator[tuple[int, bytes]]:
    """So many bytes of a file from a place on, in order, each piece with its place among them. Raises OSError."""
    done = 0
    while done < count:
        data = os.pread(descriptor, min(PIECE_BYTES, count - done), first_byte + done)
        if not data:
            raise OSError(f"the file ends at byte {first_byte + done}")
        yield done, data
        done += len(data)


def read_into(descriptor: int, first_byte: int, target: npt.NDArray[np.uint8]) -> int:
    """Fills an array with what a file has from a place on; the crc32c of it. Raises OSError.

    Nothing is copied, and each piece is looked at while it is in the processor's cache; but the interpreter is held.
    """
    crc, done = 0, 0
    while done < len(target):
        piece = target[done : done + CACHED_BYTES]
        count = os.preadv(descriptor, [piece.data], first_byte + done)
        if count == 0:
            raise OSError(f"the file ends at byte {first_byte + done}")
        crc = int(google_crc32c.extend(crc, piece[:count]))
        done += count
    return crc


def checksum(descriptor: int, first_byte: int, count: int) -> int:
    """crc32c of so many bytes of a file. Raises OSError."""
    crc = 0
    for _, data in pieces(descriptor, first_byte, count):
        crc = extend(crc, data)
    return crc


def checksum_of(data: npt.NDArray[np.uint8]) -> int:
    """crc32c of what lies in memory, which is not copied."""
    crc = 0
    for first in range(0, len(data), PIECE_BYTES):
        crc = int(google_crc32c.extend(crc, data[first : first + PIECE_BYTES]))
    return crc


def extend(crc: int, data: bytes) -> int:
    """crc32c of what had crc, and data behind it."""
    return int(google_crc32c.extend(crc, data))
