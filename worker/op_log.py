"""OpLog: the executed operations of one rank, a JSON line each, for `echelon trace`.

In every rank, if serve was given a trace-dir. Lines are written when the device has passed the operation, by the thread
that takes results, so that computing never waits for a disk; a disk that refuses ends the log and nothing else.
"""

from __future__ import annotations

from pathlib import Path

import structlog

from parallel.degrees import Place
from parallel.schedule import Op
from parallel.timeline import OpRecord
from parallel.trace import record_line
from worker.op_clock import OpClock
from worker.pending import Queued

log = structlog.get_logger("trace")


class OpLog:
    """One file for an epoch's rank: replica-0-epoch-1-p0-d0-t1.jsonl. Raises OSError where it cannot be made."""

    def __init__(self, folder: Path, replica: int, epoch: int, place: Place, clock: OpClock) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        rank = f"p{place.pipeline_rank}-d{place.data_rank}-t{place.tensor_rank}"
        self._file = (folder / f"replica-{replica}-epoch-{epoch}-{rank}.jsonl").open("w", buffering=1)
        self._stage, self._epoch, self._clock = place.pipeline_rank, epoch, clock

    def write(self, op: Op, queued: Queued) -> None:
        """Waits for the device to pass it."""
        if self._file.closed:
            return
        end_s = self._clock.at(queued.span.end)
        record = OpRecord(self._stage, op, self._clock.at(queued.span.start), end_s, self._epoch, queued.step)
        try:
            self._file.write(record_line(record) + "\n")
        except OSError as error:
            log.warning("the log of operations ends here", file=self._file.name, error=str(error))
            self.close()

    def close(self) -> None:
        """What is not on the disk by now never will be."""
        try:
            self._file.close()
        except OSError as error:
            log.warning("the log of operations lacks its end", file=self._file.name, error=str(error))
