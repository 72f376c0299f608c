"""Writes each step's records before anyone hears of them, and tells whether they can be relied on.

In the coordinator, between the service and its journal. On a write error running streams go on, told not durable;
what is new is refused until the journal can be written again. Decides nothing about requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from coordinator.events import EventLog
from coordinator.fences import SupersededError
from coordinator.journal.damage import Damage
from coordinator.journal.state import Record
from coordinator.metrics import Metrics
from echelon.errors import OverloadedError

RETRY_AFTER_S = 5.0


class Journal(Protocol):
    """What keeps the records. damages: what of the last coordinator's could not be read."""

    @property
    def keeps(self) -> bool:
        """Whether a successor will have them at all."""
        ...

    @property
    def damages(self) -> Sequence[Damage]: ...

    @property
    def size_bytes(self) -> int:
        """On disk."""
        ...

    @property
    def not_compacted(self) -> str:
        """Why it keeps growing, empty while it does not."""
        ...

    def append(self, records: Sequence[Record]) -> None:
        """Keep them, or raise OSError and keep trying with each further call, one without records too."""
        ...

    def close(self) -> None: ...


class Recorder:
    """durable: whether every record so far is in the journal. on_change is called when that changes."""

    def __init__(self, journal: Journal, events: EventLog, metrics: Metrics) -> None:
        self.on_change: Callable[[], None] = lambda: None
        self._journal = journal
        self._events = events
        self._metrics = metrics
        self._error = self._not_compacted = ""
        for damage in journal.damages:
            detail = {"at_byte": damage.at_byte, "lost_bytes": damage.lost_bytes, "reason": damage.reason}
            events.emit("journal.damaged", damage.segment, detail)
        metrics.journal_damaged_bytes.set(sum(damage.lost_bytes for damage in journal.damages))
        self._append(())
        self.measure()

    @property
    def durable(self) -> bool:
        return self._journal.keeps and not self._error

    @property
    def state(self) -> str:
        """For the cluster's status: durable, off, or why it is not durable."""
        if not self._journal.keeps:
            return "off"
        return f"not durable: {self._error}" if self._error else "durable"

    def write(self, records: Sequence[Record]) -> None:
        """All of a step at once. Without records it is tried again if the last try failed. Raises SupersededError."""
        if records or self._error:
            self._append(records)

    def _append(self, records: Sequence[Record]) -> None:
        error = ""
        try:
            self._journal.append(records)
        except SupersededError:  # nobody may hear of this step: a successor knows nothing of it
            raise
        except OSError as failure:
            error = str(failure)
        told, self._error = self._error, error
        if self._journal.not_compacted != self._not_compacted:
            self._not_compacted = self._journal.not_compacted
            if self._not_compacted:
                self._events.emit("journal.not_compacted", "journal", {"error": self._not_compacted})
        if bool(error) != bool(told):
            detail = {"error": error} if error else {}
            self._events.emit("journal.failed" if error else "journal.recovered", "journal", detail)
            self.measure()
            self.on_change()

    def check_writable(self, request_id: str) -> None:
        """Raises OverloadedError while what is new would not survive this process."""
        if self._error:
            raise OverloadedError(
                "the journal cannot be written, so no new request is taken; free space in the state directory",
                reason="JOURNAL_UNAVAILABLE",
                request_id=request_id,
                retry_after_s=RETRY_AFTER_S,
            )

    def measure(self) -> None:
        self._metrics.journal_durable.set(self.durable)
        self._metrics.journal_bytes.set(self._journal.size_bytes)

    def close(self) -> None:
        """Let go of the journal."""
        self._journal.close()
