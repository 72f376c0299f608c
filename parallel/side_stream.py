"""SideStream: work that is queued beside other work of the same device, and taken when it is needed.

In rank processes. On CUDA a stream of its own, one for a rank; elsewhere nothing runs beside, and the work is done when
it is taken. It knows no layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SideStream:
    """stream: None where nothing runs beside.

    No tensor needs `record_stream`: work here begins behind all that was queued on the current stream before, and what
    is queued there after it was taken comes behind it. So memory that either lets go of is free for the other by then.
    """

    stream: torch.cuda.Stream | None = None

    @classmethod
    def of(cls, device: torch.device) -> SideStream:
        return cls(torch.cuda.Stream(device) if device.type == "cuda" else None)

    def begin(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Queues the work, and returns how its result is taken: once, on the stream that is the current one now."""
        if self.stream is None:
            return work
        side, current = self.stream, torch.cuda.current_stream(self.stream.device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            result = work()

        def take() -> Tensor:
            current.wait_stream(side)
            return result

        return take


IN_TURN = SideStream()
