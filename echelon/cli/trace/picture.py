"""Draws timelines: a row for each stage, a box for each operation, in the colour of its micro-batch.

In the user's terminal. Pure: timelines in, shapes out. Forwards are strong, backs pale; what is left grey is the
bubble. Tokens that return to the first stage at inference are thin lines upward.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from echelon.cli.trace.drawing import Box, Label, Line, Picture, Shape
from echelon.cli.trace.figures import Figures, summary
from parallel.schedule import Kind
from parallel.timeline import OpRecord, Timeline

WIDTH = 1200
LEFT, RIGHT, MARGIN = 92, 96, 28  # stage names; how busy each stage was
TITLE, ROW, GAP, AXIS, BETWEEN = 58, 40, 6, 34, 30
TICKS = 8
TRAINING, RETURNING = "strong: F, forward; pale: B, back", "boxes: F, forward; lines: B, tokens that return"
LETTER = 0.62  # of the font size: the width of a digit

INK, FAINT, WAY, IDLE, GRID = "#1f2933", "#6b7785", "#3e4c59", "#edf0f4", "#d5dbe3"
STRONG = ("#3b6fb6", "#d9822b", "#3f9b63", "#c44e52", "#7d5ba6", "#2a9d9f", "#a98f1f", "#c05c94")
PALE = ("#c3d5ee", "#f5d9b8", "#c2e5cf", "#f0c6c8", "#d9cdea", "#bce4e4", "#ece2b3", "#efcbe0")
COLOURS = len(STRONG)


@dataclass(frozen=True, slots=True)
class Panel:
    """A timeline with the figures that head it.

    colours: after how many micro-batches they begin again, as cohorts do. returns: backs are tokens that return.
    """

    figures: Figures
    timeline: Timeline
    colours: int = COLOURS
    returns: bool = True


def draw(panels: Sequence[Panel]) -> Picture:
    """The panels under each other, each on its own clock."""
    shapes: list[Shape] = []
    top = float(MARGIN)
    for panel in panels:
        shapes += _panel(panel, top)
        top += _height(panel) + BETWEEN
    return Picture(WIDTH, math.ceil(top - BETWEEN + MARGIN), tuple(shapes))


def _height(panel: Panel) -> float:
    return TITLE + panel.timeline.stages * (ROW + GAP) + AXIS


@dataclass(frozen=True, slots=True)
class _Frame:
    """Where in the picture a time and a stage are."""

    timeline: Timeline
    top: float

    def x(self, time_s: float) -> float:
        span_s = self.timeline.span_s or 1.0
        return LEFT + (time_s - self.timeline.start_s) / span_s * (WIDTH - LEFT - RIGHT)

    def y(self, stage: int) -> float:
        return self.top + TITLE + stage * (ROW + GAP)

    @property
    def bottom(self) -> float:
        return self.y(self.timeline.stages)


def _panel(panel: Panel, top: float) -> Iterator[Shape]:
    frame, timeline = _Frame(panel.timeline, top), panel.timeline
    yield Label(MARGIN, top + 10, panel.figures.title, 20, INK)
    yield Label(MARGIN, top + 35, summary(panel.figures), 13, FAINT)
    yield Label(WIDTH - MARGIN, top + 35, RETURNING if panel.returns else TRAINING, 13, FAINT, "end")
    for stage in range(timeline.stages):
        y = frame.y(stage)
        yield Label(MARGIN, y + ROW / 2, f"stage {stage}", 14, INK)
        yield Box(LEFT, y, WIDTH - LEFT - RIGHT, ROW, IDLE, 3)
        yield Label(WIDTH - MARGIN, y + ROW / 2, f"{1 - panel.figures.stages[stage].idle:.0%} busy", 13, FAINT, "end")
    yield from _axis(frame)
    for record in timeline.records:
        yield from _operation(record, frame, panel.colours)
    if panel.returns and timeline.stages > 1:
        yield from _returns(frame)


def _operation(record: OpRecord, frame: _Frame, colours: int) -> Iterator[Shape]:
    """A box with the micro-batch's number where it has room; at least a line of a pixel."""
    x, end, y = frame.x(record.start_s), frame.x(record.end_s), frame.y(record.stage)
    colour = record.op.microbatch % min(colours, COLOURS)
    forward = record.op.kind is Kind.FORWARD
    width = max(1.0, end - x - 1)
    yield Box(x, y, width, ROW, (STRONG if forward else PALE)[colour], min(3.0, width / 4))
    text = f"{record.op.microbatch}" + (f"·{record.op.chunk}" if record.op.chunk else "")
    if (size := min(15.0, width / (len(text) * LETTER) - 2)) >= 7:
        yield Label(x + width / 2, y + ROW / 2, text, round(size), "#ffffff" if forward else INK, "middle")


def _returns(frame: _Frame) -> Iterator[Shape]:
    """Tokens on their way: from the end of a back on the last stage to the start of the same on the first."""
    last = frame.timeline.stages - 1
    backs = [record for record in frame.timeline.records if record.op.kind is Kind.BACK]
    sent = {(record.epoch, record.op): record.end_s for record in backs if record.stage == last}
    for record in backs:
        if record.stage == 0 and (record.epoch, record.op) in sent:
            sent_x, here_x = frame.x(sent[record.epoch, record.op]), frame.x(record.start_s)
            yield Line(sent_x, frame.y(last), here_x, frame.y(0) + ROW, WAY)


def _axis(frame: _Frame) -> Iterator[Shape]:
    timeline, y = frame.timeline, frame.bottom
    step_s, unit, per_unit = _ticks(timeline.span_s)
    for tick in range(int(timeline.span_s / step_s + 1e-9) + 1):
        x = frame.x(timeline.start_s + tick * step_s)
        yield Line(x, frame.y(0) - 4, x, y, GRID)
        yield Label(x, y + 12, f"{tick * step_s * per_unit:g}", 12, FAINT, "middle")
    yield Label(WIDTH - MARGIN, y + 12, unit, 12, FAINT, "end")


def _ticks(span_s: float) -> tuple[float, str, float]:
    """Seconds between ticks (1, 2 or 5 times a power of ten), the unit shown, and units in a second."""
    if span_s <= 0:
        return 1.0, "s", 1.0
    rough_s = span_s / TICKS
    power = 10.0 ** math.floor(math.log10(rough_s))
    step_s = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough_s * (1 - 1e-9))
    unit, per_unit = ("s", 1.0) if span_s >= 1 else ("ms", 1e3) if span_s >= 1e-3 else ("µs", 1e6)
    return step_s, unit, per_unit
