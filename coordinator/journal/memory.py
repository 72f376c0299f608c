"""No journal: `--journal off`. Requests survive what happens to ranks, not what happens to the coordinator.

In the coordinator, in the place of `JournalFile`. A client that resumes by the ids it holds still goes on.
"""

from __future__ import annotations

from collections.abc import Sequence

from coordinator.journal.damage import Damage
from coordinator.journal.state import JournalState, Record


class NoJournal:
    """state begins empty: what an earlier journal on the disk says is not read, nor removed."""

    keeps = False
    not_compacted = ""
    damages: Sequence[Damage] = ()
    size_bytes = 0

    def __init__(self) -> None:
        self.state = JournalState()

    def append(self, records: Sequence[Record]) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """There is nothing to let go of."""
