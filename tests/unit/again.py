"""In place of CUDA graphs, where there is no device: what was captured is done anew, over the same buffers."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


class Again:
    """A worker.decode_graphs.Captured. What it made is overwritten by each replay, as a graph's memory is."""

    def __init__(self, work: Callable[[], Tensor]) -> None:
        self._work: Callable[[], Tensor] | None = work
        self.made = work().clone()
        self.replays = 0

    def replay(self) -> Tensor:
        assert self._work is not None, "it was let go of"
        self.replays += 1
        return self.made.copy_(self._work())

    def reset(self) -> None:
        self._work = None


class Recorder:
    """A worker.decode_graphs.Capture that keeps what it made, in order."""

    def __init__(self) -> None:
        self.made: list[Again] = []

    def __call__(self, work: Callable[[], Tensor]) -> Again:
        self.made.append(Again(work))
        return self.made[-1]

    @property
    def replays(self) -> list[int]:
        return [each.replays for each in self.made]
