"""A rank that loads and keeps its weights as rank processes do, without a group: for tests of shard checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from echelon.internal.v1 import control_pb2
from models.config import read_model_config, with_prediction
from models.files import model_digest
from models.registry import build_model
from parallel.context import ParallelContext
from parallel.degrees import Degrees, Place
from worker.checkpoint.held import HeldShard
from worker.checkpoint.manifest import ShardAddress
from worker.checkpoint.write import Written
from worker.weights import Loaded, bring_weights


@dataclass(slots=True)
class KeepingRank:
    """One rank of a layout over a model and a store. digest: of the model as the coordinator knows it. predicts: with
    its layer for multi-token prediction."""

    model: Path
    store: Path | None
    place: Place = field(default_factory=lambda: Degrees(tensor=2).place(1))
    dtype: str = "float32"
    digest: str = ""
    predicts: bool = False
    keep_float8: bool = False

    def __post_init__(self) -> None:
        self.digest = self.digest or model_digest(self.model, self.keep_float8)

    @property
    def folder(self) -> Path:
        assert self.store is not None
        return ShardAddress(self.store, self.digest, self.place, self.dtype).folder

    @property
    def weights(self) -> Path:
        """The one file of weights that is there."""
        (found,) = self.folder.glob("*.safetensors")
        return found

    def load(self, held: HeldShard | None = None) -> tuple[dict[str, Tensor], Loaded]:
        """What the rank holds then, and where it came from. Nothing is left of what was there before.

        held: what a spare has made ready.
        """
        config = read_model_config(self.model, keep_float8=self.keep_float8)
        if self.predicts:
            config = with_prediction(config)
        dtype = getattr(torch, self.dtype)
        context = ParallelContext(epoch=1, device=torch.device("cpu"), dtype=dtype, place=self.place)
        model = build_model(config, context)
        for shard in model.shards.values():
            shard.fill_(torch.nan)
        command = control_pb2.FormEpoch(
            model_path=str(self.model), checkpoint_dir=str(self.store or ""), model_digest=self.digest, dtype=self.dtype
        )
        told: list[tuple[int, int]] = []
        loaded = bring_weights(model, config, command, context, lambda *progress: told.append(progress), held)
        assert told[-1] == (loaded.bytes, loaded.bytes)
        return dict(model.shards), loaded

    def keep(self) -> Written:
        """Load from the source, and write the shard."""
        _, loaded = self.load()
        assert loaded.writer is not None, f"loaded from {loaded.origin}"
        return loaded.writer.write()


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name
