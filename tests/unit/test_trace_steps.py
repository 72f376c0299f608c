"""What is read out of a trace of decode steps, on traces whose answers are known."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.trace_steps import read_steps

STEP_US, RUNS_US = 100.0, 90.0


def trace(steps: int, late: frozenset[int] = frozenset(), wait: str = "") -> Iterator[dict[str, Any]]:
    """Graphs of two kernels, 80 and 8 us with a gap of 2, and a copy outside of 4 us; launched 50 us before they begin,
    or late, behind the end of the one before. wait: a call of the launching thread in each step."""
    for step in range(steps):
        begin, number = step * STEP_US, 2 * step
        at = begin - 5 if step in late else begin - 50
        yield {"ph": "M", "name": "a name"}
        yield _event("cudaGraphLaunch", at, 4, "cuda_runtime", number, tid=7)
        if wait:
            yield _event(wait, at + 10, 4, "cuda_runtime", number + 100_000, tid=7)
        yield _event("cudaEventSynchronize", at + 20, 30, "cuda_runtime", number + 200_000, tid=8)
        yield _event("matmul", begin, 80, "kernel", number)
        yield _event("add", begin + 82, 8, "kernel", number)
        yield _event("Memcpy DtoH (Device -> Pinned)", begin + 92, 4, "gpu_memcpy", number + 1)


def _event(name: str, at: float, took: float, kind: str, number: int, tid: int = 0) -> dict[str, Any]:
    return {"ph": "X", "name": name, "ts": at, "dur": took, "cat": kind, "tid": tid, "args": {"correlation": number}}


def test_figures_of_steady_steps() -> None:
    found = read_steps(trace(103))
    assert found == {
        "steps": 100,
        "step_us": 100.0,
        "waits": {},
        "blocking_copies": 0,
        "ahead": 1.0,
        "calls": 1.0,
        "outside": 1.0,
        "idle_us": 8.0,
        "between_us": 10.0,
    }


@pytest.mark.parametrize("wait", ["cudaStreamSynchronize", "cudaEventSynchronize"])
def test_a_wait_of_the_launching_thread_is_counted(wait: str) -> None:
    assert read_steps(trace(103, wait=wait))["waits"] == {wait: 100}


def test_late_launches_are_counted() -> None:
    assert read_steps(trace(103, late=frozenset({1, 30, 31})))["ahead"] == 0.98  # the first two are left out


def test_too_short_a_trace_is_refused() -> None:
    with pytest.raises(ValueError, match="101 launches of graphs, and 102 are wanted"):
        read_steps(trace(101))
