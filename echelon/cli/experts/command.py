"""`echelon experts`: how often each expert was chosen, once or again and again, and as a picture.

Runs in the user's terminal, over the asynchronous client: see generate.py. What is shown is heat.py's beside this one.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from echelon.aio import AsyncClient
from echelon.cli import output
from echelon.cli.experts.heat import draw, load_table, since, strips
from echelon.cli.trace.drawing import to_png, to_svg
from echelon.errors import ConfigError, DeadlineError, EchelonError, UnavailableError
from echelon.types import ExpertLoad

SUFFIXES = (".png", ".svg")
TIMEOUT_S = 3.0
NOTHING = "no expert has been chosen yet, or the model has none"


def experts(
    watch: Annotated[
        bool,
        typer.Option("--watch", "-w", help="Again and again, what was chosen since the last look; until Ctrl-C."),
    ] = False,
    interval_s: Annotated[float, typer.Option("--interval", help="Seconds between looks of --watch.", min=0.5)] = 2.0,
    outputs: Annotated[
        list[Path] | None, typer.Option("--output", "-o", help="Write the heat map as a picture (.svg, .png).")
    ] = None,
    address: output.Address = None,
    profile: output.Profile = None,
    as_json: output.AsJson = False,
) -> None:
    """Show how often each expert of each layer was chosen, and how evenly that falls on experts and ranks.

    Example: echelon experts --watch
    """
    for path in outputs or []:
        if path.suffix not in SUFFIXES:
            raise ConfigError(f"{path}: expected one of {', '.join(SUFFIXES)}", field="output")
    if watch and outputs:
        raise ConfigError("--output draws what was chosen until now: give it without --watch", field="output")
    client = AsyncClient(address, profile=profile, timeout_s=TIMEOUT_S, max_retries=0)
    if watch:
        asyncio.run(_watch(client, interval_s, as_json))
        return
    loads = asyncio.run(_look(client))
    if as_json:
        output.json_line([_figures(load) for load in loads])
    else:
        Console(width=None if sys.stdout.isatty() else output.PIPE_WIDTH).print(view(loads))
    for path in outputs or []:
        _write(path, loads)


def view(loads: Sequence[ExpertLoad]) -> RenderableType:
    """The table, and below it the heat map."""
    return Group(load_table(loads), strips(loads)) if loads else Text(NOTHING)


async def _look(client: AsyncClient) -> list[ExpertLoad]:
    async with client:
        return await client.expert_load()


async def _watch(client: AsyncClient, interval_s: float, as_json: bool) -> None:
    """Until it is cancelled. A coordinator that is away is looked for again."""
    on_terminal = sys.stdout.isatty() and not as_json
    earlier: Sequence[ExpertLoad] = ()
    async with client:
        with Live(auto_refresh=False) if on_terminal else contextlib.nullcontext() as live:
            while True:
                shown: Sequence[ExpertLoad] = ()
                error: EchelonError | None = None
                try:
                    loads = await client.expert_load()
                    shown, earlier = since(earlier, loads), loads
                except (UnavailableError, DeadlineError) as away:
                    error = away
                found = view(shown) if error is None else Text(f"{client.address}: {error}; looking again")
                if as_json:
                    said = None if error is None else error.message
                    output.json_line({"layers": [_figures(load) for load in shown], "error": said})
                elif live is None:
                    Console(width=output.PIPE_WIDTH).print(found)
                else:
                    live.update(found, refresh=True)
                await asyncio.sleep(interval_s)


def _figures(load: ExpertLoad) -> dict[str, object]:
    return {
        "replica": load.replica,
        "epoch": load.epoch,
        "layer": load.layer,
        "rows": load.rows,
        "slots": load.slots,
        "max_over_mean": load.max_over_mean,
        "rank_max_over_mean": load.rank_max_over_mean,
    }


def _write(path: Path, loads: Sequence[ExpertLoad]) -> None:
    if not loads:
        raise ConfigError(f"{path} is not written: {NOTHING}", field="output")
    content = to_png(draw(loads)) if path.suffix == ".png" else to_svg(draw(loads)).encode()
    try:
        path.write_bytes(content)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}", field="output") from error
