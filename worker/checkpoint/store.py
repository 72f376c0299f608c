"""A store of shard checkpoints as a whole: each shard with its state, whether it can be read, and what may go.

In the user's terminal, for `echelon checkpoint`, and in ranks for the lock. Whoever changes a shard's folder holds its
lock; ranks that serve have no need of the folder. It knows no torch.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import fcntl
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from echelon.errors import ConfigError
from worker.checkpoint.manifest import MANIFEST_FILE, Manifest, UnfitShardError, read_manifest

FOLDERS = "*/*/p*-d*-t*"  # model digest, layout digest, place


class State(enum.Enum):
    """complete: its checksums were not read. stale: the source has changed since. torn: not all of it is there."""

    COMPLETE = "complete"
    STALE = "stale"
    TORN = "torn"
    WRITING = "writing"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredShard:
    """One folder of the store. model: directory of the source; layout: its degrees; both empty for what is torn.

    used_unix_s: when it was last written or restored.
    """

    folder: str
    model: str
    model_digest: str
    layout: str
    layout_digest: str
    dtype: str
    place: str
    bytes: int
    used_unix_s: float
    state: State
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Damage:
    """Where a shard is not what it was written as; tensor is empty where it is the whole file."""

    file: str
    tensor: str
    problem: str


def shards(root: Path) -> list[StoredShard]:
    """All of the store, ordered by model, layout and place. Raises ConfigError where it cannot be read."""
    if not root.is_dir():
        raise ConfigError(f"{root} is no folder; give the --checkpoint-dir of `serve`", field="checkpoint_dir")
    found = []
    for folder in root.glob(FOLDERS):
        try:
            found.append(_look(folder))
        except FileNotFoundError:  # removed meanwhile
            continue
        except OSError as error:
            raise ConfigError(f"{folder} cannot be read: {error.strerror}", field="checkpoint_dir") from error
    return sorted(found, key=lambda shard: (shard.model, shard.model_digest, shard.layout_digest, shard.place))


def _look(folder: Path) -> StoredShard:
    stats = [path.stat() for path in folder.iterdir()]
    try:
        manifest, state, problem = read_whole(folder), State.COMPLETE, ""
    except (OSError, UnfitShardError) as error:
        manifest, state, problem = None, State.TORN, str(error)
    if manifest is not None:
        try:
            manifest.check_source(Path(manifest.model))
        except (OSError, UnfitShardError) as error:
            state, problem = State.STALE, str(error)
    if _is_locked(folder):
        state, problem = State.WRITING, ""
    degrees = {} if manifest is None else {name: count for name, count in manifest.degrees.items() if count > 1}
    layout = " ".join(f"{name} {count}" for name, count in degrees.items())
    return StoredShard(
        folder=str(folder),
        model=manifest.model if manifest else "",
        model_digest=folder.parent.parent.name,
        layout=layout or ("one rank" if manifest else ""),
        layout_digest=folder.parent.name,
        dtype=manifest.dtype if manifest else "",
        place=folder.name,
        bytes=sum(stat.st_size for stat in stats),
        used_unix_s=max(stat.st_mtime for stat in [*stats, folder.stat()]),
        state=state,
        problem=problem,
    )


def read_whole(folder: Path) -> Manifest:
    """shard.json of a folder that has all of the weights. Raises UnfitShardError or OSError."""
    found = read_manifest(folder)
    if found is None:
        raise UnfitShardError(f"{folder / MANIFEST_FILE} is missing")
    manifest = Manifest.from_json(found)
    manifest.weights_in(folder)
    return manifest


def verify(shard: StoredShard) -> list[Damage]:
    """Reads all of a shard, and names each tensor that is not what was written; empty is success."""
    from worker.checkpoint.checksum import tensor_checksums  # its package is the server's

    folder = Path(shard.folder)
    try:
        manifest = read_whole(folder)
        weights = folder / manifest.weights
        found = tensor_checksums(weights)
        if found.keys() != manifest.tensors.keys():
            return [Damage(str(weights), "", f"its header has other tensors than {MANIFEST_FILE}")]
    except (OSError, ConfigError, UnfitShardError) as error:
        return [Damage(shard.folder, "", str(error))]
    return [
        Damage(str(weights), name, f"crc32c is {found[name]:08x}, expected {entry.crc32c:08x}")
        for name, entry in manifest.tensors.items()
        if found[name] != entry.crc32c
    ]


def superfluous(
    found: Sequence[StoredShard], keep: Sequence[str], older_than_s: float | None, now_unix_s: float
) -> list[StoredShard]:
    """Which shards go. What is torn goes, what is being written stays, and so does what keep names.

    keep: beginnings of digests of models or layouts. Of the rest goes what was not used for older_than_s; where
    that is None, all of it if something is named, else what is stale and all but the last used layout of each model.
    """
    whole = [shard for shard in found if shard.state in (State.COMPLETE, State.STALE)]
    latest: dict[str, StoredShard] = {}
    for shard in whole:
        if shard.state is State.COMPLETE:
            best = latest.setdefault(shard.model, shard)
            latest[shard.model] = max(best, shard, key=lambda each: each.used_unix_s)

    def goes(shard: StoredShard) -> bool:
        if any(digest.startswith(name) for name in keep for digest in (shard.model_digest, shard.layout_digest)):
            return False
        if older_than_s is not None:
            return now_unix_s - shard.used_unix_s > older_than_s
        best = latest.get(shard.model)
        layout = best and (best.model_digest, best.layout_digest)
        return bool(keep) or (shard.model_digest, shard.layout_digest) != layout

    return [shard for shard in found if shard.state is State.TORN or (shard in whole and goes(shard))]


def remove(shard: StoredShard) -> bool:
    """Takes a shard out of the store, and folders that are empty then. False: it is being written. Raises OSError."""
    folder = Path(shard.folder)
    try:
        with locked(folder, wait=False):
            for path in (folder / MANIFEST_FILE, *folder.iterdir()):  # without shard.json it is no shard any more
                path.unlink(missing_ok=True)
            folder.rmdir()
    except BlockingIOError:
        return False
    for parent in (folder.parent, folder.parent.parent):
        with contextlib.suppress(OSError):  # there is more in it
            parent.rmdir()
    return True


@contextlib.contextmanager
def locked(folder: Path, wait: bool = True) -> Iterator[None]:
    """Nobody else writes in the folder within it; a process that dies lets go.

    Raises BlockingIOError if it is not to wait and would have to, another OSError where the folder cannot be opened.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


def _is_locked(folder: Path) -> bool:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # a writer that comes now waits for a moment
    except OSError as error:
        return error.errno in (errno.EAGAIN, errno.EWOULDBLOCK)
    finally:
        os.close(descriptor)
    return False
