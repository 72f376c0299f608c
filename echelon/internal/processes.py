"""Processes of this machine as Linux tells them in /proc: who started whom, in which session, and what they have open.

For the supervisor, `echelon.testing` and `echelon chaos`, which signal processes by their pids. Read without a lock: a
process may end, or begin, while the others are read; one that has ended is as if there had been none.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

GONE = "ZX"  # zombies are not processes any more, but for their parent
LISTENING = "0A"  # TCP_LISTEN in /proc/net/tcp
KILL_POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class Process:
    """name: of the program, cut at 15 bytes, unless the process has renamed itself. session: its leader's pid."""

    pid: int
    parent: int
    session: int
    name: str

    def arguments(self) -> list[str]:
        """Its command line; empty if it has just ended."""
        return _read(self.pid, "cmdline").rstrip("\0").split("\0")


def processes() -> dict[int, Process]:
    """All that live, by pid."""
    pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal())
    return {process.pid: process for process in map(find_process, pids) if process is not None}


def find_process(pid: int) -> Process | None:
    """The process of this number that lives."""
    # The name stands in parentheses and may hold some; then state, parent, process group, session.
    head, _, tail = _read(pid, "stat").rpartition(")")
    if not tail or tail.split()[0] in GONE:
        return None
    parent, _, session = map(int, tail.split()[1:4])
    return Process(pid, parent, session, head.partition("(")[2])


def alive(pid: int) -> bool:
    """Whether a process of this number runs, or is stopped."""
    return find_process(pid) is not None


def parent_of(pid: int) -> int:
    """0 for a process that has ended."""
    process = find_process(pid)
    return process.parent if process else 0


def session_members(session: int) -> list[int]:
    """Pids of a session's processes."""
    return [process.pid for process in processes().values() if process.session == session]


def descendants(pid: int, table: Mapping[int, Process] | None = None) -> list[Process]:
    """Whom a process has started, and whom they have, nearest first, as far as their parents live. table: by pid."""
    children: dict[int, list[Process]] = {}
    for each in (processes() if table is None else table).values():
        children.setdefault(each.parent, []).append(each)
    found = list(children.get(pid, ()))
    for each in found:
        found.extend(children.get(each.pid, ()))
    return found


def kill_all(victims: Iterable[int]) -> None:
    """SIGKILL to all, and again to those that live on, until none does."""
    left: Collection[int] = set(victims)
    while left:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(KILL_POLL_S)
        left = [pid for pid in left if alive(pid)]


def listens(pid: int, port: int) -> bool:
    """Whether the process has a TCP socket that waits for connections at the port."""
    return bool(_listening(port) & {name for _, name in _open_files(pid)})


def written_bytes(pid: int, folder: str) -> int:
    """How far the process has got in all files that it opened in a folder of that name, whatever their names now."""
    position = 0
    for number, path in _open_files(pid):
        if Path(path).parent.name == folder:
            with contextlib.suppress(OSError):
                told = Path(f"/proc/{pid}/fdinfo/{number}").read_text().split()
                position += int(told[told.index("pos:") + 1])
    return position


def _listening(port: int) -> set[str]:
    """The sockets that wait at a port, named as /proc/PID/fd does."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                    found.add(f"socket:[{fields[9]}]")
    return found


def _open_files(pid: int) -> Iterator[tuple[str, str]]:
    """Numbers, and what they are of."""
    with contextlib.suppress(OSError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                yield descriptor.name, str(descriptor.readlink())


def _read(pid: int, file: str) -> str:
    try:
        return Path(f"/proc/{pid}/{file}").read_bytes().decode(errors="replace")
    except OSError:
        return ""
