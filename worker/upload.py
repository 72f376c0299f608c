"""Small arrays from the host to the device, and back, by copies that the host does not wait for.

Used where a step's tensors are built, and where its ids leave the device, in each rank's runner thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
    return staged(array, device).to(device, non_blocking=True)


def staged(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """On the host, where a copy to the device that the host does not wait for may begin."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if device.type == "cuda" else tensor


class Downloads:
    """Copies to the host on a stream of their own: what is queued behind what they copy does not wait for them."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def begin(self, tensors: Sequence[Tensor]) -> Download:
        """Of what the current stream has made by then; on a CPU the tensors themselves."""
        if self._stream is None:
            return Download(tuple(tensors), (), None)
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            on_host = tuple(torch.empty_like(each, device="cpu", pin_memory=True) for each in tensors)
            for host, tensor in zip(on_host, tensors, strict=True):
                host.copy_(tensor, non_blocking=True)
            return Download(on_host, tuple(tensors), self._stream.record_event())


@dataclass(slots=True)
class Download:
    """On its way: tensors on the host, and what they are copied from, which must stay as it is until they are here."""

    on_host: tuple[Tensor, ...]
    kept: tuple[Tensor, ...]
    copied: torch.cuda.Event | None

    def wait(self) -> tuple[Tensor, ...]:
        """Once they are here; by any thread."""
        if self.copied is not None:
            self.copied.synchronize()
            self.kept = ()
        return self.on_host
