"""CUDA graphs as values: work that is captured once, replayed by one launch, and let go of before its groups are.

In rank processes. What is captured, when, and for how many rows is the business of `decode_graphs.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Captured(Protocol):
    """Work that can be done again over what its buffers hold by then."""

    @property
    def made(self) -> Tensor:
        """Where a replay leaves what it makes: another work may read it there."""

    def replay(self) -> Tensor:
        """What it makes; the next replay of any work of the same capture overwrites it."""

    def reset(self) -> None:
        """Lets go of it; it cannot be replayed any more."""


Capture = Callable[[Callable[[], Tensor]], Captured]  # raises CaptureRefused, or what the work itself raises


class CaptureRefused(RuntimeError):
    """Work that runs could not be captured. Nobody waits for this rank: others may have captured it."""


class CudaCapture:
    """Captures CUDA graphs into one pool, one at a time; graphs may be replayed from another thread."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], Tensor]) -> Captured:
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            work()  # compiles kernels and connects groups, which no capture can hold
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            # Threads of NCCL and of this process ask the device for things meanwhile: the strict mode takes that amiss.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                made = work()
        except RuntimeError as error:  # what torch raises for all that goes wrong on a device
            raise CaptureRefused(str(error)) from error
        return _Replayed(graph, made)


class _Replayed:
    """made is kept alive, as what is captured later would else be given its memory."""

    def __init__(self, graph: torch.cuda.CUDAGraph, made: Tensor) -> None:
        self._graph = graph
        self.made = made

    def replay(self) -> Tensor:
        self._graph.replay()
        return self.made

    def reset(self) -> None:
        self._graph.reset()
