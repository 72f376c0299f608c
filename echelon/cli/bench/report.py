"""`echelon bench compare` and `echelon bench plot`: what is made of rows that were measured before.

In the user's terminal; measures nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from echelon.bench.compare import pairs, read_rows, table
from echelon.bench.lines import read_lines
from echelon.cli.bench.picture import draw
from echelon.cli.trace.drawing import to_png, to_svg
from echelon.errors import ConfigError

SUFFIXES = (".png", ".svg")
Results = Annotated[Path, typer.Argument(help="JSON lines of `echelon bench`.")]


def compare(
    results: Results,
    peers: Annotated[Path, typer.Option(help="JSON lines of a peer's figures, as benchmarks/peers has them.")],
) -> None:
    """Print a table in Markdown of what was measured beside a peer's figures and the floor; above 1 is faster.

    Example: echelon bench compare results.jsonl --peers benchmarks/peers/vllm-0.24.0-2xh200.jsonl
    """
    own, others = read_rows(results, "RESULTS"), read_rows(peers, "--peers")
    typer.echo(table(pairs(own, others), others[0].source or peers.stem))


def plot(
    results: Results,
    picture: Annotated[Path, typer.Option("--output", "-o", help="The picture (.png, .svg).")],
) -> None:
    """Draw the roofline of offline cases, and latency against throughput of online loads, whichever rows there are.

    Example: echelon bench plot results.jsonl -o results.png
    """
    if picture.suffix not in SUFFIXES:
        raise ConfigError(f"--output {picture}: expected one of {', '.join(SUFFIXES)}", field="output")
    rows = read_lines(results, "RESULTS")
    try:
        made = draw(rows)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"RESULTS {results}: a row is not whole: {error!r}", field="results") from None
    content = to_png(made) if picture.suffix == ".png" else to_svg(made).encode()
    try:
        picture.write_bytes(content)
    except OSError as error:
        raise ConfigError(f"--output {picture} cannot be written: {error.strerror}", field="output") from None
