"""A picture as boxes, lines and labels, and its two forms: SVG text of our own, PNG through Pillow.

In the user's terminal. Lengths are in pixels from the upper left corner, colours "#rrggbb". SVG needs nothing and is
the same byte for byte everywhere; PNG needs `echelon[viz]`. It knows nothing of what is drawn.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, Literal
from xml.sax.saxutils import escape

from echelon.errors import ConfigError

FONTS = "Aileron, Inter, 'Helvetica Neue', Helvetica, Arial, sans-serif"
PNG_SCALE = 2  # pixels of a PNG for one of the picture's, for sharp text

Anchor = Literal["start", "middle", "end"]


@dataclass(frozen=True, slots=True)
class Box:
    """A filled rectangle."""

    x: float
    y: float
    width: float
    height: float
    fill: str
    radius: float = 0.0


@dataclass(frozen=True, slots=True)
class Line:
    """From one point to another."""

    x1: float
    y1: float
    x2: float
    y2: float
    stroke: str
    width: float = 1.0


@dataclass(frozen=True, slots=True)
class Label:
    """Text on one line; y is its middle."""

    x: float
    y: float
    text: str
    size: float
    fill: str
    anchor: Anchor = "start"


Shape = Box | Line | Label


@dataclass(frozen=True, slots=True)
class Picture:
    """Shapes, later ones over earlier ones, on a background."""

    width: int
    height: int
    shapes: tuple[Shape, ...]
    background: str = "#ffffff"


def to_svg(picture: Picture) -> str:
    """The picture as an SVG document."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{picture.width}" height="{picture.height}" '
        f'viewBox="0 0 {picture.width} {picture.height}" font-family="{FONTS}">'
    )
    ground = f'<rect width="{picture.width}" height="{picture.height}" fill="{picture.background}"/>'
    return "\n".join([head, ground, *map(_element, picture.shapes), "</svg>", ""])


def to_png(picture: Picture) -> bytes:
    """The picture as a PNG file. Raises ConfigError without Pillow."""
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ModuleNotFoundError as error:
        raise ConfigError(f"a PNG needs {error.name}: pip install 'echelon[viz]', or write an .svg") from error
    scale = PNG_SCALE
    image = Image.new("RGB", (picture.width * scale, picture.height * scale), picture.background)
    draw = ImageDraw.Draw(image)
    fonts: dict[float, Any] = {}
    for shape in picture.shapes:
        match shape:
            case Box(x, y, width, height, fill, radius):
                edges = (x * scale, y * scale, (x + width) * scale - 1, (y + height) * scale - 1)
                draw.rounded_rectangle(edges, radius * scale, fill)
            case Line(x1, y1, x2, y2, stroke, width):
                ends = (x1 * scale, y1 * scale, x2 * scale, y2 * scale)
                draw.line(ends, stroke, max(1, round(width * scale)))
            case Label(x, y, text, size, fill, anchor):
                font = fonts.setdefault(size, ImageFont.load_default(size * scale))
                place = {"start": "lm", "middle": "mm", "end": "rm"}[anchor]
                draw.text((x * scale, y * scale), text, fill, font, place)
    file = io.BytesIO()
    image.quantize(128).save(file, "PNG", optimize=True)
    return file.getvalue()


def _element(shape: Shape) -> str:
    match shape:
        case Box():
            corner = f' rx="{_number(shape.radius)}"' if shape.radius else ""
            place = _attributes(x=shape.x, y=shape.y, width=shape.width, height=shape.height)
            return f'<rect {place}{corner} fill="{shape.fill}"/>'
        case Line():
            place = _attributes(x1=shape.x1, y1=shape.y1, x2=shape.x2, y2=shape.y2)
            return f'<line {place} stroke="{shape.stroke}" stroke-width="{_number(shape.width)}"/>'
        case Label():
            place = _attributes(x=shape.x, y=shape.y, font_size=shape.size)
            style = f'fill="{shape.fill}" text-anchor="{shape.anchor}" dominant-baseline="central"'
            return f"<text {place} {style}>{escape(shape.text)}</text>"


def _attributes(**lengths: float) -> str:
    return " ".join(f'{name.replace("_", "-")}="{_number(value)}"' for name, value in lengths.items())


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
