"""The loss curve as a picture: both losses over the steps, and the held-out loss at the end.

Drawn with the boxes and lines that `echelon trace` draws with; a PNG needs Pillow. It knows no model.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

from echelon.cli.trace.drawing import Box, Label, Line, Picture, Shape

WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 60, 740, 50, 370
MOST_POINTS = 340  # a curve has no more detail than its picture
INK, PALE, GRID = "#1a1a1a", "#666666", "#e4e4e4"
NEXT, SECOND, HELD_OUT = "#2166ac", "#d6a35c", "#b2182b"

Curve = Sequence[tuple[int, float, float]]


def draw_curve(curve: Curve, held_out: float) -> Picture:
    """curve: steps and the losses of the next token and of the one behind it, in nats. held_out: of the next token."""
    points = thinned(curve)
    values = [value for _, following, second in points for value in (following, second)] + [held_out]
    low, high = math.floor(min(values)), math.ceil(max(values) + 1e-9)
    last = max(1, curve[-1][0])

    def place(step: float, value: float) -> tuple[float, float]:
        return LEFT + (RIGHT - LEFT) * step / last, BOTTOM - (BOTTOM - TOP) * (value - low) / (high - low)

    shapes: list[Shape] = [Label(LEFT, 22, "Loss of the tiny model, nats per token", 14, INK)]
    for tick in range(low, high + 1):
        y = place(0, tick)[1]
        shapes += [Line(LEFT, y, RIGHT, y, GRID), Label(LEFT - 10, y, str(tick), 11, PALE, "end")]
    for quarter in range(5):
        x = place(last * quarter / 4, low)[0]
        shapes.append(Label(x, BOTTOM + 18, f"{last * quarter // 4:,}", 11, PALE, "middle"))
    shapes.append(Label((LEFT + RIGHT) / 2, BOTTOM + 38, "steps", 11, PALE, "middle"))
    for column, colour in ((2, SECOND), (1, NEXT)):
        ends = [place(point[0], point[column]) for point in points]
        shapes += [Line(*start, *end, colour, 1.5) for start, end in itertools.pairwise(ends)]
    y = place(0, held_out)[1]
    shapes.append(Line(LEFT, y, RIGHT, y, HELD_OUT))
    return Picture(WIDTH, HEIGHT, (*shapes, *_legend(held_out)))


def thinned(curve: Curve) -> list[tuple[float, float, float]]:
    """Means of neighbours, at most MOST_POINTS of them."""
    size = -(-len(curve) // MOST_POINTS)
    groups = [curve[first : first + size] for first in range(0, len(curve), size)]
    return [(_mean(x[0] for x in group), _mean(x[1] for x in group), _mean(x[2] for x in group)) for group in groups]


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _legend(held_out: float) -> list[Shape]:
    entries = (("next token", NEXT), ("the one behind it", SECOND), (f"held-out, next token: {held_out:.3f}", HELD_OUT))
    shapes: list[Shape] = []
    for row, (text, colour) in enumerate(entries):
        y = TOP + 14 + 20 * row
        shapes += [Box(RIGHT - 220, y - 2, 18, 4, colour), Label(RIGHT - 194, y, text, 12, INK)]
    return shapes
