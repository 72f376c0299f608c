"""Puts the verbs together, and turns what they raise into one line and an exit code.

Runs in the user's terminal. Knows no verb's options, and imports nothing of the server unless `serve` is named, but
for the planner, which is arithmetic and needs none of the server's packages.
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
    """Adds `serve` without importing it, and is the one place where a command's error is caught."""

    def list_commands(self, ctx: Any) -> list[str]:
        return ["serve", *super().list_commands(ctx)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return _serve_command() if cmd_name == "serve" else super().get_command(ctx, cmd_name)

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
    serve = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    try:
        from echelon.cli.serve import serve as serve_function
    except ModuleNotFoundError as error:
        missing = error.name

        @serve.command("serve")
        def unavailable() -> None:
            """Start a cluster on this machine (needs the server packages)."""
            raise ConfigError(f"serve needs {missing}: pip install 'echelon[server]'")
    else:
        serve.command("serve")(serve_function)
    return typer.main.get_command(serve)
