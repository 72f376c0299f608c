"""`echelon serve`: read flags, environment and YAML once, check, then supervise until it is over.

The edge of the supervisor's process: the only place where the server reads os.environ, and the user's display. Every
flag is a field of ServeConfig; none is written down twice. The server is imported when it is to run: help and
completion need the flags alone.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from echelon.cli.flags import with_flags
from echelon.config import ENVIRONMENT_PREFIX, CoordinatorConfig, ServeConfig, resolve_config
from echelon.errors import ConfigError

SHOWN_S = 0.05  # parts of a start that took less are not worth a word


class Terminal:
    """Progress and warnings on stderr, a bar only where it is a terminal; the one ready line on stdout."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def loading(self, loaded_bytes: int, total_bytes: int) -> None:
        """Draw the bar, and take it away when all is loaded."""
        if not self._console.is_terminal:
            return
        if self._progress is None:
            columns = (TextColumn("loading"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
            self._progress = Progress(*columns, console=self._console, transient=True)
            self._task = self._progress.add_task("loading")
            self._progress.start()
        self._progress.update(self._task, completed=loaded_bytes, total=total_bytes)
        if loaded_bytes >= total_bytes:
            self.close()

    def ready(self, address: str, took_s: Mapping[str, float]) -> None:
        """Scripts wait for this line. Before it, what the start took."""
        self.close()
        parts = [f"{part} {seconds:.1f} s" for part, seconds in took_s.items() if seconds >= SHOWN_S]
        if parts:
            self.warn(f"started in {sum(took_s.values()):.1f} s: {', '.join(parts)}")
        typer.echo(f"echelon: ready {address}")
        sys.stdout.flush()

    def warn(self, message: str) -> None:
        """One line."""
        self._console.print(f"echelon: {message}", markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leave no half-drawn bar behind."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def run(
    config: Annotated[Path | None, typer.Option("--config", help="YAML file with any of the keys below.")] = None,
    *,
    flags: Mapping[str, str | None],
) -> None:
    """Start a cluster on this machine (or on the Ray at --ray-address) and serve until Ctrl-C.

    A flag --max-context is also ECHELON_MAX_CONTEXT and the key max-context of the --config file, in this order.
    SIGHUP reads that file again: another model, layout or limit is served from then on, by the same processes.
    """
    try:
        from coordinator.supervisor.preparation import prepare, prepare_change, temporary_folder
        from coordinator.supervisor.process import Supervisor
    except ModuleNotFoundError as error:
        raise ConfigError(f"serve needs {error.name}: pip install 'echelon[server]'") from None
    environment = dict(os.environ)
    settings = resolve_config(flags, environment, _read(config))

    def reread(serving: CoordinatorConfig) -> CoordinatorConfig:
        return prepare_change(resolve_config(flags, environment, _read(config)), settings, serving)

    with temporary_folder() as folder:
        settled, ray = prepare(settings, folder)
        terminal = Terminal()
        try:
            outcome = Supervisor(settled, ray, folder, environment, terminal, reread if config else None).run()
        finally:
            terminal.close()
    if outcome.message:
        typer.echo(f"echelon: error: {outcome.message}", err=True)
    raise typer.Exit(outcome.code)


@contextlib.contextmanager
def without_variables() -> Iterator[None]:
    """Hides ECHELON_* of flags from a `serve` that is started meanwhile: its file is all that counts."""
    names = [ENVIRONMENT_PREFIX + name.upper() for name in ServeConfig.model_fields]
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _read(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        return path.read_text()
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}", field="config") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {path} is not UTF-8 at byte {error.start}", field="config") from None


serve = with_flags(run)
