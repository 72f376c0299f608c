"""Draws rows of `echelon bench`: cases under the roof of their device, and waiting against throughput.

In the user's terminal. Pure: rows in, shapes out. A roofline (Williams et al. 2009) has the FLOP of a case for each
byte that it must read to the right, and what each device has computed a second upward; both axes are logarithmic.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from echelon.cli.trace.drawing import Box, Label, Line, Picture, Shape
from echelon.errors import ConfigError

WIDTH, PANEL, LEFT, RIGHT, TOP, BELOW = 1200, 460, 96, 336, 64, 64
INK, FAINT, GRID, ROOF = "#1f2933", "#6b7785", "#d5dbe3", "#3e4c59"
COLOURS = ("#3b6fb6", "#d9822b", "#3f9b63", "#c44e52", "#7d5ba6", "#2a9d9f", "#a98f1f", "#c05c94")
WAITS = (("ttft_s", "first token"), ("itl_s", "between tokens"))
POINT = 9

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Point:
    """x and y above 0, in the colour of its series."""

    x: float
    y: float
    series: str
    text: str = ""


@dataclass(frozen=True, slots=True)
class Axis:
    """Powers of ten from low to high, over a stretch of pixels. unit: its numbers are divided by, and its name."""

    low: int
    high: int
    start: float
    end: float

    def at(self, value: float) -> float:
        """The pixel of a value."""
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def draw(rows: Rows) -> Picture:
    """A panel for each kind of rows that there are. Raises ConfigError where there is none."""
    panels = [panel for panel in (_roofline, _waiting) if _wanted(panel, rows)]
    if not panels:
        raise ConfigError("RESULTS has neither a case with its floor nor a rate; measure some first", field="results")
    shapes = [shape for index, panel in enumerate(panels) for shape in panel(rows, index * PANEL)]
    return Picture(WIDTH, PANEL * len(panels), tuple(shapes))


def _wanted(panel: object, rows: Rows) -> bool:
    return bool(_cases(rows) if panel is _roofline else _loads(rows))


def _cases(rows: Rows) -> list[Mapping[str, Any]]:
    return [row for row in rows if "floor_of" in row and "case" in row]


def _loads(rows: Rows) -> list[Mapping[str, Any]]:
    return [row for row in rows if "rate" in row and row.get("ttft_s")]


def _roofline(rows: Rows, top: float) -> Iterator[Shape]:
    cases = _cases(rows)
    points = [
        Point(
            row["floor_of"]["flop"] / row["floor_of"]["read_bytes"],
            row["floor_of"]["flop"] / row["seconds"] / row["floor_of"]["devices"],
            _name(row),
            row["case"],
        )
        for row in cases
    ]
    roofs = {(row["floor_of"]["read_bytes_s"], row["floor_of"]["flops"]) for row in cases}
    across = _axis([point.x for point in points] + [flops / read for read, flops in roofs], LEFT, WIDTH - RIGHT)
    heights = [point.y for point in points] + [flops for _, flops in roofs]
    upward = _axis(heights, top + PANEL - BELOW, top + TOP)
    yield Label(LEFT, top + 26, "Roofline: what each device has computed a second, by FLOP for each byte read", 16, INK)
    yield from _grid(across, upward, "FLOP a byte", "FLOP/s")
    for read_bytes_s, flops in roofs:
        yield from _roof(across, upward, read_bytes_s, flops)
    yield from _points(points, across, upward, joined=False)


def _roof(across: Axis, upward: Axis, read_bytes_s: float, flops: float) -> Iterator[Shape]:
    """The bandwidth's slope as far as it is seen, then the FLOP rate."""
    ridge = flops / read_bytes_s
    first = max(10.0**across.low, 10.0**upward.low / read_bytes_s)
    if first < ridge:
        slope = across.at(first), upward.at(first * read_bytes_s)
        yield Line(*slope, across.at(ridge), upward.at(flops), ROOF, 2)
    yield Line(across.at(ridge), upward.at(flops), across.end, upward.at(flops), ROOF, 2)


def _waiting(rows: Rows, top: float) -> Iterator[Shape]:
    points = [
        Point(row["output_tokens_per_s"], row[wait][share] * 1e3, f"{_name(row)}, {what}, {share}")
        for row in sorted(_loads(rows), key=lambda row: float(row["output_tokens_per_s"]))
        for wait, what in WAITS
        for share in ("p50", "p99")
        if row.get(wait) and row[wait][share] > 0
    ]
    across = _axis([point.x for point in points], LEFT, WIDTH - RIGHT)
    upward = _axis([point.y for point in points], top + PANEL - BELOW, top + TOP)
    yield Label(LEFT, top + 26, "Waiting against throughput", 16, INK)
    yield from _grid(across, upward, "output tokens/s", "ms")
    yield from _points(points, across, upward, joined=True)


def _points(points: Sequence[Point], across: Axis, upward: Axis, joined: bool) -> Iterator[Shape]:
    """With a legend at the right."""
    for index, series in enumerate(dict.fromkeys(point.series for point in points)):
        colour = COLOURS[index % len(COLOURS)]
        own = [point for point in points if point.series == series]
        places = [(across.at(point.x), upward.at(point.y)) for point in own]
        if joined:
            yield from (Line(*start, *end, colour, 1.5) for start, end in itertools.pairwise(places))
        for point, (x, y) in zip(own, places, strict=True):
            yield Box(x - POINT / 2, y - POINT / 2, POINT, POINT, colour, POINT / 2)
            if point.text:
                yield Label(x + POINT, y, point.text, 11, FAINT)
        y = upward.end + 12 + 22 * index
        yield Box(across.end + 28, y - POINT / 2, POINT, POINT, colour, POINT / 2)
        yield Label(across.end + 46, y, series, 12, INK)


def _grid(across: Axis, upward: Axis, below: str, beside: str) -> Iterator[Shape]:
    for power in range(across.low, across.high + 1):
        x = across.at(10.0**power)
        yield Line(x, upward.start, x, upward.end, GRID)
        yield Label(x, upward.start + 16, _power(power), 11, FAINT, "middle")
    for power in range(upward.low, upward.high + 1):
        y = upward.at(10.0**power)
        yield Line(across.start, y, across.end, y, GRID)
        yield Label(across.start - 10, y, _power(power), 11, FAINT, "end")
    yield Label((across.start + across.end) / 2, upward.start + 38, below, 12, INK, "middle")
    yield Label(across.start - 10, upward.end - 16, beside, 12, INK, "end")


def _axis(values: Sequence[float], start: float, end: float) -> Axis:
    """Whole powers of ten around them."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return Axis(low, max(high, low + 1), start, end)


def _power(power: int) -> str:
    """1, 10, 100, then 1k, ...; below 1 as they are."""
    units = ("", "k", "M", "G", "T", "P", "E")
    if power < 0 or power // 3 >= len(units):
        return f"1e{power}"
    return f"{10 ** (power % 3)}{units[power // 3]}"


def _name(row: Mapping[str, Any]) -> str:
    """Model and layout."""
    layout = " ".join(f"{name} {degree}" for name, degree in row["layout"].items())
    return f"{row['model']}{', ' if layout else ''}{layout}, {row['through']}"
