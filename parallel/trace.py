"""The log of executed operations: one JSON object a line, written by ranks, read by `echelon trace` and by tests.

Pure and torch-free. {"epoch", "step", "stage", "op": "F" or "B", "microbatch", "chunk", "start_s", "end_s"}, times on
the rank's clock; epoch, step and chunk are 0 if left out. It opens no file and knows no picture.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

from echelon.errors import ConfigError
from parallel.schedule import Kind, Op
from parallel.timeline import OpRecord

COUNTS = {"stage": None, "microbatch": None, "epoch": 0, "step": 0, "chunk": 0}  # field -> what it is if left out


def record_line(record: OpRecord) -> str:
    """A record's line, without the newline."""
    return json.dumps(
        {
            "epoch": record.epoch,
            "step": record.step,
            "stage": record.stage,
            "op": record.op.kind.value,
            "microbatch": record.op.microbatch,
            "chunk": record.op.chunk,
            "start_s": record.start_s,
            "end_s": record.end_s,
        }
    )


def parse_records(lines: Iterable[str], name: str) -> list[OpRecord]:
    """The records of a log, empty lines left out. Raises ConfigError with name, line and field."""
    return [_parse(line, f"{name}:{number}") for number, line in enumerate(lines, 1) if line.strip()]


def merged(records: Iterable[OpRecord]) -> list[OpRecord]:
    """One record for an operation of a stage that several ranks did together: from the first start to the last end."""
    found: dict[tuple[int, int, int, Op], OpRecord] = {}
    for record in records:
        key = (record.epoch, record.step, record.stage, record.op)
        other = found.get(key, record)
        found[key] = record._replace(start_s=min(record.start_s, other.start_s), end_s=max(record.end_s, other.end_s))
    return list(found.values())


def _parse(line: str, place: str) -> OpRecord:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{place}: not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{place}: expected a JSON object with stage, op, microbatch, start_s and end_s")
    if fields.get("op") not in list(Kind):
        raise ConfigError(f'{place}: op must be "F" or "B", got {json.dumps(fields.get("op"))}', field="op")
    count = {field: _count(fields.get(field, missing), field, place) for field, missing in COUNTS.items()}
    start_s, end_s = (_seconds(fields.get(field), field, place) for field in ("start_s", "end_s"))
    if end_s < start_s:
        raise ConfigError(f"{place}: end_s {end_s:g} is before start_s {start_s:g}", field="end_s")
    op = Op(Kind(fields["op"]), count["microbatch"], count["chunk"])
    return OpRecord(count["stage"], op, start_s, end_s, count["epoch"], count["step"])


def _count(value: Any, field: str, place: str) -> int:
    if type(value) is not int or value < 0:
        raise ConfigError(f"{place}: {field} must be an integer >= 0, got {json.dumps(value)}", field=field)
    return value


def _seconds(value: Any, field: str, place: str) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ConfigError(f"{place}: {field} must be a finite number of seconds, got {json.dumps(value)}", field=field)
    return float(value)
