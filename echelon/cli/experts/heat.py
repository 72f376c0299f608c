"""Heat maps of experts: a row for each layer, a cell for each expert, the warmer the more rows have chosen it.

In the user's terminal. Pure: loads in, a table, text or shapes out. White is an expert of the mean, blue one that is
chosen less, red one that is chosen more, as deep as it gets at three times the mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from rich.color import Color
from rich.style import Style
from rich.table import Table
from rich.text import Text

from echelon.cli import output
from echelon.cli.trace.drawing import Box, Label, Picture, Shape
from echelon.types import ExpertLoad

DEEPEST = 3.0  # times the mean
COLD, MEAN, HOT = (33, 102, 172), (247, 247, 247), (178, 24, 43)
STRIP = 96  # cells of a line in a terminal
WIDTH, LEFT, RIGHT, TITLE, ROW, MARGIN = 1200, 92, 108, 56, 14, 28
INK, FAINT = "#1f2933", "#6b7785"


def since(earlier: Sequence[ExpertLoad], later: Sequence[ExpertLoad]) -> list[ExpertLoad]:
    """What was chosen between two looks; all of it where the first has nothing of the same epoch."""
    before = {(load.replica, load.epoch, load.layer): load.rows for load in earlier}
    return [
        replace(load, rows=_grown(before.get((load.replica, load.epoch, load.layer), ()), load.rows)) for load in later
    ]


def _grown(then: Sequence[int], now: tuple[int, ...]) -> tuple[int, ...]:
    """All of now where it counts anew: other experts of another cluster, or fewer rows, as a coordinator that has just
    begun has not heard every rank. Ranks on a CPU read while they count, so that single experts may fall back."""
    if len(then) != len(now) or sum(now) < sum(then):
        return now
    return tuple(max(0, after - before) for before, after in zip(then, now, strict=True))


def load_table(loads: Sequence[ExpertLoad]) -> Table:
    """A line for each layer: rows that were routed to experts, and how unevenly, over experts and over ranks."""
    columns = ("layer", "experts", "rows", "mean", "max", "max/mean", "busiest", "idle", "ranks max/mean")
    return output.grid("", columns, [_line(load) for load in loads])


def _line(load: ExpertLoad) -> tuple[object, ...]:
    rows = load.rows
    return (
        f"{load.replica}/{load.layer}",
        len(rows),
        f"{sum(rows):,}",
        f"{sum(rows) / len(rows):,.1f}",
        f"{max(rows):,}",
        f"{load.max_over_mean:.2f}",
        rows.index(max(rows)),
        rows.count(0),
        f"{load.rank_max_over_mean:.2f}" if load.slots else "-",
    )


def strips(loads: Sequence[ExpertLoad]) -> Text:
    """The heat map in coloured cells, neighbours together in one where there are more than a line holds."""
    text = Text()
    for load in loads:
        text.append(f"\n{load.replica}/{load.layer:<4}")
        for heat in pooled(heats(load.rows), STRIP):
            text.append(letter(heat), Style(color="black", bgcolor=Color.from_rgb(*colour(heat))))
    return text


def letter(heat: float) -> str:
    """So that it can be read without colours too: how often the mean, none a point."""
    return "." if heat == 0 else " " if heat < 2 else str(min(9, int(heat)))


def heats(rows: Sequence[int]) -> list[float]:
    """Each expert's rows over the mean; 1 for all where none was chosen."""
    mean = sum(rows) / len(rows)
    return [count / mean if mean else 1.0 for count in rows]


def pooled(values: Sequence[float], most: int) -> list[float]:
    """At most so many: the greatest of neighbours."""
    size = math.ceil(len(values) / most)
    return [max(values[first : first + size]) for first in range(0, len(values), size)]


def colour(heat: float) -> tuple[int, int, int]:
    """Red, green and blue of 0 to 255."""
    end, depth = (HOT, (heat - 1) / (DEEPEST - 1)) if heat > 1 else (COLD, 1 - heat)
    depth = min(depth, 1.0)
    red, green, blue = (round(mean + (far - mean) * depth) for mean, far in zip(MEAN, end, strict=True))
    return red, green, blue


def draw(loads: Sequence[ExpertLoad]) -> Picture:
    """All layers under each other."""
    shapes: list[Shape] = []
    total, busiest = sum(sum(load.rows) for load in loads), max(load.max_over_mean for load in loads)
    head = f"{len(loads)} layers, {total:,} choices; the busiest expert of a layer has {busiest:.2f} times the mean"
    shapes.append(Label(MARGIN, MARGIN, head, 14, INK))
    for index, load in enumerate(loads):
        shapes += _row(load, MARGIN + TITLE / 2 + index * ROW)
    height = math.ceil(MARGIN + TITLE / 2 + len(loads) * ROW + TITLE)
    shapes += _scale(height - MARGIN)
    return Picture(WIDTH, height, tuple(shapes))


def _row(load: ExpertLoad, top: float) -> Iterator[Shape]:
    middle, width = top + ROW / 2, (WIDTH - LEFT - RIGHT) / len(load.rows)
    yield Label(LEFT - 8, middle, f"{load.replica}/{load.layer}", 10, FAINT, "end")
    for expert, heat in enumerate(heats(load.rows)):
        yield Box(LEFT + expert * width, top, width, ROW - 1, hexadecimal(heat))
    yield Label(WIDTH - RIGHT + 8, middle, f"max {load.max_over_mean:.2f}", 10, FAINT)


def _scale(middle: float) -> Iterator[Shape]:
    yield Label(LEFT - 8, middle, "0", 10, FAINT, "end")
    for step in range(31):
        yield Box(LEFT + step * 6, middle - 5, 6, 10, hexadecimal(DEEPEST * step / 30))
    yield Label(LEFT + 31 * 6 + 8, middle, f"{DEEPEST:g} times the mean of the layer, or more", 10, FAINT)


def hexadecimal(heat: float) -> str:
    """As pictures name a colour."""
    return "#{:02x}{:02x}{:02x}".format(*colour(heat))
