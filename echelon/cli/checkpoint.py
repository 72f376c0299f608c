"""`echelon checkpoint`: what ranks keep on this machine to start again from; whether it is whole, and what may go.

Runs in the user's terminal, beside a cluster or without one: it looks at the folder, and asks nobody. What a shard is
and when it is fit is the business of worker/checkpoint.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Annotated

import typer

from echelon.cli import output
from echelon.errors import ConfigError
from worker.checkpoint import store
from worker.checkpoint.store import StoredShard

UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
SHOWN_DIGITS = 8

app = typer.Typer(help="The shard checkpoints of this machine.", no_args_is_help=True)
Store = Annotated[
    Path,
    typer.Option(
        "--checkpoint-dir",
        metavar="DIR",
        envvar="ECHELON_CHECKPOINT_DIR",
        help="The --checkpoint-dir that `serve` is given.",
    ),
]


@app.command("list")
def list_shards(checkpoint_dir: Store, as_json: output.AsJson = False) -> None:
    """List every shard of the store: of which model and layout, how large, how long ago used, and whether it is whole.

    Example: echelon checkpoint list --checkpoint-dir DIR
    """
    found = store.shards(checkpoint_dir)
    if as_json:
        output.json_line(found)
        return
    now_unix_s = time.time()
    columns = ("model", "model digest", "layout", "layout digest", "dtype", "place", "bytes", "used", "state")
    output.table("", columns, [_row(shard, now_unix_s) for shard in found])
    for shard in found:
        if shard.problem:
            typer.echo(f"{shard.place}: {shard.problem}")
    typer.echo(f"{len(found)} shards, {output.byte_count(sum(shard.bytes for shard in found))}")


@app.command()
def verify(checkpoint_dir: Store, as_json: output.AsJson = False) -> None:
    """Read every shard and compare its checksums. Exit 1 if one is not what was written; ranks load the source then.

    Example: echelon checkpoint verify --checkpoint-dir DIR
    """
    try:
        checked = [(shard, store.verify(shard)) for shard in store.shards(checkpoint_dir) if _is_written(shard)]
    except ModuleNotFoundError as error:
        raise ConfigError(f"verify needs {error.name}: pip install 'echelon[server]'") from None
    if as_json:
        output.json_line([{"folder": shard.folder, "damage": damage} for shard, damage in checked])
    else:
        for shard, damage in checked:
            if not damage:
                typer.echo(f"ok    {shard.folder} {output.byte_count(shard.bytes)}")
            for each in damage:
                typer.echo(f"fail  {each.file} {each.tensor}: {each.problem}".replace(" :", ":"))
    if any(damage for _, damage in checked):
        raise typer.Exit(1)


@app.command()
def prune(
    checkpoint_dir: Store,
    keep: Annotated[
        list[str] | None, typer.Option(metavar="DIGEST", help="Keep only shards whose model or layout begins so.")
    ] = None,
    older_than: Annotated[
        str, typer.Option(metavar="AGE", help="Remove only what was not used for so long: 90m, 12h, 7d.")
    ] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and remove nothing.")] = False,
    as_json: output.AsJson = False,
) -> None:
    """Remove shards: without options all but the last used layout of each model, and always what is torn.

    A cluster that serves is not disturbed: a rank whose shard is gone loads the model's own files, and writes it anew.

    Example: echelon checkpoint prune --checkpoint-dir DIR --older-than 7d
    """
    found = store.shards(checkpoint_dir)
    for name in keep or []:
        if not any(digest.startswith(name) for each in found for digest in (each.model_digest, each.layout_digest)):
            raise ConfigError(f"--keep {name}: no model or layout of {checkpoint_dir} begins so", field="keep")
    going = store.superfluous(found, keep or [], _seconds(older_than) if older_than else None, time.time())
    try:
        removed = [shard for shard in going if dry_run or store.remove(shard)]
    except OSError as error:
        raise ConfigError(f"{error.filename or checkpoint_dir} cannot be removed: {error.strerror}") from error
    if as_json:
        output.json_line({"removed": removed, "kept": [shard for shard in found if shard not in removed]})
        return
    for shard in removed:
        typer.echo(f"{'would remove' if dry_run else 'removed'} {shard.folder} {output.byte_count(shard.bytes)}")
    freed = output.byte_count(sum(shard.bytes for shard in removed))
    typer.echo(f"{len(removed)} of {len(found)} shards, {freed}")


def _row(shard: StoredShard, now_unix_s: float) -> tuple[object, ...]:
    return (
        Path(shard.model).name or "-",
        shard.model_digest[:SHOWN_DIGITS],
        shard.layout or "-",
        shard.layout_digest[:SHOWN_DIGITS],
        shard.dtype or "-",
        shard.place,
        output.byte_count(shard.bytes),
        _age(now_unix_s - shard.used_unix_s),
        shard.state.value,
    )


def _is_written(shard: StoredShard) -> bool:
    return shard.state is not store.State.WRITING


def _age(age_s: float) -> str:
    """In the largest unit that leaves a number of at least 1."""
    unit = next((unit for unit, length_s in reversed(UNITS_S.items()) if age_s >= length_s), "s")
    return f"{max(age_s, 0) / UNITS_S[unit]:.0f} {unit}"


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd])", text.strip())
    if match is None:
        raise ConfigError(f"--older-than must be a number with a unit, as in 90m, 12h or 7d; got {text!r}")
    return float(match[1]) * UNITS_S[match[2]]
