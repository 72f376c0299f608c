"""`echelon chaos`: strikes a running cluster of this machine, and shows whether any stream was disturbed.

Runs in the user's terminal, on the machine and as the user of the cluster, whose processes it signals. What is struck
and judged is `echelon/chaos`'s; here are options, progress and the report.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from echelon.chaos.facts import facts_of
from echelon.chaos.matrix import document
from echelon.chaos.moments import ORDER
from echelon.chaos.outcome import Outcome, Trial, outcomes, wrong
from echelon.chaos.plan import FAULTS, Round, draw_plan, parse_plan
from echelon.chaos.runner import Runner, Settings
from echelon.chaos.victims import KNOWN
from echelon.cli import output
from echelon.errors import ConfigError, UnavailableError
from echelon.profiles import DEFAULT_ADDRESS

TITLE = "Fault matrix"
Address = Annotated[
    str | None,
    typer.Option(
        "--target",
        "--address",
        "-a",
        help=f"HOST:PORT, on this machine; else ECHELON_ADDRESS, the profile's, {DEFAULT_ADDRESS}.",
        show_default=False,
    ),
]


def chaos(
    plan: Annotated[
        Path | None, typer.Option(help="YAML: a list of {fault, victim, when}. Without it a plan is drawn.")
    ] = None,
    injections: Annotated[int, typer.Option(help="How many are drawn.", min=1)] = 10,
    seed: Annotated[int, typer.Option(help="The same seed draws the same plan.")] = 0,
    faults: Annotated[str, typer.Option(help=f"To draw from: {', '.join(FAULTS)}.")] = "kill,stop",
    victims: Annotated[str, typer.Option(help=f"To draw from: {KNOWN}.")] = "rank,leader,coordinator",
    moments: Annotated[str, typer.Option(help=f"To draw from: {', '.join(ORDER)}.")] = ",".join(ORDER),
    streams: Annotated[int, typer.Option(help="Of every kind of sampling, at once.", min=1)] = 16,
    tokens: Annotated[int, typer.Option(help="Of each answer.", min=24)] = 320,
    tolerance: Annotated[float, typer.Option(help="How far log-probabilities may be off.", min=0.0)] = 1e-9,
    lease_s: Annotated[float, typer.Option("--lease-s", help="The cluster's: a partition lasts longer.")] = 30.0,
    settle_s: Annotated[float, typer.Option("--settle-s", help="Of serving between two rounds.")] = 12.0,
    report: Annotated[Path | None, typer.Option("--output", "-o", help="Write the matrix there as Markdown.")] = None,
    address: Address = None,
    as_json: output.AsJson = False,
) -> None:
    """Kill, stop or partition processes of a running cluster under mixed streams; exit 1 if one stream differed.

    Each stream is compared with an undisturbed run, made first: equal ids are promised for float64 on CPUs. A partition
    is a process stopped for longer than its lease, then woken; cut networks need other tools.

    Example: echelon chaos --injections 20 --seed 7 -o fault-matrix.md
    """
    drawn = injections, _names(faults), _names(victims), _names(moments)
    rounds = _read_plan(plan) if plan else draw_plan(seed, *drawn)
    settings = Settings(
        streams=streams, tokens=tokens, tolerance=tolerance, lease_s=lease_s, settled_s=settle_s, seed=seed
    )
    found: list[Outcome] = []
    differing: list[str] = []
    with Runner(address, settings) as runner:
        facts = facts_of(runner.look())
        typer.echo(f"echelon: {streams} streams undisturbed", err=True)
        runner.undisturbed()
        for number, injected in enumerate(rounds, 1):
            trial = _trial(runner, injected)
            told = list(outcomes(trial))
            found += told
            differing += wrong(trial)
            _tell(f"{number}/{len(rounds)}", injected, trial, told, as_json)
            content = document(TITLE, {**facts, "streams": str(streams)}, found, differing)
            _write(report, content)  # each time: an interrupted run has its report
    if not as_json:
        typer.echo(content.rstrip())
    if differing:
        raise typer.Exit(1)


def _trial(runner: Runner, injected: Round) -> Trial:
    try:
        return runner.trial(injected)
    except TimeoutError as error:
        raise UnavailableError(f"{' then '.join(map(str, injected))}: {error}") from error


def _names(text: str) -> list[str]:
    return [name for name in re.split(r"[\s,]+", text) if name]


def _read_plan(path: Path) -> tuple[Round, ...]:
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise ConfigError("reading a plan needs PyYAML: pip install 'echelon[server]'", field="plan") from error
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the plan {path} cannot be read: {error}", field="plan") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"the plan {path} is not YAML: {error}", field="plan") from error
    return parse_plan(content)


def _tell(number: str, injected: Round, trial: Trial, told: Sequence[Outcome], as_json: bool) -> None:
    """One round as it ends."""
    said = wrong(trial)
    struck = list(zip(trial.strikes, told, strict=True))
    if as_json:
        strikes = [{"name": one.target.name, "pids": one.target.pids, "unix_s": one.unix_s} for one in trial.strikes]
        output.json_line({"injections": injected, "strikes": strikes, "outcomes": told, "differences": said})
        return
    head = " then ".join(f"{strike.injection.fault} {strike.target.name} ({one.phase})" for strike, one in struck)
    last = told[-1].last_s
    waited = "no stream waited" if last is None else f"all {told[-1].counted} streams went on within {last:.2f} s"
    typer.echo(f"echelon: {number} {head}: {waited}, {len(said) or 'nothing'} differs", err=True)
    for line in said:
        typer.echo(f"echelon:   {line}", err=True)


def _write(path: Path | None, content: str) -> None:
    if path is None:
        return
    try:
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}", field="output") from error
