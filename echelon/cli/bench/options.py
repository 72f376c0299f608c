"""What the commands of `echelon bench` share: options, the machine's rates, and where rows go.

In the user's terminal.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from echelon.cli import output
from echelon.cli.bench.setting import Given, Machine, Setting, measure_machine
from echelon.cli.plan.units import byte_count, flop_rate
from echelon.errors import ConfigError

Flags = Mapping[str, str | None]
Cases = Annotated[
    list[str], typer.Option("--case", metavar="NxIxO", help="N requests at once, I prompt ids, O output ids each.")
]
Repeats = Annotated[int, typer.Option(min=1, help="Runs of each case behind one to warm up; the best counts.")]
Target = Annotated[str | None, typer.Option(metavar="HOST:PORT", help="A cluster that runs, instead of starting one.")]
Bandwidth = Annotated[str, typer.Option(metavar="BYTES", help="Of a device's memory a second; default: measured.")]
Flops = Annotated[str, typer.Option(metavar="FLOPS", help="Of a device a second, as in 802T; default: measured.")]
AllReduce = Annotated[float, typer.Option("--all-reduce-us", min=0, help="Of a small all-reduce, for floors.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Append the JSON lines to this file, too.")]


def rates_of(bandwidth: str, flops: str, all_reduce_us: float) -> Given:
    """Raises ConfigError for numbers without a unit."""
    return Given(
        read_bytes_s=byte_count(bandwidth, "--bandwidth") if bandwidth else None,
        flops=flop_rate(flops, "--flops") if flops else None,
        all_reduce_us=all_reduce_us,
    )


def machine_of(setting: Setting, given: Given, target: str | None) -> Machine | None:
    """None where the devices are not ours to measure and no rates were given."""
    if target is None:
        return measure_machine(setting, given)
    return Machine(given.rates(), "", 0) if given.read_bytes_s and given.flops else None


def tell(row: Mapping[str, object], results: Path | None) -> None:
    """A JSON line on stdout, and in a file if one was named."""
    output.json_line(row)
    if results is None:
        return
    try:
        with results.open("a", encoding="utf-8") as file:
            output.json_line(row, file)
    except OSError as error:
        raise ConfigError(f"--output {results} cannot be written: {error.strerror}", field="output") from None
