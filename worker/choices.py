"""Which experts the rows of each step have chosen: counters of the device, kept after each step, read when all is over.

In ranks that `echelon bench` measures, in a run that is not timed. A copy of the counters is queued behind each step,
so nothing waits and no step is changed. Knows no request.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from models.expert_load import ExpertLoads


class Choices:
    """The stream of plans, and what each of its steps has added to the counters of one stage's layers.

    Iterated by the thread that launches steps: by when it asks for the next plan, the one before is queued.
    """

    def __init__(self, loads: ExpertLoads, plans: Iterable[bytes]) -> None:
        self._loads = loads
        self._plans = plans
        self._counting = False
        self._seen: list[Tensor] = []
        self._caught_up = threading.Event()  # whoever has a step's ids may be ahead of the thread that launched it
        self._caught_up.set()

    def __iter__(self) -> Iterator[bytes]:
        for payload in self._plans:
            self._caught_up.clear()
            yield payload
            if self._counting:
                self._keep()
            self._caught_up.set()

    def begin(self) -> None:
        """Count from here on; no step runs."""
        self._caught_up.wait()
        self._seen = []
        self._keep()
        self._counting = True

    def end(self, steps: int) -> list[list[int]]:
        """Of each of the last steps, layer by layer, the experts that were chosen, as bits; no step runs.

        Only those that this rank speaks for: empty lists where others do.
        """
        self._caught_up.wait()
        self._counting = False
        if not self._seen:
            return []
        kept = torch.stack(self._seen)  # [1 + steps, layers, experts]
        self._seen = []
        chosen = kept.diff(dim=0)[-steps:] > 0
        return [[_bits(layer) for layer in step] for step in chosen.tolist()]

    def _keep(self) -> None:
        seen = self._loads.snapshot()
        if seen is not None:
            self._seen.append(seen)


def _bits(chosen: list[bool]) -> int:
    return sum(1 << expert for expert, was in enumerate(chosen) if was)
