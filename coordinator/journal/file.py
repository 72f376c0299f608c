"""The journal on disk: STATE/journal/NNNNNN.log, one write() per batch of records.

The shell around `journal/state` and `journal/codec`, in the coordinator, under its state lock. A write() outlives the
process; only fsync outlives a power cut. Every open and every full segment begins a new segment with a copy of what is
still remembered, and removes the older ones: forgotten requests vanish, and a torn tail is never written behind.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from coordinator.clock import ClockOrigin
from coordinator.fences import SupersededError
from coordinator.journal.codec import find_damage, frame, unframe
from coordinator.journal.damage import Damage
from coordinator.journal.segment import Copy, Segment
from coordinator.journal.state import JournalState, Record

SEGMENT_BYTES = 32 * 2**20
PIECE_BYTES = 64 * 2**10  # copied with each append: a few milliseconds of the event loop
UNWRITTEN_BYTES = 8 * 2**20  # kept while the disk refuses; beyond, all that is remembered is written anew
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class JournalFile:
    """Append-only. `state` is what the file adds up to; the core folds its records into it before they are appended.

    origin: where this process's times count from. damages: what replay had to leave out, a torn tail as a rule.
    not_compacted: why the last try to begin a new segment failed, empty if it did not. check_term raises
    SupersededError once a successor has raised the term, which it does before it reads the journal.
    """

    keeps = True

    def __init__(
        self,
        directory: Path,
        term: int,
        *,
        fsync: bool = False,
        segment_bytes: int = SEGMENT_BYTES,
        origin: ClockOrigin | None = None,
        check_term: Callable[[], None] = lambda: None,
    ) -> None:
        """Raises OSError when the directory cannot be used; on a full disk it is only not durable yet."""
        self.state = JournalState()
        self.damages: list[Damage] = []
        self.not_compacted = ""
        self._directory = directory
        self._term = term
        self._fsync = fsync
        self._segment_bytes = self._limit_bytes = segment_bytes
        self._check_term = check_term
        self._unwritten = b""
        self._segment: Segment | None = None  # in charge; None while only a new one can help
        self._lost: OSError | None = None  # why
        self._copy: Copy | None = None
        self._publishing: Future[None] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="journal")
        directory.mkdir(parents=True, exist_ok=True)
        self._number = self._replay()
        if origin:
            self.state.resume(origin)
        try:
            self._copy_at_once()
        except OSError as error:
            self._give_up_copy(error)
            if error.errno not in NO_ROOM:
                raise
            self._lost = error

    @property
    def size_bytes(self) -> int:
        """On disk, a copy that is under way included."""
        return sum(each.size_bytes for each in (self._segment, self._copy and self._copy.segment) if each)

    def append(self, records: Sequence[Record]) -> None:
        """Write all records of a step, or raise OSError; then they go ahead of the next ones, so no gap ever shows.

        Without records, what is left over is tried again. Raises SupersededError where a successor writes.
        """
        content = frame(records, self._term)
        refused = None
        try:
            try:
                self._write(content)
            finally:
                self._check_term()  # stopped since the last look, it may have written what its successor has not read
        except SupersededError:
            raise
        except OSError as error:
            refused = error
        try:
            self._compact(content)  # whatever was refused: a copy that is under way lacks nothing
        except SupersededError:
            raise
        except OSError as error:
            self._give_up_copy(error)
        if self._segment is None or self._unwritten:
            raise refused or self._lost or OSError(errno.EIO, "the journal is not written")

    def close(self) -> None:
        """Let go of the files. What a failed write left over is lost."""
        self._thread.shutdown(wait=True)
        if self._copy is not None:
            self._copy.segment.close()
            with contextlib.suppress(OSError):
                self._copy.target.with_suffix(".tmp").unlink(missing_ok=True)
        if self._segment is not None:
            self._segment.close()
        self._segment = self._copy = None

    # Reading

    def _segments(self) -> list[Path]:
        return sorted(self._directory.glob("[0-9]*.log"), key=_number_of)

    def _replay(self) -> int:
        """The number of the last segment."""
        segments = self._segments()
        for path in segments:
            content = path.read_bytes()
            records, size_bytes = unframe(content)
            self.state.apply_all(records)
            if damage := find_damage(path.name, content, size_bytes):
                self.damages.append(damage)
        for draft in self._directory.glob("[0-9]*.tmp"):
            draft.unlink()
        return _number_of(segments[-1]) if segments else 0

    # Writing

    def _write(self, content: bytes) -> None:
        if self._segment is None:
            return
        self._unwritten += content
        try:
            self._check_term()  # what one that was stopped, and only now wakes, meant to write is old
            self._segment.append(self._unwritten)
        except SupersededError:
            raise
        except OSError as error:
            if error.errno == errno.ESTALE or len(self._unwritten) > UNWRITTEN_BYTES:
                self._lose(error)
            raise
        self._unwritten = b""
        if self._fsync:
            self._sync(self._segment)

    def _sync(self, segment: Segment) -> None:
        """After a failed fsync nobody knows what is on the disk."""
        try:
            segment.sync()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        """The segment in charge cannot be continued: only a copy of all that is remembered makes it whole."""
        assert self._segment is not None
        self._segment.close()
        self._segment, self._lost, self._unwritten = None, error, b""

    # Beginning anew

    def _compact(self, content: bytes) -> None:
        """A piece of the copy with each append, so that it is whole long before the next one is due."""
        if self._copy is None:
            if self._segment is not None and self._segment.size_bytes <= self._limit_bytes:
                return
            self._begin_copy()
        elif content:
            self._copy.follow(content)
        assert self._copy is not None
        if self._publishing is None:
            self._copy.go_on(max(PIECE_BYTES, 2 * len(content)))
            if self._copy.complete:
                self._publishing = self._thread.submit(self._publish, self._copy)
        elif self._publishing.done():
            self._publishing.result()
            self._take_over(self._copy)

    def _begin_copy(self) -> None:
        self._refuse_superseded()
        self._directory.mkdir(parents=True, exist_ok=True)
        self._copy = Copy(self.state, self._term, self._directory / f"{self._number + 1:06d}.log")

    def _copy_at_once(self) -> None:
        self._begin_copy()
        assert self._copy is not None
        while not self._copy.complete:
            self._copy.go_on(SEGMENT_BYTES)
        self._publish(self._copy)
        self._take_over(self._copy)

    def _publish(self, copy: Copy) -> None:
        """Not on the event loop: fsync takes as long as the disk does.

        Its name makes the copy whole or absent, so a crash leaves the older segments or the new one in charge.
        """
        copy.segment.sync()
        self._refuse_superseded()
        copy.segment.publish(copy.target)

    def _refuse_superseded(self) -> None:
        """A later segment than ours: a successor writes here, and what we know is old."""
        self._check_term()
        later = [path.name for path in self._segments() if _number_of(path) > self._number]
        if later:
            raise SupersededError(errno.ESTALE, f"another coordinator writes this journal: {later[-1]}")

    def _take_over(self, copy: Copy) -> None:
        """Since it has its name it is in charge; everything that was appended is in it."""
        if self._segment is not None:
            self._segment.close()
        self._segment, self._number = copy.segment, _number_of(copy.target)
        self._copy = self._publishing = self._lost = None
        self._unwritten, self.not_compacted = b"", ""
        self._limit_bytes = max(self._segment_bytes, 2 * copy.copied_bytes)
        if self._fsync:  # what came after the copy was synced
            self._sync(self._segment)
        self._thread.submit(self._remove_older, self._number)

    def _give_up_copy(self, error: OSError) -> None:
        """No room for it is no reason to fail: the segment in charge goes on, and this is tried again later."""
        copy, publishing = self._copy, self._publishing
        if copy and publishing and publishing.exception() is None:  # too late: it is in charge, without the last words
            self._take_over(copy)
            self._lose(error)
        elif copy:
            copy.segment.remove()
        self._copy = self._publishing = None
        self.not_compacted = str(error)
        if self._segment is None:
            self._lost = error
        else:
            self._limit_bytes = 2 * self._segment.size_bytes

    def _remove_older(self, number: int) -> None:
        """Once the new segment's name would survive a power cut; what stays is removed the next time."""
        with contextlib.suppress(OSError):
            directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
            for path in self._segments():
                if _number_of(path) < number:
                    path.unlink()


def _number_of(path: Path) -> int:
    return int(path.stem)
