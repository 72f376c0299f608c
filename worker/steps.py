"""Runs an epoch's plans: operations queued in order in one thread, their results taken in another.

In every rank process. The next step is launched before the result of the last one is waited for, so the device does
not stand idle while ids travel. A step that breaks is told once, and nothing is launched after it.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable

from parallel.schedule import Op
from worker.epoch import Epoch
from worker.pending import Queued
from worker.plan import DRAIN, StepResult, decode
from worker.step_times import StepTimes

DRAIN_S, ABORT_S = 1.5, 1.5  # for the steps of an epoch that ends: to run to their end, then to fail in closed groups


class Steps:
    """on_result and on_fault are called from the threads, which end when there are no more plans, and at a fault."""

    def __init__(
        self, epoch: Epoch, on_result: Callable[[StepResult], None], on_fault: Callable[[Exception], None]
    ) -> None:
        self.times = StepTimes()
        self._epoch = epoch
        self._on_result = on_result
        self._on_fault = on_fault
        self._queued: queue.SimpleQueue[tuple[Op, Queued] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._told, args=(work,), name=work.__name__, daemon=True)
            for work in (self._launch, self._finish)
        ]
        self._begun = 0
        self._done = 0

    @property
    def step(self) -> int:
        """The last step that has run to its end."""
        return self._done

    @property
    def stepping(self) -> bool:
        """Whether a step runs now."""
        return self._begun != self._done

    @property
    def running(self) -> tuple[int, int]:
        """The first and the last of the steps that run; the first is the later one if none does."""
        return self._done + 1, self._begun

    def start(self) -> None:
        """Begin to take plans."""
        for thread in self._threads:
            thread.start()

    def join(self, timeout_s: float) -> None:
        """Until every plan has run, or one has failed. Raises TimeoutError."""
        deadline_s = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(deadline_s - time.monotonic(), 0.0))
            if thread.is_alive():
                raise TimeoutError(f"step {self._begun} did not end within {timeout_s:g} s")

    def _launch(self) -> None:
        try:
            for payload in self._epoch.plans:
                tables = None if payload == DRAIN else decode(payload)
                if tables is not None:
                    self._begun = tables.step
                    self.times.begin(tables)
                for queued in self._epoch.stage.take(tables):
                    self._queued.put(queued)
        finally:
            self._queued.put(None)

    def _finish(self) -> None:
        while (taken := self._queued.get()) is not None:
            op, queued = taken
            if queued.pending is not None:
                result = queued.pending.result()
                self._epoch.stage.runner.tell_non_finite(queued.pending, result)
                self._done = result.step
                self.times.end()
                self._on_result(result)
            if self._epoch.op_log is not None:
                self._epoch.op_log.write(op, queued)

    def _told(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 - whatever breaks a step ends the epoch; the coordinator decides
            self._on_fault(error)


def end_epoch(epoch: Epoch, steps: Steps) -> None:
    """In a thread: let what was planned run, then close all. Raises TimeoutError when a step does not even fail."""
    if epoch.lead is not None:
        epoch.lead.end_plans()
    with contextlib.suppress(TimeoutError):
        steps.join(DRAIN_S)
    epoch.resources.close()
    steps.join(ABORT_S)
