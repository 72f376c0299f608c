"""Which experts take which kind of text: shares of their choices, how far kinds differ, and the heat map of it.

Pure: counts in, numbers or a picture out. A cell is white where an expert of a layer takes its even share of a kind's
tokens, red where it takes more, blue where it takes less, in the colours of `echelon experts`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from echelon.cli.experts.heat import DEEPEST, FAINT, INK, heats, hexadecimal
from echelon.cli.trace.drawing import Box, Label, Picture, Shape

Choices = Mapping[str, Mapping[int, Sequence[int]]]  # kind -> layer -> by expert
CELL, ROW, GAP, LEFT, TOP, MARGIN = 24, 26, 18, 170, 74, 28


@dataclass(frozen=True, slots=True)
class Specialist:
    """An expert, and what it takes of a kind's tokens, as times of an even share."""

    layer: int
    expert: int
    kind: str
    heat: float


def specialists(choices: Choices) -> list[Specialist]:
    """Of each kind the expert that takes most of it."""
    return [
        max(
            (
                Specialist(layer, expert, kind, heat)
                for layer, rows in layers.items()
                for expert, heat in enumerate(heats(rows))
            ),
            key=lambda found: found.heat,
        )
        for kind, layers in choices.items()
    ]


def differing(choices: Choices, one: str, other: str) -> float:
    """The share of choices that would have to fall on another expert for one kind to be spread as the other; mean of
    all layers, 0 to 1."""
    return sum(
        sum(max(0.0, share - opposite) for share, opposite in zip(_shares(rows), _shares(others), strict=True))
        for rows, others in zip(choices[one].values(), choices[other].values(), strict=True)
    ) / len(choices[one])


def farthest(choices: Choices) -> tuple[str, str, float]:
    """The two kinds that differ most, and by how much."""
    pairs = itertools.combinations(choices, 2)
    return max(((one, other, differing(choices, one, other)) for one, other in pairs), key=lambda found: found[2])


def _shares(rows: Sequence[int]) -> list[float]:
    return [heat / len(rows) for heat in heats(rows)]


def draw_kinds(choices: Choices, title: str) -> Picture:
    """Kinds under each other, layers side by side, a cell for each expert."""
    layers = next(iter(choices.values()))
    places = list(_places(layers))
    width = int(places[-1][1] + len(layers[places[-1][0]]) * CELL + MARGIN)
    shapes: list[Shape] = [Label(MARGIN, 24, title, 14, INK)]
    for layer, left in places:
        shapes.append(Label(left, TOP - 28, f"layer {layer}", 11, FAINT))
        for expert in range(len(layers[layer])):
            shapes.append(Label(left + (expert + 0.5) * CELL, TOP - 10, str(expert), 10, FAINT, "middle"))
    for row, (kind, counts) in enumerate(choices.items()):
        top = TOP + row * ROW
        shapes.append(Label(LEFT - 10, top + ROW / 2, kind, 11, INK, "end"))
        for layer, left in places:
            for expert, heat in enumerate(heats(counts[layer])):
                shapes.append(Box(left + expert * CELL, top, CELL - 1, ROW - 1, hexadecimal(heat)))
    bottom = TOP + len(choices) * ROW
    return Picture(width, bottom + 50, (*shapes, *_scale(bottom + 26)))


def _places(layers: Mapping[int, Sequence[int]]) -> Iterator[tuple[int, float]]:
    left = float(LEFT)
    for layer, rows in layers.items():
        yield layer, left
        left += len(rows) * CELL + GAP


def _scale(middle: float) -> Iterator[Shape]:
    yield Label(LEFT - 10, middle, "0", 10, FAINT, "end")
    for step in range(31):
        yield Box(LEFT + step * 6, middle - 5, 6, 10, hexadecimal(DEEPEST * step / 30))
    told = f"{DEEPEST:g} times an even share of the kind's tokens, or more"
    yield Label(LEFT + 31 * 6 + 8, middle, told, 10, FAINT)
