"""Graphs that are captured between the steps of an epoch that serves already, one before each step that says so.

In every rank's runner. After a fault streams wait for nothing but their tokens: steps are launched eagerly until there
are graphs. A capture that is refused ends no epoch: the ranks of a stage agree, and go on with what graphs they have.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import structlog
import torch

from parallel.comm import of_peer
from parallel.context import ParallelContext
from worker.cuda_capture import Capture, CaptureRefused
from worker.decode_graphs import DecodeGraphs, Graph, failed

log = structlog.get_logger("rank")


class Later(NamedTuple):
    """What came of it: graphs, seconds that steps waited for them, and why there are no more if one was refused."""

    captured: int
    took_s: float
    reason: str = ""


class LaterGraphs:
    """Of these numbers of rows. told is called once, from the thread that runs steps, when no more are captured."""

    def __init__(
        self,
        graphs: DecodeGraphs,
        capture: Capture,
        sizes: Sequence[int],
        context: ParallelContext,
        told: Callable[[Later], None],
    ) -> None:
        self._graphs = graphs
        self._capture = capture
        self._left = set(sizes)
        self._context = context
        self._told = told
        self._count, self._took_s = 0, 0.0

    def before_step(self, rows: int) -> None:
        """Capture the graph of so many rows. Every rank of the stage must do it before the same step; nothing of other
        stages is inside.

        Raises ConfigError where the work itself fails: ranks may wait for each other in it, so they cannot agree.
        """
        if rows not in self._left:  # one was refused before
            return
        began_s = time.monotonic()
        graph, reason = self._try(rows)
        refused = torch.tensor([int(graph is None)], device=self._context.device)
        if self._context.stage.all_gather(refused).any():
            if graph is not None:
                graph.reset()
            self._left.clear()
            log.warning("no more CUDA graphs are captured", rows=rows, reason=reason)
        elif graph is not None:
            self._graphs.add(rows, graph)
            self._left.remove(rows)
            self._count, reason = self._count + 1, ""
        self._took_s += time.monotonic() - began_s
        if not self._left:
            self._told(Later(self._count, self._took_s, reason))

    def _try(self, rows: int) -> tuple[Graph | None, str]:
        """The graph, or none and why."""
        try:
            return self._graphs.captured(self._capture, rows), "another rank of the stage could not"
        except CaptureRefused as error:
            return None, f"a decode step of {rows} rows: {error}"
        except RuntimeError as error:
            if of_peer(error):
                raise
            raise failed(rows, error) from error
