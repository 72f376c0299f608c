"""Supervisor: the process behind `echelon serve`. Starts Ray and the coordinator, replaces it, ends what it started.

Small on purpose: one thread, no gRPC, no Ray, nothing that could hang or grow. The coordinator gets its configuration
on stdin, whose end tells it that the supervisor is gone, and answers JSON lines on stdout. Decisions are
`coordinator/supervisor/core.py`'s; this shell executes them.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Protocol

from coordinator.supervisor import events as supervision
from coordinator.supervisor.core import SupervisorCore
from coordinator.supervisor.events import Effect, Event
from coordinator.supervisor.ray_head import RayHead
from echelon.config import CoordinatorConfig
from echelon.errors import EchelonError, InternalError

POLL_S, READ_POLL_S = 0.2, 0.02
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Display(Protocol):
    """Where the user looks."""

    def loading(self, loaded_bytes: int, total_bytes: int) -> None:
        """Weights are being loaded."""

    def ready(self, address: str, took_s: Mapping[str, float]) -> None:
        """The cluster serves. took_s: of each part of its start."""

    def warn(self, message: str) -> None:
        """Something went wrong and was dealt with."""


class CoordinatorProcess:
    """One coordinator: its pipes and its end."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        # An empty working folder: Ray puts a driver's at the front of its workers' import path. Ray must never start
        # another Ray when it is called too late. A SIGTERM waits until the coordinator can end its ranks.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "coordinator"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd=folder,
                env={**environment, "PYTHONSAFEPATH": "1", "RAY_ENABLE_AUTO_CONNECT": "0"},
                start_new_session=True,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        assert self._process.stdin is not None and self._process.stdout is not None
        self.stdout = self._process.stdout
        self._partial = b""
        os.set_blocking(self.stdout.fileno(), False)
        self._stdin = self._process.stdin

    def configure(self, config: CoordinatorConfig) -> None:
        """What it is to serve, now or from now on. Before the first it waits."""
        with contextlib.suppress(BrokenPipeError):  # it has ended, which its exit code says
            self._stdin.write(config.model_dump_json().encode() + b"\n")
            self._stdin.flush()

    def messages(self) -> list[Mapping[str, object]]:
        """What it has said since. A line that is no JSON object is a library's and is passed over."""
        read = self.stdout.read() or b""
        *lines, self._partial = (self._partial + read).split(b"\n")
        return [message for line in lines if (message := _object(line)) is not None]

    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def signal(self, number: int) -> None:
        """Send a signal, if it still runs."""
        self._process.send_signal(number)

    def close(self) -> None:
        """Make sure that it has ended, and close its pipes."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


class Supervisor:
    """Owns the processes of one `echelon serve`. ray is None when another Ray is joined; folder holds ours alone.

    reread: what there is to serve now, given what is served. Called at SIGHUP, in a thread; raises EchelonError.
    """

    def __init__(
        self,
        config: CoordinatorConfig,
        ray: RayHead | None,
        folder: Path,
        environment: Mapping[str, str],
        display: Display,
        reread: Callable[[CoordinatorConfig], CoordinatorConfig] | None = None,
    ) -> None:
        self._config = self._earlier = self._wanted = config
        self._reread = reread
        self._read: queue.SimpleQueue[CoordinatorConfig | EchelonError] = queue.SimpleQueue()
        self._reading = False
        self._ray = ray
        self._ray_starting = False
        self._folder = folder / "empty"
        self._environment = dict(environment)
        self._display = display
        self._core = SupervisorCore(ray is not None, config.drain_timeout_s, reread is not None)
        self._coordinator: CoordinatorProcess | None = None
        self._successor: CoordinatorProcess | None = None
        self._exit: supervision.Exit | None = None

    def run(self) -> supervision.Exit:
        """Until it is over; nothing of it runs any more then. Call it in the main thread."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with _signals() as (wake, take_signals):
            try:
                self._step(supervision.Begin())
                due_s = time.monotonic() + POLL_S
                while self._exit is None:
                    self._wait(wake)
                    for number in take_signals():
                        self._step(supervision.Signalled(number))
                    self._look_at_ray()
                    self._look_at_coordinator()
                    self._look_at_file()
                    now_s = time.monotonic()
                    if now_s >= due_s:
                        self._step(supervision.Tick(lag_s=now_s - due_s))
                        due_s = time.monotonic() + POLL_S
            finally:
                for process in filter(None, (self._coordinator, self._successor)):
                    process.close()
                if self._ray is not None:
                    self._ray.stop()
        return self._exit

    def _wait(self, wake: int) -> None:
        """Until there is something to read, or a moment has passed."""
        with selectors.DefaultSelector() as selector:
            selector.register(wake, selectors.EVENT_READ)
            if self._coordinator is not None:
                selector.register(self._coordinator.stdout, selectors.EVENT_READ)
            selector.select(READ_POLL_S if self._reading else POLL_S)

    def _look_at_ray(self) -> None:
        if self._ray is None:
            return
        if not self._ray_starting:
            if reason := self._ray.ended():
                self._step(supervision.RayEnded(reason))
            return
        try:
            self._ray_starting = not self._ray.is_up()
        except InternalError as error:
            self._ray_starting = False
            self._step(supervision.RayFailed(error.message))
            return
        if not self._ray_starting:
            self._step(supervision.RayUp())

    def _look_at_coordinator(self) -> None:
        coordinator = self._coordinator
        if coordinator is None:
            return
        code = coordinator.exit_code()  # asked first, so that its last words are read before its end is told
        for message in coordinator.messages():
            self._step(supervision.Told(message))
        if code is not None:
            coordinator.close()
            self._coordinator = None
            self._step(supervision.CoordinatorEnded(code))

    def _look_at_file(self) -> None:
        """What has been read of it, if anything has."""
        if not self._reading or self._read.empty():
            return
        self._reading = False
        match self._read.get():
            case CoordinatorConfig() as config:
                self._earlier, self._wanted = self._config, config
                self._step(supervision.ConfigurationRead(changed=config != self._config))
            case EchelonError() as error:
                self._step(supervision.ConfigurationRefused(error.message))

    def _read_file(self, reread: Callable[[CoordinatorConfig], CoordinatorConfig], serving: CoordinatorConfig) -> None:
        try:
            self._read.put(reread(serving))
        except EchelonError as error:
            self._read.put(error)
        except Exception as error:  # noqa: BLE001 - a thread's last words; what serves goes on
            self._read.put(InternalError(f"{type(error).__name__}: {error}"))

    def _step(self, event: Event) -> None:
        for effect in self._core.step(time.monotonic(), event):
            self._execute(effect)

    def _execute(self, effect: Effect) -> None:
        match effect:
            case supervision.StartRay():
                assert self._ray is not None
                self._ray.stop()
                self._ray.start(self._environment)
                self._ray_starting = True
            case supervision.StartCoordinator(served):
                self._prepare()
                self._coordinator, self._successor = self._successor, None
                assert self._coordinator is not None
                self._coordinator.configure(self._config.model_copy(update={"served": served}))
            case supervision.PrepareSuccessor():
                self._prepare()
            case supervision.SignalCoordinator(number):
                if self._coordinator is not None:
                    self._coordinator.signal(number)
            case supervision.ReadConfiguration():
                assert self._reread is not None
                self._reading = True
                work = threading.Thread(target=self._read_file, args=(self._reread, self._config), daemon=True)
                work.start()
            case supervision.SendConfiguration():
                if self._coordinator is not None:
                    self._coordinator.configure(self._wanted)
            case supervision.TakeConfiguration(read):
                self._config = self._wanted if read else self._earlier
            case supervision.ShowLoading(loaded_bytes, total_bytes):
                self._display.loading(loaded_bytes, total_bytes)
            case supervision.ShowReady(address, took_s):
                self._display.ready(address, took_s)
            case supervision.Warn(message):
                self._display.warn(message)
            case supervision.Exit():
                self._exit = effect

    def _prepare(self) -> None:
        if self._successor is not None and self._successor.exit_code() is not None:
            self._successor.close()
            self._successor = None
        self._successor = self._successor or CoordinatorProcess(self._folder, self._environment)


def _object(line: bytes) -> Mapping[str, object] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


@contextlib.contextmanager
def _signals() -> Iterator[tuple[int, Callable[[], list[int]]]]:
    """A descriptor that wakes a selector when a signal comes, and a function that takes those that came."""
    arrived: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        arrived.append(number)

    def take() -> list[int]:
        with contextlib.suppress(BlockingIOError):
            os.read(read_end, 4096)
        taken = arrived.copy()
        del arrived[: len(taken)]
        return taken

    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    os.set_blocking(write_end, False)
    earlier_wakeup = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    earlier = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield read_end, take
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(earlier_wakeup)
        os.close(read_end)
        os.close(write_end)
