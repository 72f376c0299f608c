"""The simulated state directory: the journal's bytes, the fences' numbers, the jobs.

What was written outlives every process. A power cut takes what was not synced of the journal, from any byte on; a full
disk takes nothing for a while. Who was superseded finds its journal removed and a higher term, as on the real one.
"""

from __future__ import annotations

import errno
from dataclasses import replace
from random import Random

from coordinator.fences import Numbers, SupersededError, refuse_older
from coordinator.journal.codec import frame, unframe
from coordinator.journal.state import JournalState
from tests.simulation.jobs import JobTable


class Disk:
    """One for all coordinators. owner: the last one's term. full: it takes nothing but what has its room reserved.

    lost: its journal lacks what was told of as recorded.
    """

    def __init__(self, random: Random) -> None:
        self.numbers = Numbers("simulated")
        self.jobs = JobTable()
        self.owner = 0
        self.full = False
        self.lost = False
        self._random = random
        self._journal = b""
        self._synced_bytes = 0

    def open(self) -> JournalState:
        """For a coordinator that starts, which owns all of it from now on."""
        self.numbers = replace(self.numbers, term=self.numbers.term + 1)
        self.owner = self.numbers.term
        records, size = unframe(self._journal)
        state = JournalState()
        state.apply_all(records)
        compacted = self._random.random() < 0.5 and not self.full
        self._journal = frame(state.records(), self.numbers.term) if compacted else self._journal[:size]
        self._synced_bytes = len(self._journal)
        self.lost = False
        return state

    def append(self, term: int, content: bytes) -> None:
        """Raises SupersededError, OSError."""
        self.check_owner(term)
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        self._journal += content

    def persist_epoch(self, term: int) -> None:
        """The file is replaced as a whole, in room that is reserved. Raises SupersededError."""
        self.check_term(term)
        self.numbers = replace(self.numbers, term=term)

    def check_term(self, term: int) -> None:
        """Comes before every write of the numbers. Raises SupersededError."""
        refuse_older(term, self.numbers)

    def check_owner(self, term: int) -> None:
        """The journal and the jobs are the last coordinator's. Raises SupersededError."""
        if term < self.owner:
            raise SupersededError(errno.ESTALE, f"term {term} writes, term {self.owner} owns the disk")

    def cut_power(self) -> None:
        """All that was synced stays, and so much of the rest as the disk had got to."""
        kept = self._random.randint(self._synced_bytes, len(self._journal))
        self.lost |= kept < len(self._journal)
        self._journal = self._journal[:kept]
