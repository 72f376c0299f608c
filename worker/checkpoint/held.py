"""A shard that a spare holds ready: checked, mapped, and registered with its device, which then only has to fetch it.

In a spare, before it is told which rank it is, and in that rank until it has loaded. Ranks that load at once share the
bandwidth of their host's memory; what is checked ahead of time is read by devices alone. It knows no model.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from echelon.errors import ConfigError
from worker.checkpoint.checksum import tensor_checksums
from worker.checkpoint.manifest import Manifest, UnfitShardError, read_manifest

Mark = tuple[int, int, int]  # inode, size and time of change of a file


@dataclass(frozen=True, slots=True)
class HeldShard:
    """manifest: shard.json as it was when the weights were checked. mapped: the file of weights, all of it."""

    folder: Path
    manifest: bytes
    weights: Path
    mark: Mark
    mapped: Tensor

    def is_current(self, manifest: bytes, weights: Path) -> bool:
        """Whether these are the files that were checked, and nobody has written to them since. Raises OSError."""
        return (manifest, weights, mark_of(weights)) == (self.manifest, self.weights, self.mark)

    def release(self) -> None:
        """The device needs it no more."""
        if torch.cuda.is_available():
            torch.cuda.cudart().cudaHostUnregister(self.mapped.data_ptr())


def hold(folder: Path, register: bool = True) -> HeldShard:
    """Map a shard and check every byte of it. Raises UnfitShardError, ConfigError or OSError.

    register: with the device of this process, so that it copies at its full speed; only files in memory, as in
    /dev/shm, can be, and others are not held. That touches each page, which counts as a change: it comes first.
    """
    found = read_manifest(folder)
    if found is None:
        raise UnfitShardError(f"there is no shard in {folder} yet")
    manifest = Manifest.from_json(found)
    weights = manifest.weights_in(folder)
    with weights.open("r+b") as file:
        mapped = torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.uint8)
    if register and not registered(mapped):
        raise UnfitShardError(f"{weights} is not in memory: no device can be told to copy from it")
    held = HeldShard(folder, found, weights, mark_of(weights), mapped)
    try:
        checksums = tensor_checksums(weights)
    except (ConfigError, OSError):
        held.release()
        raise
    if checksums != {name: entry.crc32c for name, entry in manifest.tensors.items()}:
        held.release()
        raise UnfitShardError(f"{weights} is not what was written")
    return held


def registered(mapped: Tensor) -> bool:
    """Whether the device of this process may copy from it on its own from now on."""
    return int(torch.cuda.cudart().cudaHostRegister(mapped.data_ptr(), len(mapped), 0)) == 0


def mark_of(path: Path) -> Mark:
    """Raises OSError."""
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


class Holder:
    """What holds a spare's shard: tell it again and again which one is wanted. Its work is niced."""

    def __init__(self, niceness: int, register: bool = True) -> None:
        self._niceness = niceness
        self._register = register
        self._tried: tuple[Path, bytes | None] | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._held: HeldShard | None = None
        self._given = False

    def want(self, folder: Path) -> None:
        """Returns at once. A shard that is not there yet is held once it is; one that is not fit, once it is another.

        Its shard.json tells that, and not when it was touched: whoever restores from a shard marks it as used. What was
        held before is let go even if there is nothing in its place: its memory may be what that waits for.
        """
        if self._thread is not None and self._thread.is_alive():
            return
        found = None
        with contextlib.suppress(OSError):
            found = read_manifest(folder)
        wanted = folder, found
        if wanted != self._tried:
            self._tried = wanted
            self._thread = threading.Thread(target=self._hold, args=(folder,), name="hold-shard", daemon=True)
            self._thread.start()

    def give(self) -> HeldShard | None:
        """What is held now, for the caller to release; nothing is held any more."""
        with self._lock:
            self._given = True
            held, self._held = self._held, None
        return held

    def _hold(self, folder: Path) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), self._niceness)
        self._keep(None)
        with contextlib.suppress(OSError, ConfigError, UnfitShardError):  # the rank looks for itself, and tells why not
            self._keep(hold(folder, self._register))

    def _keep(self, held: HeldShard | None) -> None:
        """In place of what was held; what comes too late to be given is let go at once."""
        with self._lock:
            superfluous = held if self._given else self._held
            if not self._given:
                self._held = held
        if superfluous is not None:
            superfluous.release()
