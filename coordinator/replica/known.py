"""What is known of a replica's memory because it has served, so that its ranks need not find it out again.

A part of the replica's core, which keeps it from epoch to epoch. Pure.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from coordinator.replica.commands import Settled


@dataclass(frozen=True, slots=True)
class Known:
    """As the ranks of an epoch that served have settled on these nodes."""

    settled: Settled
    nodes: Set[str]

    def on(self, nodes: Set[str]) -> Settled | None:
        """What ranks on these nodes may take over: on others kernels may still have to be compiled, which is part of
        finding it out."""
        return self.settled if nodes <= self.nodes else None
