"""NodeAgent: holds a pidfd of every rank on its node, kills them on order and confirms, and ends them with the lease.

One per node, in a small torch-free process. A pidfd names a process and never its successor under the same pid, so
a kill cannot hit a stranger. A stopped or wedged rank cannot honour a lease itself: the agent does it for it. Should
the agent die alone, its ranks end with it. Knows no Ray; `worker/actor.py` wraps it.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable

from worker.spec import is_named

KILL_TIMEOUT_S = 10.0
WATCH_S = 60.0


class NodeAgent:
    """Thread-safe: one thread may wait for deaths while another kills."""

    def __init__(self, lease_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._term = 0
        self._lock = threading.Lock()
        self._fds: dict[str, int] = {}
        self._lease_ends_s = clock() + lease_s

    def obeys(self, term: int) -> bool:
        """Whether the coordinator of this term may give orders: nobody of a later one has."""
        with self._lock:
            self._term = max(self._term, term)
            return term == self._term

    def register(self, name: str, pid: int) -> None:
        """Take charge of a process. Raises ProcessLookupError if it has ended already."""
        fd = os.pidfd_open(pid)
        with self._lock:
            assert name not in self._fds, f"{name} is registered twice"
            self._fds[name] = fd

    def rename(self, name: str, new_name: str) -> None:
        """A registered process goes by another name. Raises ProcessLookupError if its end has been told."""
        with self._lock:
            if name not in self._fds:
                raise ProcessLookupError(f"{name} has ended")
            assert new_name not in self._fds, f"{new_name} is registered twice"
            self._fds[new_name] = self._fds.pop(name)

    def living(self) -> list[str]:
        """Names of the registered processes that have not ended."""
        with self._lock:
            return [name for name, fd in self._fds.items() if not _ended(fd, 0.0)]

    def kill(self, prefix: str, first: str = "", timeout_s: float = KILL_TIMEOUT_S) -> list[str]:
        """SIGKILL the process of that name, or all whose names begin with a prefix that ends in a slash, `first` first.

        Returns the names that are not confirmed gone within the timeout: empty is success.
        """
        with self._lock:
            targets = {name: self._fds.pop(name) for name in list(self._fds) if is_named(name, prefix)}
        for name in sorted(targets, key=lambda name: not is_named(name, first)):
            _kill(targets[name])
        deadline_s = time.monotonic() + timeout_s
        left = {n: fd for n, fd in targets.items() if not _ended(fd, max(deadline_s - time.monotonic(), 0.0))}
        for name in targets.keys() - left.keys():
            os.close(targets[name])
        with self._lock:
            self._fds.update(left)
        return sorted(left)

    def deaths(self, timeout_s: float) -> list[str]:
        """Wait until a registered process ends unordered; each is told once. Empty after the timeout."""
        deadline_s = self._clock() + timeout_s
        while True:
            with self._lock:
                dead = [name for name, fd in self._fds.items() if _ended(fd, 0.0)]
                for name in dead:
                    os.close(self._fds.pop(name))
                watched = [os.dup(fd) for fd in self._fds.values()]
            try:
                wait_s = deadline_s - self._clock()
                if dead or wait_s <= 0:
                    return dead
                # Woken at intervals too: processes are registered while this waits.
                select.select(watched, (), (), min(wait_s, 0.2))
            finally:
                for fd in watched:
                    os.close(fd)

    def renew(self, lease_s: float) -> None:
        """The coordinator lives: its processes may live so much longer."""
        self._lease_ends_s = self._clock() + lease_s

    def expired(self) -> bool:
        """Whether the lease has ended; the caller then kills everything."""
        return self._clock() > self._lease_ends_s


def end_with(pid: int) -> None:
    """From now on this process ends when that one does. Raises ProcessLookupError if it has ended already."""
    fd = os.pidfd_open(pid)

    def watch() -> None:
        while not _ended(fd, WATCH_S):
            pass
        os._exit(1)

    threading.Thread(target=watch, name="master", daemon=True).start()


def _kill(fd: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # ended already, which is what was wanted
        signal.pidfd_send_signal(fd, signal.SIGKILL)


def _ended(fd: int, timeout_s: float) -> bool:
    """A pidfd is readable once its process has ended, whether or not it was reaped."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))
