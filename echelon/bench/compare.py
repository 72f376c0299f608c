"""Rows of `echelon bench` beside a peer's figures: which row is which, ratios, and a table in Markdown.

In the user's terminal. Rows in, text out. A peer's row is met by ours of the same model, case and layout; where we have
none of that layout, by our best on as many devices, in a layout that no row of the peer has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echelon.bench.lines import read_lines
from echelon.errors import ConfigError

DEGREES = ("replicas", "pipeline", "data", "tensor", "expert")
COLUMNS = ("model", "layout", "case", "{peer} s", "tok/s", "Echelon s", "tok/s", "of {peer}", "floor s", "of floor")

Layout = tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Row:
    """One case of one model in one layout. floor_s: at perfect overlap and at none, None if it is not known."""

    model: str
    layout: Layout
    case: str
    seconds: float
    tokens_per_s: float
    floor_s: tuple[float, float] | None = None
    source: str = ""

    @property
    def devices(self) -> int:
        """Experts are on ranks that are counted already."""
        return math.prod(degree for name, degree in self.layout if name != "expert")

    @property
    def layout_name(self) -> str:
        """As flags would have it, without the dashes."""
        return " ".join(f"{name} {degree}" for name, degree in self.layout) or "1 device"


@dataclass(frozen=True, slots=True)
class Pair:
    """A peer's row, and ours if there is one."""

    peer: Row
    own: Row | None


def read_rows(path: Path, flag: str) -> list[Row]:
    """The cases of a file of JSON lines; other lines are passed over. Raises ConfigError naming file and line."""
    rows = []
    for values in read_lines(path, flag):
        if "case" not in values or "seconds" not in values:
            continue
        try:
            rows.append(_row(values))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            problem = f"{flag} {path}: the row of case {values['case']} is not whole: {error!r}"
            raise ConfigError(problem, field=flag.lstrip("-").lower()) from None
    if not rows:
        raise ConfigError(f"{flag} {path} has no line with a case and its seconds", field=flag.lstrip("-").lower())
    return rows


def _row(values: Mapping[str, Any]) -> Row:
    bounds = values.get("floor_seconds")
    layout = tuple((name, int(values["layout"][name])) for name in DEGREES if values["layout"].get(name, 1) != 1)
    return Row(
        model=str(values["model"]),
        layout=layout,
        case=str(values["case"]),
        seconds=float(values["seconds"]),
        tokens_per_s=float(values["output_tokens_per_s"]),
        floor_s=None if bounds is None else (float(bounds[0]), float(bounds[1])),
        source=str(values.get("peer") or values.get("through") or ""),
    )


def pairs(own: Sequence[Row], peers: Sequence[Row]) -> list[Pair]:
    """In the peer's order. Of several of ours for a row, the quickest."""
    return [Pair(peer, _match(own, peer, peers)) for peer in peers]


def _match(own: Sequence[Row], peer: Row, peers: Sequence[Row]) -> Row | None:
    alike = [row for row in own if (row.model, row.case) == (peer.model, peer.case)]
    exact = [row for row in alike if row.layout == peer.layout]
    taken = {(row.model, row.layout) for row in peers}
    others = [row for row in alike if row.devices == peer.devices and (row.model, row.layout) not in taken]
    return min(exact or others, key=lambda row: row.seconds, default=None)


def table(found: Sequence[Pair], peer: str) -> str:
    """Markdown. Ratios above 1 are ours; of the floor: which part of our time no engine can do without."""
    lines = [[column.format(peer=peer) for column in COLUMNS], ["---"] * len(COLUMNS)]
    lines += [_cells(pair) for pair in found]
    met = [pair for pair in found if pair.own is not None]
    ahead = sum(pair.own is not None and pair.own.seconds < pair.peer.seconds for pair in met)
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{text}\n\n{len(met)} of {len(found)} rows measured; ahead of {peer} on {ahead}."


def _cells(pair: Pair) -> list[str]:
    peer, own = pair.peer, pair.own
    left = [peer.model, peer.layout_name, peer.case, f"{peer.seconds:.3f}", f"{peer.tokens_per_s:,.0f}"]
    floor_s = peer.floor_s if own is None or own.floor_s is None else own.floor_s
    if own is None:
        return [*left, "-", "-", "-", _bounds(floor_s, "{:.2f}"), "-"]
    if own.layout != peer.layout:
        left[1] += f" (ours: {own.layout_name})"
    of_floor = None if floor_s is None else (floor_s[0] / own.seconds, floor_s[1] / own.seconds)
    ratio = f"{peer.seconds / own.seconds:.2f}"
    figures = [f"{own.seconds:.3f}", f"{own.tokens_per_s:,.0f}", ratio]
    return [*left, *figures, _bounds(floor_s, "{:.2f}"), _bounds(of_floor, "{:.0%}")]


def _bounds(bounds: tuple[float, float] | None, form: str) -> str:
    """One figure where both are the same as shown."""
    if bounds is None:
        return "-"
    least, most = (form.format(bound) for bound in bounds)
    return least if least == most else f"{least}–{most}"
