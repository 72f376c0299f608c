"""`echelon trace`: the timeline of a pipeline, from the ranks' logs or simulated, with its bubble.

Runs in the user's terminal, without a cluster. Reads and writes the files; what is in them is parallel/trace.py's and
the modules' beside this one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from echelon.cli import output
from echelon.cli.trace.chrome import to_chrome
from echelon.cli.trace.drawing import to_png, to_svg
from echelon.cli.trace.figures import Figures, figures, summary
from echelon.cli.trace.picture import COLOURS, Panel, draw
from echelon.cli.trace.simulated import FIELDS, KINDS, Simulation, parse
from echelon.errors import ConfigError
from parallel.timeline import OpRecord, Timeline, ideal_bubble, in_order
from parallel.trace import merged, parse_records, record_line

SUFFIXES = (".json", ".jsonl", ".png", ".svg")
MAX_DRAWN = 5_000  # operations: more are a grey mass

Logs = Annotated[list[Path] | None, typer.Argument(metavar="[LOG]...", help="Ranks' logs of operations, JSON lines.")]
Simulate = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=VALUE,...",
        help=f"Simulate a schedule ({', '.join(KINDS)}) instead, or beside the log. "
        f"Keys: {', '.join(FIELDS)}; several values of costs and slots are divided by slashes.",
    ),
]
Outputs = Annotated[
    list[Path] | None,
    typer.Option(
        "--output", "-o", help="Write a picture (.svg, .png), a trace for Perfetto (.json), or records (.jsonl)."
    ),
]


def trace(
    logs: Logs = None,
    simulate: Simulate = None,
    outputs: Outputs = None,
    epoch: Annotated[int | None, typer.Option(help="The epoch of the log; its latest if not given.")] = None,
    window: Annotated[str, typer.Option(metavar="FROM:TO", help="Seconds of the log since its first operation.")] = "",
    as_json: output.AsJson = False,
) -> None:
    """Show when each pipeline stage did what, and how much of the time it did nothing: the bubble.

    Example: echelon trace --simulate stages=4,microbatches=8 -o timeline.svg
    """
    for path in outputs or []:
        if path.suffix not in SUFFIXES:
            raise ConfigError(f"{path}: expected one of {', '.join(SUFFIXES)}", field="output")
    panels = [_executed(logs, epoch, window)] if logs else []
    panels += [_planned(parse(text)) for text in simulate or []]
    if not panels:
        raise ConfigError("give a log, or --simulate stages=4,microbatches=8", field="simulate")
    if as_json:
        output.json_line([panel.figures for panel in panels])
    else:
        for panel in panels:
            _print(panel.figures)
    for path in outputs or []:
        _write(path, panels)


def _executed(logs: Iterable[Path], epoch: int | None, window: str) -> Panel:
    """What the logs of an epoch's ranks say was done."""
    records = [record for path in logs for record in parse_records(_lines(path), str(path))]
    if not records:
        raise ConfigError(f"no operations in {', '.join(map(str, logs))}")
    epochs = sorted({record.epoch for record in records})
    chosen = epochs[-1] if epoch is None else epoch
    if chosen not in epochs:
        raise ConfigError(f"epoch {chosen} is not in the log; it has {', '.join(map(str, epochs))}", field="epoch")
    stages = 1 + max(record.stage for record in records)
    whole = in_order(merged(record for record in records if record.epoch == chosen), stages)
    timeline = _within(whole, *_window(window))
    return Panel(figures(f"executed, epoch {chosen}", timeline), timeline)


def _planned(simulation: Simulation) -> Panel:
    """What a simulation says will be done."""
    timeline, inference = simulation.run(), not simulation.trains
    title = f"{simulation.name}: {simulation.stages} stages, {simulation.microbatches} micro-batches"
    cohorts = simulation.cohorts if inference else 0
    if inference:
        title += f", {cohorts} cohort" + "s" * (cohorts > 1)
    if len(simulation.slots) > 1:
        title += f", slots {'/'.join(f'{slot:g}' for slot in simulation.slots)}"
    ideal = ideal_bubble(simulation.stages, simulation.microbatches, simulation.chunks) if simulation.equal else None
    found = figures(title, timeline, ideal=ideal, cohorts=cohorts, inference=inference)
    return Panel(found, timeline, cohorts or COLOURS, returns=inference)


def _print(found: Figures) -> None:
    typer.echo(f"{found.title}: {summary(found)}")
    rows = [(s.stage, s.forwards, s.backs, f"{s.busy_s:.6g}", f"{s.idle:.1%}") for s in found.stages]
    output.table("", ("stage", "F", "B", "busy s", "idle"), rows)


def _write(path: Path, panels: list[Panel]) -> None:
    """The form is what the file's name ends in."""
    records = [record for panel in panels for record in panel.timeline.records]
    if path.suffix in (".svg", ".png") and len(records) > MAX_DRAWN:
        raise ConfigError(
            f"{len(records)} operations are too many to draw, at most {MAX_DRAWN}: narrow --window, or write a .json",
            field="window",
        )
    match path.suffix:
        case ".png":
            content = to_png(draw(panels))
        case ".svg":
            content = to_svg(draw(panels)).encode()
        case ".json":
            content = to_chrome([(panel.figures.title, panel.timeline) for panel in panels]).encode()
        case _:
            content = "".join(f"{record_line(record)}\n" for record in records).encode()
    try:
        path.write_bytes(content)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}", field="output") from error


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"{path} cannot be read: {reason}") from error


def _window(text: str) -> tuple[float, float]:
    """Seconds from and to; everything if empty."""
    if not text:
        return 0.0, math.inf
    first, _, last = text.partition(":")
    try:
        from_s, to_s = float(first or 0), float(last or "inf")
    except ValueError:
        from_s = to_s = math.nan
    if not from_s < to_s:
        raise ConfigError(f"window must be FROM:TO in seconds, FROM < TO; got {text!r}", field="window")
    return from_s, to_s


def _within(timeline: Timeline, from_s: float, to_s: float) -> Timeline:
    """The operations that began in the window."""
    zero_s = timeline.start_s
    kept: list[OpRecord] = [record for record in timeline.records if from_s <= record.start_s - zero_s < to_s]
    if not kept:
        raise ConfigError(f"no operation began in the window; the log lasts {timeline.span_s:g} s", field="window")
    return in_order(kept, timeline.stages)
