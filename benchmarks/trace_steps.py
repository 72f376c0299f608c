"""What a profile of decode steps says: whether the thread that launches them waited, and whether the device did.

Of the events of a Chrome trace, as torch.profiler exports it. A step is the launch of one CUDA graph, whose kernels
carry the number (correlation) of that launch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from statistics import mean
from typing import Any

LAUNCHES = ("cudaGraphLaunch", "cuGraphLaunch")
WAITS = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpy",
    "cuStreamSynchronize",
    "cuCtxSynchronize",
    "cuEventSynchronize",
)
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")

Event = Mapping[str, Any]


def read_steps(events: Iterable[Event], least: int = 100) -> dict[str, object]:
    """Figures of all steps but the first and the last; times in microseconds. Raises ValueError if they are fewer than
    `least`.

    waits: by name, calls of the launching thread that wait for the device. ahead: the share of steps launched before
    the one before them ended on the device. idle_us: of the device, a step, between its operations; between_us: from a
    graph's end to the next one's begin; outside: operations of the device a step that are no part of a graph.
    """
    whole = [event for event in events if event.get("ph") == "X"]
    launches = sorted((event for event in whole if event["name"] in LAUNCHES), key=_begin)
    if len(launches) < least + 2:
        raise ValueError(f"the trace has {len(launches)} launches of graphs, and {least + 2} are wanted")
    on_device = [event for event in whole if event.get("cat") in ON_DEVICE]
    spans = _spans(on_device, {event["args"]["correlation"] for event in launches})
    launches = [event for event in launches if event["args"]["correlation"] in spans][1:-1]
    begin_us, end_us = _begin(launches[0]), _begin(launches[-1])
    steps, thread = len(launches) - 1, launches[0]["tid"]
    assert all(event["tid"] == thread for event in launches), "one thread launches all steps"
    calls = [each for each in whole if each["tid"] == thread and begin_us <= _begin(each) < end_us]
    ordered = [spans[event["args"]["correlation"]] for event in launches]
    ahead = [_begin(later) < span[1] for span, later in zip(ordered, launches[1:], strict=False)]
    first_us, last_us = ordered[0][0], ordered[-1][0]
    inside = [event for event in on_device if first_us <= _begin(event) < last_us]
    graphs = {event["args"]["correlation"] for event in launches}
    return {
        "steps": steps,
        "step_us": round((last_us - first_us) / steps, 1),
        "waits": dict(Counter(each["name"] for each in calls if each["name"] in WAITS)),
        "blocking_copies": sum("Pageable" in event["name"] for event in inside),
        "ahead": round(mean(ahead), 4),
        "calls": round(sum(each.get("cat") in ("cuda_runtime", "cuda_driver") for each in calls) / steps, 1),
        "outside": round(sum(event["args"].get("correlation") not in graphs for event in inside) / steps, 1),
        "idle_us": round((last_us - first_us - _busy_us(inside, last_us)) / steps, 1),
        "between_us": round(mean(later[0] - before[1] for before, later in pairwise(ordered)), 1),
    }


def _begin(event: Event) -> float:
    return float(event["ts"])


def _end(event: Event) -> float:
    return float(event["ts"]) + float(event["dur"])


def _spans(on_device: Sequence[Event], graphs: set[int]) -> dict[int, tuple[float, float]]:
    """By launch: when its first operation began on the device, and its last ended."""
    spans: dict[int, tuple[float, float]] = {}
    for event in on_device:
        launch = event["args"].get("correlation")
        if launch in graphs:
            begin, end = spans.get(launch, (float("inf"), 0.0))
            spans[launch] = min(begin, _begin(event)), max(end, _end(event))
    return spans


def _busy_us(events: Sequence[Event], last_us: float) -> float:
    """How long at least one of them ran, until last_us."""
    busy, until = 0.0, 0.0
    for event in sorted(events, key=_begin):
        begin, end = max(_begin(event), until), min(_end(event), last_us)
        if end > begin:
            busy, until = busy + end - begin, end
    return busy
