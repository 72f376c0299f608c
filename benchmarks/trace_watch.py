"""What benchmarks/trace_decode.py watches in one rank while its steps run: results, times of calls, and profiles."""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.trace_steps import read_steps
from worker.plan import StepResult

WARM_STEPS, PATIENCE_S = 60, 60.0


class Watch:
    """Counts results, and times calls of this process: what is called by other threads is replaced in place."""

    def __init__(self) -> None:
        self.done = 0
        self._seen = threading.Condition()
        self.took_us: dict[str, list[float]] = {"host_us": [], "engine_us": []}

    def count(self, result: StepResult) -> None:
        with self._seen:
            self.done += 1
            self._seen.notify_all()

    def wait(self, steps: int) -> None:
        """For so many results more."""
        with self._seen:
            until = self.done + steps
            if not self._seen.wait_for(lambda: self.done >= until, PATIENCE_S):
                raise TimeoutError(f"{self.done} steps have run")

    def time(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            began_s = time.perf_counter()
            try:
                return call(*arguments)
            finally:
                self.took_us[name].append((time.perf_counter() - began_s) * 1e6)

        return timed


def measure(rows: int, arguments: argparse.Namespace, watch: Watch) -> dict[str, object]:
    """In a thread, while steps run: first without a profile, then with it."""
    watch.wait(WARM_STEPS)
    for times in watch.took_us.values():
        times.clear()
    began, began_s = watch.done, time.perf_counter()
    watch.wait(arguments.steps)
    steps, took_s = watch.done - began, time.perf_counter() - began_s
    found: dict[str, object] = {
        "tokens_s": round(rows * steps / took_s, 1),
        "plain_step_us": round(took_s / steps * 1e6, 1),
    }
    found |= {name: round(mean(times), 1) for name, times in watch.took_us.items() if times}
    if arguments.device == "cpu":
        return found
    with tempfile.TemporaryDirectory() as folder:
        path = Path(arguments.keep or folder) / f"rank-{arguments.rank}-rows-{rows}.json"
        with profiled(arguments, path):
            watch.wait(arguments.steps + 5)
        return found | read_steps(json.loads(path.read_text())["traceEvents"], arguments.steps - 20)


@contextmanager
def profiled(arguments: argparse.Namespace, path: Path | None) -> Iterator[None]:
    """What the device does, and what all threads of this process ask it for; path: where the trace goes."""
    if arguments.device == "cpu":
        yield
        return
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
    profile.start()
    yield
    profile.stop()
    if path is not None:
        profile.export_chrome_trace(str(path))
