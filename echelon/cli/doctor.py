"""`echelon doctor`: what is wrong with this machine, its packages and its cluster, and what to do about it.

Runs in the user's terminal, and without the server's packages too. The edge of the diagnosis: reads the environment,
gathers facts, prints what the checks of `diagnosis/` make of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from echelon.aio import AsyncClient
from echelon.cli import output
from echelon.cli.cluster import STATUS_TIMEOUT_S
from echelon.cli.diagnosis.bundle import write_bundle
from echelon.cli.diagnosis.facts import Facts
from echelon.cli.diagnosis.finding import Finding, Level
from echelon.cli.diagnosis.gather import gather, look_at
from echelon.cli.diagnosis.machine import MACHINE
from echelon.cli.diagnosis.probes import probe
from echelon.cli.diagnosis.software import SOFTWARE
from echelon.errors import ConfigError
from echelon.profiles import config_path

STYLES = {Level.OK: "green", Level.WARN: "yellow", Level.FAIL: "bold red"}


def doctor(
    bundle: Annotated[
        Path | None, typer.Option(help="Write all that was found to this .tar.gz, secrets masked.", metavar="FILE")
    ] = None,
    state_dir: Annotated[Path | None, typer.Option(help="The --state-dir that `serve` is given.")] = None,
    address: output.Address = None,
    profile: output.Profile = None,
    as_json: output.AsJson = False,
) -> None:
    """Check this machine, what is installed and what is served: what is wrong, and what to do. Exit 1 if something is.

    Example: echelon doctor --bundle doctor.tar.gz
    """
    environment = dict(os.environ)
    with _patience():
        facts = _facts(address, profile, state_dir, environment)
    findings = examine(facts)
    if bundle is not None:
        write_bundle(bundle, facts, findings, environment, _config(environment))
    if as_json:
        output.json_line({"version": facts.version, "findings": findings})
    else:
        _show(findings)
    if any(finding.level is Level.FAIL for finding in findings):
        raise typer.Exit(1)


def examine(facts: Facts) -> list[Finding]:
    """Every check's finding, in order."""
    return [check(facts) for check in (*SOFTWARE, *MACHINE)]


def _facts(address: str | None, profile: str | None, state_dir: Path | None, environment: Mapping[str, str]) -> Facts:
    served, settings_error = None, ""
    try:
        client = AsyncClient(address, profile=profile, timeout_s=STATUS_TIMEOUT_S, max_retries=0)
        served = asyncio.run(look_at(client))
    except ConfigError as error:
        settings_error = error.message
    return gather(probe(), environment, state_dir, served, settings_error)


def _config(environment: Mapping[str, str]) -> dict[str, str]:
    path = config_path(environment)
    with contextlib.suppress(OSError):
        return {path.name: path.read_text(errors="replace")}
    return {}


def _patience() -> contextlib.AbstractContextManager[object]:
    """Importing PyTorch takes seconds; a terminal is told so."""
    console = Console(stderr=True)
    return console.status("looking ...") if console.is_terminal else contextlib.nullcontext()


def _show(findings: Sequence[Finding]) -> None:
    console = Console()
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        line = Text(f"{finding.level.value:<4} ", style=STYLES[finding.level])
        line.append(f" {finding.name:<{width}}  {finding.message}", style="default")
        console.print(line, soft_wrap=True)
        if finding.remedy:
            console.print(Text(f"{'':<{width + 6}}  -> {finding.remedy}"), soft_wrap=True)
