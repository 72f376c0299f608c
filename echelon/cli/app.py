"""Puts the verbs together, and turns what they raise into one line and an exit code.

Runs in the user's terminal. Knows no verb's options, and imports nothing of the server unless `serve` or `bench` is
named, but for the planner, which is arithmetic and needs none of the server's packages.
"""

from __future__ import annotations

import errno
from typing import Any

import typer
from typer.core import TyperGroup

from echelon.cli import batch, chaos, chat, checkpoint, cluster, doctor, evaluate, generate
from echelon.cli.experts.command import experts
from echelon.cli.output import error_line, exit_code, forget_output, retry_notices
from echelon.cli.plan.command import plan
from echelon.cli.sampling import with_sampling
from echelon.cli.trace.command import trace
from echelon.errors import ConfigError, EchelonError

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


class Commands(TyperGroup):
    """Adds `serve` and `bench` without importing them, and is the one place where a command's error is caught."""

    def list_commands(self, ctx: Any) -> list[str]:
        return ["serve", *super().list_commands(ctx), "bench"]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        match cmd_name:
            case "serve":
                return _serve_command()
            case "bench":
                return _bench_command()
        return super().get_command(ctx, cmd_name)

    def invoke(self, ctx: Any) -> Any:
        try:
            with retry_notices():
                return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            raise typer.Exit(130) from interrupt
        except EchelonError as error:
            error_line(error)
            raise typer.Exit(exit_code(error)) from error
        except OSError as error:
            if error.errno not in DISK_ERRORS:
                raise
            typer.echo(f"echelon: error: the output cannot be written: {error.strerror}", err=True)
            forget_output()
            raise typer.Exit(1) from error


app = typer.Typer(
    name="echelon",
    cls=Commands,
    help="A distributed inference cluster for large language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("generate")(with_sampling(generate.generate))
app.command("chat")(with_sampling(chat.chat, max_tokens=chat.MAX_TOKENS_HELP))
app.add_typer(batch.app, name="batch")
app.command("status")(cluster.status)
app.command("events")(cluster.events)
app.command("experts")(experts)
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(evaluate.app, name="eval")
app.command("doctor")(doctor.doctor)
app.command("plan")(plan)
app.command("trace")(trace)
app.command("chaos")(chaos.chaos)


def _serve_command() -> Any:
    try:
        from echelon.cli.serve import serve
    except ModuleNotFoundError as error:
        return _unavailable("serve", "Start a cluster on this machine (needs the server packages).", error.name)
    made = _typer()
    made.command("serve")(serve)
    return typer.main.get_command(made)


def _bench_command() -> Any:
    try:
        from echelon.cli.bench.command import app as bench
    except ModuleNotFoundError as error:
        return _unavailable("bench", "Measure how fast a model is served (needs the server packages).", error.name)
    return typer.main.get_command(bench)


def _unavailable(name: str, text: str, missing: str | None) -> Any:
    made = _typer()

    @made.command(name, help=text)
    def unavailable() -> None:
        raise ConfigError(f"{name} needs {missing}: pip install 'echelon[server]'")

    return typer.main.get_command(made)


def _typer() -> typer.Typer:
    return typer.Typer(add_completion=False, pretty_exceptions_enable=False)
