"""Processes of this machine as Linux tells them in /proc: who started whom, and in which session.

For the supervisor and for `echelon.testing`, which end what they have started, by its pid. Read without a lock: a
process may end, or begin, while the others are read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

GONE = "ZX"  # zombies are not processes any more, but for their parent


@dataclass(frozen=True, slots=True)
class Process:
    """name: of the program, cut at 15 bytes, unless the process has renamed itself. session: its leader's pid."""

    pid: int
    parent: int
    session: int
    name: str

    def arguments(self) -> list[str]:
        """Its command line; empty if it has just ended."""
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            return Path(f"/proc/{self.pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        return []


def processes() -> Iterator[Process]:
    """All that live."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                # The name stands in parentheses and may hold some; then state, parent, process group, session.
                head, _, tail = (entry / "stat").read_text(errors="replace").rpartition(")")
                state, parent, _, session = tail.split()[:4]
                if state not in GONE:
                    yield Process(int(entry.name), int(parent), int(session), head.partition("(")[2])


def session_members(session: int) -> Iterator[int]:
    """Pids of a session's processes."""
    return (process.pid for process in processes() if process.session == session)


def descendants(pid: int, table: Mapping[int, Process]) -> Iterator[Process]:
    """Whom a process has started, and whom they have, as far as their parents live. table: by pid."""
    for process in table.values():
        if process.parent == pid:
            yield process
            yield from descendants(process.pid, table)
