"""Timelines in the trace event format that Perfetto (ui.perfetto.dev) and chrome://tracing open.

In the user's terminal. Pure. A timeline is a process, a stage a thread, an operation a slice; arrows follow each
micro-batch from stage to stage. Format: Google's "Trace Event Format", events X, M, s and f, times in microseconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from parallel.schedule import Kind
from parallel.timeline import OpRecord, Timeline

MICROSECONDS = 1e6


def to_chrome(timelines: Sequence[tuple[str, Timeline]]) -> str:
    """The JSON document of named timelines, each beginning at time 0."""
    events = [event for index, (name, timeline) in enumerate(timelines) for event in _process(index, name, timeline)]
    return json.dumps({"displayTimeUnit": "ms", "traceEvents": events})


def _process(process: int, name: str, timeline: Timeline) -> Iterator[dict[str, Any]]:
    yield {"ph": "M", "name": "process_name", "pid": process, "args": {"name": name}}
    for stage in range(timeline.stages):
        yield {"ph": "M", "name": "thread_name", "pid": process, "tid": stage, "args": {"name": f"stage {stage}"}}
        yield {"ph": "M", "name": "thread_sort_index", "pid": process, "tid": stage, "args": {"sort_index": stage}}
    forwards = {
        (record.epoch, record.op, record.stage): record for record in timeline.records if record.op.kind is Kind.FORWARD
    }
    for record in timeline.records:
        yield _slice(process, record, timeline)
        following = forwards.get((record.epoch, record.op, record.stage + 1))
        if following is not None and record.op.kind is Kind.FORWARD:
            yield from _arrow(process, record, following, timeline)


def _slice(process: int, record: OpRecord, timeline: Timeline) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": str(record.op),
        "cat": record.op.kind.value,
        "pid": process,
        "tid": record.stage,
        "ts": (record.start_s - timeline.start_s) * MICROSECONDS,
        "dur": (record.end_s - record.start_s) * MICROSECONDS,
        "args": {
            "epoch": record.epoch,
            "step": record.step,
            "microbatch": record.op.microbatch,
            "chunk": record.op.chunk,
        },
    }


def _arrow(process: int, record: OpRecord, following: OpRecord, timeline: Timeline) -> Iterator[dict[str, Any]]:
    """From inside one slice to the beginning of the next: an arrow's ends belong to the slices they lie in."""
    head = {"name": "micro-batch", "cat": "flow", "pid": process}
    number = f"{process}/{record.epoch}/{record.op}/{record.stage}"
    inside_s = (record.start_s + record.end_s) / 2 - timeline.start_s
    yield {**head, "ph": "s", "id": number, "tid": record.stage, "ts": inside_s * MICROSECONDS}
    start_us = (following.start_s - timeline.start_s) * MICROSECONDS
    yield {**head, "ph": "f", "bp": "e", "id": number, "tid": following.stage, "ts": start_us}
