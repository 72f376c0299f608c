"""Files of the journal: one that frames are appended to, and a copy of the state that becomes the next one.

In the coordinator, used by `coordinator/journal/file.py`. A write that fails leaves no half frame behind, for it would
hide every later one. A copy is made a piece at a time, because the event loop waits for each; what is appended in the
meantime goes into both files.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from coordinator.journal.codec import frame
from coordinator.journal.state import JournalState


class Segment:
    """An append-only file, begun empty. size_bytes: what was appended whole. Raises OSError when the disk refuses."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size_bytes = 0
        self._torn = False
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)

    def append(self, content: bytes) -> None:
        """All of it, or nothing that counts."""
        if os.fstat(self._descriptor).st_nlink == 0:
            raise OSError(errno.ESTALE, "the journal's file was removed", str(self.path))
        if self._torn:
            self._mend()
        try:
            _write_all(self._descriptor, content)
        except OSError:
            self._torn = True
            with contextlib.suppress(OSError):  # or else before the next write
                self._mend()
            raise
        self.size_bytes += len(content)

    def sync(self) -> None:
        """It outlives a power cut from here on. A failure is final: the kernel may have dropped what it held."""
        os.fdatasync(self._descriptor)

    def publish(self, path: Path) -> None:
        """Give it this name, which nobody may have taken: FileExistsError."""
        try:
            os.link(self.path, path)
        except FileExistsError:
            raise
        except OSError:  # a file system without links
            self.path.rename(path)
        else:
            self.path.unlink()
        self.path = path

    def close(self) -> None:
        os.close(self._descriptor)

    def remove(self) -> None:
        """Close it, too."""
        self.close()
        with contextlib.suppress(OSError):
            self.path.unlink()

    def _mend(self) -> None:
        os.ftruncate(self._descriptor, self.size_bytes)
        self._torn = False


class Copy:
    """A segment that is filled with all that is remembered. What is appended meanwhile is to be followed.

    An entry is copied as it stands when its turn comes, so records of it that came before are of no account, and those
    that come after continue it. copied_bytes: without what was followed.
    """

    def __init__(self, state: JournalState, term: int, path: Path) -> None:
        self.segment = Segment(path.with_suffix(".tmp"))
        self.target = path
        self._state = state
        self._term = term
        self._left = list(reversed(state.entries))
        head = frame(state.head(), term)
        self.copied_bytes = len(head)
        try:
            self.segment.append(head)
        except OSError:
            self.segment.remove()
            raise

    @property
    def complete(self) -> bool:
        return not self._left

    def follow(self, content: bytes) -> None:
        """Frames that were appended to the segment in charge."""
        self.segment.append(content)

    def go_on(self, piece_bytes: int) -> None:
        """Copy so much more, a whole number of entries."""
        parts: list[bytes] = []
        size_bytes = 0
        while self._left and size_bytes < piece_bytes:
            if entry := self._state.entries.get(self._left.pop()):
                parts.append(frame(entry.records(), self._term))
                size_bytes += len(parts[-1])
        self.copied_bytes += size_bytes
        self.segment.append(b"".join(parts))


def _write_all(descriptor: int, content: bytes) -> None:
    """One write() unless the kernel takes less."""
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
