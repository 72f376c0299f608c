"""RayHead: a Ray of our own, started with `ray start --head` as processes of the supervisor, and ended with it.

Runs in the supervisor, which never imports Ray. The processes share a session, so that whatever is left of them can
be found and ended by its pid; should the supervisor be killed, the kernel tells them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from echelon.errors import InternalError
from echelon.internal.processes import processes, session_members

START_TIMEOUT_S = 60.0  # five seconds on an idle machine; an overloaded one was seen to take over 25
STOP_TIMEOUT_S = 5.0
VITAL = ("gcs_server", "raylet")  # a head without one of them is none
# Ray believes in a dead node for 15 s by itself: after so many refused connections, so far apart. One that connects
# and does not answer still has Ray's own 10 s each time, for it may only be busy.
HEALTH_CHECK = {"RAY_health_check_period_ms": "500", "RAY_health_check_initial_delay_ms": "1000"}
STARTED_MARK = "Ray runtime started."
OBJECT_STORE_BYTES = 80_000_000  # nothing large goes through Ray; its smallest store is about this
TOLD_LINES = 12
PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None)


@dataclass(frozen=True, slots=True)
class RayHeadConfig:
    """host is what other nodes reach this one at. folder must be short: it holds Ray's sockets, and its log.

    client_port is for Ray's own remote client, which Ray insists on serving and Echelon does not use.
    """

    host: str
    port: int
    client_port: int
    num_cpus: int
    folder: Path

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def log(self) -> Path:
        return self.folder / "ray.log"

    def command(self, generation: int = 0) -> list[str]:
        """What is run. Each Ray has a folder of its own: by an earlier one's it would take that for a running one."""
        return [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "start",
            "--head",
            "--block",
            f"--port={self.port}",
            f"--node-ip-address={self.host}",
            f"--num-cpus={self.num_cpus}",
            f"--ray-client-server-port={self.client_port}",
            "--include-dashboard=false",
            "--disable-usage-stats",
            f"--temp-dir={self.folder / (f'ray{generation}' if generation else 'ray')}",
            f"--object-store-memory={OBJECT_STORE_BYTES}",
        ]


class RayHead:
    """Started by the constructor's caller with `start`; poll `is_up` and `ended`."""

    def __init__(self, config: RayHeadConfig) -> None:
        self._config = config
        self._process: subprocess.Popen[bytes] | None = None
        self._vital: dict[str, int] = {}  # pidfds by name, once it is up
        self._generation = 0
        self._command: list[str] = []
        self._started_s = 0.0

    @property
    def pid(self) -> int:
        """Of `ray start`, which is the session of all of them; 0 before the start."""
        return self._process.pid if self._process else 0

    def start(self, environment: dict[str, str]) -> None:
        """Begin to start Ray. Call it in the main thread: Ray is told to end when this thread does."""
        assert self._process is None, "this Ray is running"
        self._config.folder.mkdir(parents=True, exist_ok=True)
        self._started_s = time.monotonic()
        self._command = self._config.command(self._generation)
        self._generation += 1
        settings = {"RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0", "PYTHONUNBUFFERED": "1"}
        with self._config.log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._config.folder,
                env=HEALTH_CHECK | environment | settings,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )

    def is_up(self) -> bool:
        """Whether Ray serves. Raises InternalError, Ray's own output on top, when it ended or took too long."""
        assert self._process is not None, "Ray was not started"
        output = self._config.log.read_text(errors="replace")
        if self._process.poll() is not None:
            raise self._failure(output, f"Ray ended with exit code {self._process.returncode} while starting")
        if STARTED_MARK in output:
            own = [process for process in processes().values() if process.session == self._process.pid]
            for each in own:
                if each.name in VITAL and each.name not in self._vital:
                    with contextlib.suppress(ProcessLookupError):  # then `ray start` ends too, in a second
                        self._vital[each.name] = os.pidfd_open(each.pid)
            return True
        if time.monotonic() - self._started_s > START_TIMEOUT_S:
            raise self._failure(output, f"Ray was not up within {START_TIMEOUT_S:g} s; is the machine overloaded?")
        return False

    def ended(self) -> str:
        """What a started Ray cannot go on after; empty while all that it needs runs.

        `ray start` would see it too, a second later, and takes its time to end the others.
        """
        for name, fd in self._vital.items():
            if select.select([fd], [], [], 0.0)[0]:
                return f"Ray's {name} has ended"
        return "Ray has ended" if self._process is not None and self._process.poll() is not None else ""

    def stop(self) -> None:
        """SIGTERM, unless it has ended by itself, and after a few seconds SIGKILL to all that is left of the session.

        Idempotent.
        """
        if self._process is None:
            return
        session = self._process.pid
        # What Ray started may have left its process group, and once orphaned only the session tells whose it is.
        if not self.ended():
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_TIMEOUT_S)
        _kill_all(session)
        self._process.wait()
        for fd in self._vital.values():
            os.close(fd)
        self._process, self._vital = None, {}

    def _failure(self, output: str, what: str) -> InternalError:
        told = "\n".join(output.strip().splitlines()[-TOLD_LINES:])
        return InternalError(f"Ray does not start:\n{told}\n{what} (command: {' '.join(self._command)})")


def end_with_parent() -> None:
    """In the child, before it runs: SIGTERM when the thread that started it ends."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _kill_all(session: int) -> None:
    """SIGKILL until the session is empty of living processes."""
    for _ in range(100):
        members = session_members(session)
        if not members:
            return
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
