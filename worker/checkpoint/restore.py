"""Fills a model with what its rank has in the shard checkpoint: every tensor in one run, as it is, checked on its way.

In every rank, before it serves. Either all of it is right or UnfitShardError says what is not, and the caller loads the
source. It opens nothing but the shard.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from echelon.errors import ConfigError
from models.config import ModelConfig
from models.decoder import DecoderModel
from models.files import read_header
from worker.checkpoint.checksum import PIECE_BYTES, read_into
from worker.checkpoint.held import HeldShard
from worker.checkpoint.manifest import Manifest, ShardAddress, UnfitShardError

Progress = Callable[[int, int], None]


def restore(
    model: DecoderModel,
    config: ModelConfig,
    address: ShardAddress,
    found: bytes | None,
    source: Path,
    progress: Progress,
    held: HeldShard | None = None,
) -> int:
    """Fills every tensor of the model; returns their bytes. progress(loaded_bytes, total_bytes) after each of them.

    1. found, the shard.json, must speak of this rank, and the source's files, so far as they are there, be as it says.
    2. What was held ready, and has not been written to since, is as it was checked: the device fetches it.
    3. Else tensors are read in the order of the file, by as many threads as torch computes with, and checked by crc32c.

    Raises UnfitShardError; tensors may be filled in part then.
    """
    if found is None:
        raise UnfitShardError(f"there is no shard in {address.folder} yet")
    manifest = Manifest.from_json(found)
    manifest.check(address, config)
    try:
        manifest.check_source(source)
        path = manifest.weights_in(address.folder)
        first_bytes = _first_bytes(model, manifest, path)
        if held is not None and held.is_current(found, path):
            loaded_bytes = _fetch(model, first_bytes, held.mapped)
            progress(loaded_bytes, loaded_bytes)
            return loaded_bytes
        return _fill(model, manifest, path, first_bytes, progress)
    except OSError as error:
        raise UnfitShardError(f"{address.folder} cannot be read: {error}") from error


def _first_bytes(model: DecoderModel, manifest: Manifest, path: Path) -> dict[str, int]:
    """Where each tensor begins in the file, in its order."""
    try:
        stored = read_header(path)
    except ConfigError as error:
        raise UnfitShardError(error.message) from error
    if stored.keys() != model.shards.keys():
        raise UnfitShardError(f"{path}: its header names other tensors than {manifest.place} holds")
    return dict(sorted(((name, each.first_byte) for name, each in stored.items()), key=lambda item: item[1]))


def _fetch(model: DecoderModel, first_bytes: Mapping[str, int], mapped: Tensor) -> int:
    """All from memory that was checked before; the bytes of it."""
    for name, first_byte in first_bytes.items():
        target = model.shards[name].view(-1).view(torch.uint8)
        target.copy_(mapped[first_byte : first_byte + len(target)], non_blocking=True)
    _settle(model)
    return sum(shard.nbytes for shard in model.shards.values())


def _settle(model: DecoderModel) -> None:
    """All has been fetched, or the error is told here."""
    device = next(iter(model.shards.values())).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _fill(
    model: DecoderModel, manifest: Manifest, path: Path, first_bytes: Mapping[str, int], progress: Progress
) -> int:
    """All from the file, each tensor checked on its way; the bytes of it."""
    total_bytes, loaded_bytes = sum(shard.nbytes for shard in model.shards.values()), 0
    with ShardFile(path) as file, ThreadPoolExecutor(torch.get_num_threads()) as pool:
        fillings = [pool.submit(file.fill, model.shards[name], first) for name, first in first_bytes.items()]
        try:
            for name, filling in zip(first_bytes, fillings, strict=True):
                if (found := filling.result()) != (expected := manifest.tensors[name].crc32c):
                    raise UnfitShardError(f"{path}: {name} has crc32c {found:08x}, expected {expected:08x}")
                loaded_bytes += model.shards[name].nbytes
                progress(loaded_bytes, total_bytes)
        finally:
            pool.shutdown(cancel_futures=True)
    _settle(model)
    return loaded_bytes


class ShardFile:
    """An open file of weights."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def fill(self, shard: Tensor, first_byte: int) -> int:
        """A resident tensor with what lies there; the crc32c of it. A device may still fetch. Raises OSError."""
        target = shard.view(-1).view(torch.uint8)
        if target.is_cpu:
            return read_into(self._descriptor, first_byte, target.numpy())
        return self.send(target, first_byte, pinned=True)

    def send(self, target: Tensor, first_byte: int, pinned: bool) -> int:
        """Fill a device's bytes in pieces: while it fetches one from pinned memory, the next is read and looked at.

        torch gives a piece of pinned memory out again once the device is done with it.
        """
        crc = 0
        for done in range(0, len(target), PIECE_BYTES):
            piece = torch.empty(min(PIECE_BYTES, len(target) - done), dtype=torch.uint8, pin_memory=pinned)
            crc = read_into(self._descriptor, first_byte + done, piece.numpy(), crc, PIECE_BYTES)
            target[done : done + len(piece)].copy_(piece, non_blocking=True)
        return crc
