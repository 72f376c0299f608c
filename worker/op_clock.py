"""OpClock: when a device began and ended an operation, on the host's clock, without waiting for it.

In every rank. On CUDA a mark is an event in the stream, read when the device has passed it; on a CPU it is the time.
It knows no plan and no schedule.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

Mark = float | torch.cuda.Event


@dataclass(frozen=True, slots=True)
class Span:
    """From one mark to another."""

    start: Mark
    end: Mark

    @property
    def seconds(self) -> float:
        """How long it was; the device must have passed both."""
        if isinstance(self.start, torch.cuda.Event) and isinstance(self.end, torch.cuda.Event):
            return float(self.start.elapsed_time(self.end)) / 1e3
        assert isinstance(self.start, float) and isinstance(self.end, float), "marks of two clocks"
        return self.end - self.start


class OpClock:
    """Marks on one device, in seconds since 1970."""

    def __init__(self, device: torch.device) -> None:
        self._zero: torch.cuda.Event | None = None
        self._zero_s = 0.0
        if device.type == "cuda":
            self._zero = torch.cuda.Event(enable_timing=True)
            self._zero.record()
            self._zero.synchronize()
            self._zero_s = time.time()

    def mark(self) -> Mark:
        """Now: where the device's stream has got to when it comes here."""
        if self._zero is None:
            return time.time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def at(self, mark: Mark) -> float:
        """The time of a mark; waits for the device to pass it."""
        if isinstance(mark, float):
            return mark
        assert self._zero is not None, "events are marks on CUDA"
        mark.synchronize()
        return self._zero_s + float(self._zero.elapsed_time(mark)) / 1e3
