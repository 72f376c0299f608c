"""The journal on disk: STATE/journal/NNNNNN.log, one write() per batch of records.

The shell around `journal` and `journal_codec`, in the coordinator, under its state lock. A write() outlives the
process; only fsync outlives a power cut. Every open and every full segment starts a new segment with a copy of what
is still remembered, and removes the older ones: forgotten requests vanish, and a torn tail is never written behind.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from coordinator.journal.codec import frame, unframe
from coordinator.journal.state import JournalState, Record

SEGMENT_BYTES = 64 * 2**20


class JournalFile:
    """Append-only. `state` is what the file adds up to; the core folds its records into it before they are appended.

    damaged_bytes: what replay had to leave out, a torn tail as a rule. size_bytes: of the segment that is written now.
    Raises OSError when the disk refuses.
    """

    def __init__(self, directory: Path, term: int, *, fsync: bool = False, segment_bytes: int = SEGMENT_BYTES) -> None:
        self.state = JournalState()
        self.damaged_bytes = 0
        self.size_bytes = 0
        self._directory = directory
        self._term = term
        self._fsync = fsync
        self._segment_bytes = segment_bytes
        self._unwritten = b""
        self._descriptor = -1
        directory.mkdir(parents=True, exist_ok=True)
        self._replay()
        self._start_segment()

    def append(self, records: Sequence[Record]) -> None:
        """Write all records of a step, or raise OSError; then they go ahead of the next ones, so no gap ever shows."""
        self._unwritten += frame(records, self._term)
        self._write()
        if self.size_bytes > self._limit:
            self._compact()

    def close(self) -> None:
        """Let go of the file. What a failed write left over is lost."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _segments(self) -> list[Path]:
        return sorted(self._directory.glob("[0-9]*.log"), key=lambda path: int(path.stem))

    def _replay(self) -> None:
        for path in self._segments():
            content = path.read_bytes()
            records, size = unframe(content)
            self.state.apply_all(records)
            self.damaged_bytes += len(content) - size

    def _compact(self) -> None:
        """No room for the copy is no reason to fail: everything is written, and compaction is tried again later."""
        try:
            self._start_segment()
        except OSError:
            self._limit = 2 * self.size_bytes

    def _start_segment(self) -> None:
        """Rename makes the copy whole or absent, so a crash here leaves the older segments or the new one in charge."""
        old = self._segments()
        number = int(old[-1].stem) + 1 if old else 1
        path = self._directory / f"{number:06d}.log"
        draft = path.with_suffix(".tmp")
        content = frame(self.state.records(), self._term)
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        try:
            _write_all(descriptor, content)
            os.fsync(descriptor)
            draft.rename(path)
            self._sync_directory()
        except OSError:
            os.close(descriptor)
            draft.unlink(missing_ok=True)
            raise
        self.close()
        self._descriptor = descriptor
        self.size_bytes = len(content)
        self._limit = max(self._segment_bytes, 2 * self.size_bytes)
        for segment in old:
            segment.unlink()

    def _write(self) -> None:
        try:
            _write_all(self._descriptor, self._unwritten)
        except OSError:
            os.ftruncate(self._descriptor, self.size_bytes)  # half a frame would hide every later one
            raise
        self.size_bytes += len(self._unwritten)
        self._unwritten = b""
        if self._fsync:
            os.fdatasync(self._descriptor)

    def _sync_directory(self) -> None:
        descriptor = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write_all(descriptor: int, content: bytes) -> None:
    """One write() unless the kernel takes less."""
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
