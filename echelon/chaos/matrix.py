"""The fault matrix: outcomes by fault and phase as a Markdown table, and a line on all of them together.

Pure. A cell of several injections is their median and, behind a slash, the worst.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

from echelon.chaos.moments import ORDER
from echelon.chaos.outcome import Outcome

COLUMNS = (
    "fault",
    "phase",
    "injections",
    "detected ms",
    "first stream's next token ms",
    "last stream's next token ms",
    "recomputed tokens",
    "lost",
    "doubled",
)


def table(found: Iterable[Outcome]) -> str:
    """One row for each fault and phase that was hit, in the order of a request's life and a recovery's."""
    rows: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in found:
        rows.setdefault((outcome.fault, outcome.phase), []).append(outcome)
    keys = sorted(rows, key=lambda key: (key[0], ORDER.index(key[1])))
    lines = [COLUMNS, ("---",) * 2 + ("---:",) * (len(COLUMNS) - 2), *(_row(key, rows[key]) for key in keys)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def document(title: str, facts: Mapping[str, str], found: Sequence[Outcome], differing: Sequence[str]) -> str:
    """The table with what it was measured on, and what differed if anything did."""
    told = "\n".join(f"- {name}: {fact}" for name, fact in facts.items())
    wrong = "\n".join(f"- {line}" for line in differing)
    parts = [f"# {title}", told, table(found), summary(found), wrong and f"## What differed\n{wrong}"]
    return "\n\n".join(part for part in parts if part) + "\n"


def summary(found: Sequence[Outcome]) -> str:
    """All injections in a line."""
    aimed = sum(outcome.phase != outcome.aimed for outcome in found)
    waits = [outcome.last_s for outcome in found if outcome.last_s is not None]
    slowest = f"; the last stream's next token came after {_slowest(waits)}" if waits else ""
    missed = f", {aimed} of which hit another phase than they were aimed at" if aimed else ""
    lost, doubled = sum(outcome.lost for outcome in found), sum(outcome.doubled for outcome in found)
    return f"{len(found)} injections{missed}: {lost} tokens lost, {doubled} doubled{slowest}."


def _slowest(waits: Sequence[float]) -> str:
    """Of fewer than a hundred the 99th percentile is but the last."""
    if len(waits) < 100:
        return f"{_ms(max(waits))} ms at worst"
    return f"{_ms(percentile(waits, 0.99))} ms at p99, {_ms(max(waits))} ms at worst"


def percentile(values: Sequence[float], share: float) -> float:
    """The least of the values that so large a share of them does not exceed."""
    return sorted(values)[max(math.ceil(share * len(values)), 1) - 1]


def _row(key: tuple[str, str], found: Sequence[Outcome]) -> tuple[str, ...]:
    times = ([getattr(outcome, name) for outcome in found] for name in ("detected_s", "first_s", "last_s"))
    recomputed = [float(outcome.recomputed_tokens) / 1000 for outcome in found]
    lost, doubled = sum(outcome.lost for outcome in found), sum(outcome.doubled for outcome in found)
    return (*key, str(len(found)), *map(_cell, times), _cell(recomputed), str(lost), str(doubled))


def _cell(values: Iterable[float | None]) -> str:
    seen = [value for value in values if value is not None]
    if not seen:
        return "-"
    middle, worst = _ms(statistics.median(seen)), _ms(max(seen))
    return middle if middle == worst else f"{middle} / {worst}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f}"
