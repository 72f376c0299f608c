"""`echelon bench`: how fast a model is served, beside the floor and beside others' figures.

The commands, put together. Those that measure need the server's packages, and take the flags of `echelon serve`.
"""

from __future__ import annotations

import typer

from echelon.cli.bench.offline import offline
from echelon.cli.bench.online import online
from echelon.cli.bench.report import compare, plot
from echelon.cli.bench.setting import DEFAULTS
from echelon.cli.flags import with_flags

app = typer.Typer(name="bench", help="Measure how fast a model is served.", no_args_is_help=True)
for command in (offline, online):
    app.command(command.__name__)(with_flags(command, without=("address",), defaults=DEFAULTS))
app.command("compare")(compare)
app.command("plot")(plot)
