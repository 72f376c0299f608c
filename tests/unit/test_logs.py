"""Logs on a full disk."""

from __future__ import annotations

import errno
import io

from echelon.internal.logs import Lenient


class Full(io.StringIO):
    """A file on a disk without room."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "no space left on device")

    def flush(self) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")


def test_a_line_that_cannot_be_written_is_lost_and_breaks_nothing() -> None:
    log = Lenient(Full())
    log.write("a line\n")
    log.flush()


def test_a_line_that_can_be_written_is() -> None:
    file = io.StringIO()
    Lenient(file).write("a line\n")
    assert file.getvalue() == "a line\n"
