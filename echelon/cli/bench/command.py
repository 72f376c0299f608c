"""`echelon bench`: how fast a model is served, beside the floor and beside others' figures.

Runs in the user's terminal; the commands that measure need the server's packages. One JSON line a case on stdout. What
is asked is echelon/bench's, what the floor is coordinator/plan's; here are options and the order of things.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from echelon.bench.cases import Case
from echelon.bench.compare import pairs, read_rows, table
from echelon.bench.offline import case_row
from echelon.cli import output
from echelon.cli.bench.engine import EngineRanks, engine_ranks
from echelon.cli.bench.grpc import Target, cluster
from echelon.cli.bench.setting import (
    ALL_REDUCE_US,
    DEFAULTS,
    Given,
    Machine,
    Setting,
    floor_row,
    measure_machine,
    settle,
)
from echelon.cli.flags import with_flags
from echelon.cli.plan.units import byte_count, flop_rate
from echelon.errors import ConfigError

app = typer.Typer(name="bench", help="Measure how fast a model is served.", no_args_is_help=True)

Cases = Annotated[
    list[str], typer.Option("--case", metavar="NxIxO", help="N requests at once, I prompt ids, O output ids each.")
]
Repeats = Annotated[int, typer.Option(min=1, help="Runs of each case behind one to warm up; the best counts.")]
Address = Annotated[str | None, typer.Option(metavar="HOST:PORT", help="A cluster that runs, instead of starting one.")]
Bandwidth = Annotated[str, typer.Option(metavar="BYTES", help="Of a device's memory a second; default: measured.")]
Flops = Annotated[str, typer.Option(metavar="FLOPS", help="Of a device a second, as in 802T; default: measured.")]
AllReduce = Annotated[float, typer.Option("--all-reduce-us", min=0, help="Of a small all-reduce, for floors.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Append the JSON lines to this file, too.")]


def offline(
    case: Cases,
    flags: dict[str, str | None],
    grpc: Annotated[bool, typer.Option("--grpc", help="Through the whole system, not the engine alone.")] = False,
    target: Address = None,
    repeats: Repeats = 2,
    bandwidth: Bandwidth = "",
    flops: Flops = "",
    all_reduce_us: AllReduce = ALL_REDUCE_US,
    results: Output = None,
) -> None:
    """Time cases of equal requests at once: random prompts, greedy, end ids ignored, from submit to the last id.

    Example: echelon bench offline --model DIR --load-format random --tensor 2 --case 64x512x128 --grpc
    """
    cases = [Case.parse(text) for text in case]
    setting = settle(flags, cases)
    machine = _machine(setting, target, bandwidth, flops, all_reduce_us)
    about = setting.about(machine)
    vocabulary, through = setting.model.vocab_size, "grpc" if grpc or target is not None else "engine"
    with cluster(setting, target) if through == "grpc" else engine_ranks(setting) as serving:
        for each in cases:
            warm_up, *seeds = range(repeats + 1)
            serving.run(each, vocabulary, [warm_up])
            runs, cached_tokens = serving.run(each, vocabulary, seeds)
            row = case_row(each, runs) | {"cached_tokens": cached_tokens}
            if machine is not None:
                counted = _counted_experts(setting, serving, each, repeats + 1)
                found = setting.floor(each, machine.rates, counted)
                row |= floor_row(found, machine.rates, each, min(run.total_s for run in runs), counted is not None)
            _tell({"through": through, **row, "start_s": serving.start_s, **about}, results)


def _counted_experts(setting: Setting, serving: Target | EngineRanks, case: Case, seed: int) -> float | None:
    """By the engine, in one more run; a cluster cannot tell the choices of one step from those of another."""
    if isinstance(serving, Target) or setting.census.routing is None:
        return None
    return serving.distinct_experts(case, setting.model.vocab_size, seed)


def _machine(setting: Setting, target: str | None, bandwidth: str, flops: str, all_reduce_us: float) -> Machine | None:
    """None where the devices are not ours to measure and no rates were given."""
    given = Given(
        read_bytes_s=byte_count(bandwidth, "--bandwidth") if bandwidth else None,
        flops=flop_rate(flops, "--flops") if flops else None,
        all_reduce_us=all_reduce_us,
    )
    if target is None:
        return measure_machine(setting, given)
    if given.read_bytes_s is None or given.flops is None:
        return None
    return Machine(given.rates(), "", 0)


def _tell(row: dict[str, object], results: Path | None) -> None:
    output.json_line(row)
    if results is not None:
        try:
            with results.open("a", encoding="utf-8") as file:
                output.json_line(row, file)
        except OSError as error:
            raise ConfigError(f"--output {results} cannot be written: {error.strerror}", field="output") from None


def compare(
    results: Annotated[Path, typer.Argument(help="JSON lines of `echelon bench`.")],
    peers: Annotated[Path, typer.Option(help="JSON lines of a peer's figures, as benchmarks/peers has them.")],
) -> None:
    """Print a table in Markdown of what was measured beside a peer's figures and the floor; of the peer: above 1 is
    faster.

    Example: echelon bench compare results.jsonl --peers benchmarks/peers/vllm-0.24.0-2xh200.jsonl
    """
    own, others = read_rows(results, "RESULTS"), read_rows(peers, "--peers")
    typer.echo(table(pairs(own, others), others[0].source or peers.stem))


app.command("compare")(compare)
_SERVE: dict[str, Any] = {"without": ("address",), "defaults": DEFAULTS}
app.command("offline")(with_flags(offline, **_SERVE))
