"""What a safetensors file says of a tensor in it: its dtype, its shape, and where its bytes lie.

Between what reads headers, in the coordinator and in ranks, and what reads tensors, in ranks. It knows no torch, no
model and no name.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FLOAT8 = "F8_E4M3"
ELEMENT_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, FLOAT8: 1}  # by the dtypes that can be read


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: its file, its dtype as safetensors names it, its full shape, its place in the file.

    Its numbers lie one behind the other, the last dim fastest.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    first_byte: int
