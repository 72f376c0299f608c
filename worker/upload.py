"""Small arrays from the host to the device, by copies that the host does not wait for.

Used where a step's tensors are built, in each rank's runner thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def upload(arrays: Sequence[npt.NDArray[Any]], device: torch.device) -> list[Tensor]:
    """int64 and float64 arrays as tensors of the same shape and dtype, by one copy."""
    words = np.concatenate([array.ravel().view(np.int64) for array in arrays])
    parts = torch.split(upload_one(words, device), [array.size for array in arrays])
    return [
        (part.view(torch.float64) if array.dtype == np.float64 else part).view(array.shape)
        for part, array in zip(parts, arrays, strict=True)
    ]


def upload_one(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """An array of any dtype that torch knows too."""
    staged = torch.from_numpy(array)
    if device.type == "cuda":
        staged = staged.pin_memory()
    return staged.to(device, non_blocking=True)
