"""Processes of this machine as /proc shows them: who lives, who is whose child, who listens, since when.

Linux alone. Whatever asks about a process that has ended is answered as if there had been nothing.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

LISTENING = "0A"  # TCP_LISTEN in /proc/net/tcp


def alive(pid: int) -> bool:
    """Whether a process of this number runs, zombies left out."""
    return _stat(pid)[:1] not in ([], ["Z"], ["X"])


def parent_of(pid: int) -> int:
    """0 for a process that has ended."""
    stat = _stat(pid)
    return int(stat[1]) if stat else 0


def started_unix_s(pid: int) -> float | None:
    """To a clock tick of 10 ms."""
    stat = _stat(pid)
    if not stat:
        return None
    since_boot_s = int(stat[19]) / os.sysconf("SC_CLK_TCK")
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + since_boot_s


def name_of(pid: int) -> str:
    """The first 15 characters of what it calls itself."""
    return _read(pid, "comm").decode(errors="replace").strip()


def arguments_of(pid: int) -> list[str]:
    """Its command line."""
    return _read(pid, "cmdline").decode(errors="replace").rstrip("\0").split("\0")


def descendants(pid: int) -> list[int]:
    """Its children, theirs, and so on, nearest first."""
    children: dict[int, list[int]] = {}
    for each in processes():
        children.setdefault(parent_of(each), []).append(each)
    found = list(children.get(pid, ()))
    for each in found:
        found.extend(children.get(each, ()))
    return found


def processes() -> list[int]:
    """All of them."""
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]


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


def _stat(pid: int) -> list[str]:
    """What stands behind the name in parentheses: state, parent, group, session, ..."""
    return _read(pid, "stat").decode(errors="replace").rpartition(")")[2].split()


def _read(pid: int, file: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{file}").read_bytes()
    except OSError:
        return b""
