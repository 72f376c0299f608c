"""Writes a rank's shard, once it serves from the source: in a thread beside its steps, and out of their way.

The shard is cut from the source anew and not copied from the model: experts have other places by then, a device has
other things to do, and it is the loader that reads here too. Nothing of it is there before all of it is: shard.json
comes last, by a rename. One writer at a time and folder; what fails is told and costs nothing but a slower start.
"""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from echelon.errors import ConfigError
from models.config import ModelConfig
from models.files import Stamp, read_header, weight_stamps
from models.parameter import Parameter
from models.tables import held_parameters
from parallel.sharding import Shape
from worker.checkpoint.checksum import checksum
from worker.checkpoint.manifest import (
    MANIFEST_FILE,
    Manifest,
    ShardAddress,
    TensorEntry,
    UnfitShardError,
    cut_of,
    read_manifest,
)
from worker.checkpoint.store import locked
from worker.loader import SourceShare
from worker.weight_file import STORED_NAMES, read_buffer

NICENESS = 10  # not more: where all cores are busy it would hold the interpreter's lock for long
SYNC_BYTES = 64 << 20  # written at most before it is on disk: a journal must not wait behind gigabytes
PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Written:
    """What became of it: bytes of the shard, 0 with the reason if it was not written, without one if it was there."""

    bytes: int
    took_s: float
    reason: str = ""


class ShardWriter:
    """Of one shard, once. judged: the shard.json that was found unfit, or None; another one there is left alone.

    source: the stamps of the files before they were loaded.
    """

    def __init__(
        self,
        address: ShardAddress,
        config: ModelConfig,
        model: Path,
        source: Mapping[str, Stamp],
        judged: bytes | None,
    ) -> None:
        self._address = address
        self._config = config
        self._model = model
        self._source = source
        self._judged = judged
        self._cancelled = threading.Event()

    def start(self, tell: Callable[[Written], None]) -> None:
        """In a thread of its own, which tells what came of it, unless another has written it or it was cancelled."""

        def run() -> None:
            thread = threading.get_native_id()
            niceness = max(os.getpriority(os.PRIO_PROCESS, thread), NICENESS)
            os.setpriority(os.PRIO_PROCESS, thread, niceness)  # on Linux that is this thread alone
            written = self.write()
            if (written.bytes or written.reason) and not self._cancelled.is_set():
                tell(written)

        threading.Thread(target=run, name="shard", daemon=True).start()

    def cancel(self) -> None:
        """End it soon; nothing is left of what was not whole."""
        self._cancelled.set()

    def write(self) -> Written:
        """Now, in this thread. Waits for another writer of the same shard."""
        begun_s = time.monotonic()
        folder = self._address.folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with locked(folder):
                written_bytes = 0 if read_manifest(folder) != self._judged else self._replace(folder)
        except (OSError, ConfigError, UnfitShardError) as error:
            return Written(0, time.monotonic() - begun_s, f"{folder}: {error}")
        except Exception as error:  # noqa: BLE001 - a thread's last words; the rank serves on
            return Written(0, time.monotonic() - begun_s, f"{folder}: {type(error).__name__}: {error}")
        return Written(written_bytes, time.monotonic() - begun_s)

    def _replace(self, folder: Path) -> int:
        """What is there is unfit, or was left by a writer that was killed: it goes first, and makes room."""
        for left in (folder / MANIFEST_FILE, *folder.iterdir()):
            left.unlink(missing_ok=True)
        weights = folder / f"weights-{secrets.token_hex(4)}.safetensors"
        partial = folder / f"{MANIFEST_FILE}.partial"
        try:
            self._write_weights(weights)
            manifest = self._manifest(weights)
            if weight_stamps(self._model) != self._source:
                raise UnfitShardError(f"the source {self._model} has changed since it was loaded")
            with partial.open("w") as file:
                file.write(manifest.to_json())
                file.flush()
                os.fsync(file.fileno())
            partial.rename(folder / MANIFEST_FILE)
            _sync_folder(folder)
        except BaseException:
            partial.unlink(missing_ok=True)
            weights.unlink(missing_ok=True)
            raise
        return manifest.weights_bytes

    def _write_weights(self, path: Path) -> None:
        """All that the rank holds, as safetensors, in the order of the source's files."""
        share = SourceShare(self._config, self._model, self._address.place)
        header = _header({parameter.name: self._held(parameter) for parameter in share.parameters})
        with path.open("wb") as file:
            _check_room(path.parent, len(header) + sum(map(self._bytes, share.parameters)))
            file.write(header)
            unsynced_bytes = 0
            buffer = read_buffer(torch.device("cpu"))
            for parameter, parts in share.tensors(buffer):
                padding_bytes, (_, dtype) = self._bytes(parameter), self._held(parameter)
                for part in parts:
                    self._check_cancelled()
                    data = part.meant(buffer.device).to(dtype).contiguous()
                    file.write(data.view(-1).view(torch.uint8).numpy().data)
                    padding_bytes -= data.nbytes
                    unsynced_bytes += data.nbytes
                    if unsynced_bytes >= SYNC_BYTES:
                        unsynced_bytes = 0
                        file.flush()
                        os.fdatasync(file.fileno())
                file.write(bytes(padding_bytes))  # the vocabulary's
            file.flush()
            os.fsync(file.fileno())

    def _manifest(self, weights: Path) -> Manifest:
        """Checksums are of what can be read again, not of what was meant to be written."""
        stored, tensors = read_header(weights), {}
        with weights.open("rb") as file:
            for parameter in held_parameters(self._config, self._address.place):
                self._check_cancelled()
                name, regions = parameter.name, cut_of(parameter.held_regions(self._address.place))
                crc = checksum(file.fileno(), stored[name].first_byte, self._bytes(parameter))
                tensors[name] = TensorEntry(self._held(parameter)[0], regions, crc)
        return Manifest(
            model_digest=self._address.model_digest,
            layout_digest=self._address.layout_digest,
            place=self._address.folder.name,
            degrees=self._address.degrees,
            dtype=self._address.dtype,
            model=str(self._model),
            source=self._source,
            created_unix_s=time.time(),
            weights=weights.name,
            weights_bytes=weights.stat().st_size,
            tensors=tensors,
        )

    def _held(self, parameter: Parameter) -> tuple[Shape, torch.dtype]:
        """As the rank holds it."""
        dtype = parameter.held_dtype(self._address.dtype)
        return parameter.held_shape(self._address.place.degrees), getattr(torch, dtype)

    def _bytes(self, parameter: Parameter) -> int:
        shape, dtype = self._held(parameter)
        return math.prod(shape) * dtype.itemsize

    def _check_cancelled(self) -> None:
        if self._cancelled.is_set():
            raise UnfitShardError("it was cancelled")


def _header(held: Mapping[str, tuple[Shape, torch.dtype]]) -> bytes:
    """Of a safetensors file with these tensors one behind the other; padded, so that they begin on a page."""
    entries, end = {}, 0
    for name, (shape, dtype) in held.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": STORED_NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % PAGE_BYTES)
    return len(text).to_bytes(8, "little") + text


def _check_room(folder: Path, needed_bytes: int) -> None:
    """Rather than fill the disk to its end, where a journal may lie as well. Raises OSError."""
    if (free_bytes := shutil.disk_usage(folder).free) < needed_bytes:
        raise OSError(errno.ENOSPC, f"{needed_bytes} bytes are needed and {free_bytes} are free")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
