"""Brings a rank its weights: out of its shard checkpoint where that is fit, else out of the model's own files.

In every rank, when it forms an epoch. Which of the two it was, and why not the other, is told. Knows neither how a
shard is read nor how it is written.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

from echelon.errors import ConfigError
from echelon.internal.v1 import control_pb2
from models.config import ModelConfig
from models.decoder import DecoderModel
from models.files import weight_stamps
from parallel.context import ParallelContext
from worker.checkpoint.held import HeldShard
from worker.checkpoint.manifest import MANIFEST_FILE, ShardAddress, UnfitShardError, read_manifest
from worker.checkpoint.restore import restore
from worker.checkpoint.write import ShardWriter
from worker.loader import Progress, left_in_files, load_weights
from worker.random_weights import fill_randomly


@dataclass(frozen=True, slots=True)
class Loaded:
    """origin: "shard", "source" or "random"; bytes as they lie there; reason: why not the shard, if there is a store.

    left: what the source has besides and no rank reads.

    writer: of the shard that is to be there next time, None if it is, or if there is no store.
    """

    origin: str
    bytes: int
    took_s: float
    reason: str = ""
    left: str = ""
    writer: ShardWriter | None = None

    def told(self) -> control_pb2.WeightsLoaded:
        """The message for the event log."""
        origin, reason, left = self.origin, self.reason, self.left
        return control_pb2.WeightsLoaded(origin=origin, bytes=self.bytes, took_s=self.took_s, reason=reason, left=left)


def bring_weights(
    model: DecoderModel,
    config: ModelConfig,
    command: control_pb2.FormEpoch,
    context: ParallelContext,
    progress: Progress,
    held: HeldShard | None = None,
) -> Loaded:
    """Fills every tensor of the model. held: the shard, if it was checked ahead of time.

    Raises ConfigError or OSError when neither shard nor source can be used.
    """
    begun_s, source = time.monotonic(), Path(command.model_path)
    if command.random_weights:
        made_bytes = fill_randomly(model, config, context, progress)
        return Loaded("random", made_bytes, time.monotonic() - begun_s)
    if not command.checkpoint_dir:
        loaded_bytes = load_weights(model, config, source, context, progress)
        return Loaded("source", loaded_bytes, time.monotonic() - begun_s, left=left_in_files(config, source))
    address = ShardAddress(Path(command.checkpoint_dir), command.model_digest, context.place, command.dtype)
    found = None
    try:
        found = read_manifest(address.folder)
        restored_bytes = restore(model, config, address, found, source, progress, held)
        with contextlib.suppress(OSError):
            os.utime(address.folder / MANIFEST_FILE)  # last used now, for whoever prunes the store
        return Loaded("shard", restored_bytes, time.monotonic() - begun_s)
    except OSError as error:
        reason = f"{address.folder} cannot be read: {error}"
    except UnfitShardError as error:
        reason = str(error)
    stamps = weight_stamps(source)
    try:
        loaded_bytes = load_weights(model, config, source, context, progress)
    except (ConfigError, OSError) as error:
        raise ConfigError(f"{error}; and from the shard checkpoint: {reason}", field="model") from error
    writer = ShardWriter(address, config, source, stamps, found)
    left = left_in_files(config, source)
    return Loaded("source", loaded_bytes, time.monotonic() - begun_s, reason, left, writer)
