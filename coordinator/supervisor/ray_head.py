"""RayHead: a Ray of our own, started with `ray start --head` as processes of the supervisor, and ended with it.

Runs in the supervisor, which never imports Ray. The processes share a session, so that whatever is left of them can
be found and ended by its pid; should the supervisor be killed, the kernel tells them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from echelon.errors import InternalError

START_TIMEOUT_S = 60.0  # five seconds on an idle machine; an overloaded one was seen to take over 25
STOP_TIMEOUT_S = 5.0
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

    def command(self) -> list[str]:
        """What is run."""
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
            f"--temp-dir={self.folder / 'ray'}",
            f"--object-store-memory={OBJECT_STORE_BYTES}",
        ]


class RayHead:
    """Started by the constructor's caller with `start`; poll `is_up` and `ended`."""

    def __init__(self, config: RayHeadConfig) -> None:
        self._config = config
        self._process: subprocess.Popen[bytes] | None = None
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
        settings = {"RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0", "PYTHONUNBUFFERED": "1"}
        with self._config.log.open("wb") as log:
            self._process = subprocess.Popen(
                self._config.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._config.folder,
                env=environment | settings,
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
            return True
        if time.monotonic() - self._started_s > START_TIMEOUT_S:
            raise self._failure(output, f"Ray was not up within {START_TIMEOUT_S:g} s; is the machine overloaded?")
        return False

    def ended(self) -> bool:
        """Whether a started Ray is gone."""
        return self._process is not None and self._process.poll() is not None

    def stop(self) -> None:
        """SIGTERM, and after a few seconds SIGKILL to all that is left of the session. Idempotent."""
        if self._process is None:
            return
        session = self._process.pid
        # What Ray started may have left its process group, and once orphaned only the session tells whose it is.
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_TIMEOUT_S)
        _kill_all(session)
        self._process.wait()
        self._process = None

    def _failure(self, output: str, what: str) -> InternalError:
        told = "\n".join(output.strip().splitlines()[-TOLD_LINES:])
        return InternalError(f"Ray does not start:\n{told}\n{what} (command: {' '.join(self._config.command())})")


def end_with_parent() -> None:
    """In the child, before it runs: SIGTERM when the thread that started it ends."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _kill_all(session: int) -> None:
    """SIGKILL until the session is empty of living processes."""
    for _ in range(100):
        members = list(session_members(session))
        if not members:
            return
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def session_members(session: int) -> Iterator[int]:
    """Pids of a session's processes that are not mere zombies."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            # After the name in parentheses: state, parent, process group, session.
            state, _, _, owner = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(owner) == session and state not in "ZX":
                yield int(entry.name)
