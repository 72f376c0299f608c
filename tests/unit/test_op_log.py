"""The log of executed operations: lines that `echelon trace` reads, and a full disk that ends the log alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from parallel.degrees import Degrees
from parallel.schedule import Kind, Op
from parallel.trace import parse_records
from worker.op_clock import OpClock, Span
from worker.op_log import OpLog
from worker.pending import Queued

CLOCK = OpClock(torch.device("cpu"))


def queued(step: int) -> Queued:
    start = CLOCK.mark()
    return Queued(step, Span(start, CLOCK.mark()))


def test_lines_are_read_back(tmp_path: Path) -> None:
    place = Degrees(pipeline=2, tensor=2).place(3)
    log = OpLog(tmp_path / "new", 0, 7, place, CLOCK)
    done = [(Op(Kind.FORWARD, 0), queued(1)), (Op(Kind.BACK, 0), queued(1)), (Op(Kind.FORWARD, 1), queued(2))]
    for op, each in done:
        log.write(op, each)
    log.close()
    file = tmp_path / "new" / "replica-0-epoch-7-p1-d0-t1.jsonl"
    records = parse_records(file.read_text().splitlines(), file.name)
    assert [(record.op, record.step, record.epoch, record.stage) for record in records] == [
        (op, each.step, 7, 1) for op, each in done
    ]
    assert all(record.start_s <= record.end_s for record in records)


def test_a_full_disk_ends_the_log_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "replica-0-epoch-1-p0-d0-t0.jsonl").symlink_to("/dev/full")
    log = OpLog(tmp_path, 0, 1, Degrees().place(0), CLOCK)
    for step in (1, 2):
        log.write(Op(Kind.FORWARD, step), queued(step))
    log.close()
    assert "the log of operations" in capsys.readouterr().out
