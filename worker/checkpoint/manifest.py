"""Where a rank's shard lies in the store, and its shard.json: what the shard holds, and what it was cut from.

In ranks, and in `echelon checkpoint`. A folder without a shard.json that names its weights holds no shard. Nothing here
is guessed at: whatever does not fit is told, and the source is loaded instead. It knows no torch and no weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.config import ModelConfig
from models.files import Stamp, weight_stamps
from models.tables import held_parameters
from parallel.degrees import Place
from parallel.sharding import Region, Shape

FORMAT = 1
MANIFEST_FILE = "shard.json"
DEGREES = ("pipeline", "data", "tensor", "expert", "redundant_experts")

Cut = tuple[tuple[tuple[int, int], ...], ...]  # the regions of a tensor, each as [start, stop) by dim


class UnfitShardError(Exception):
    """The shard cannot be used, or not written; the message says why, and names what is wrong."""


@dataclass(frozen=True, slots=True)
class ShardAddress:
    """Where the shard of one rank lies: root/{model digest}/{layout digest}/p0-d0-t1."""

    root: Path
    model_digest: str
    place: Place
    dtype: str

    @property
    def degrees(self) -> dict[str, int]:
        """Of a replica; replicas hold the same."""
        return {name: getattr(self.place.degrees, name) for name in DEGREES}

    @property
    def layout_digest(self) -> str:
        """16 hexadecimal digits for all that settles which rank holds what, in which dtype."""
        settled = {"format": FORMAT, "dtype": self.dtype, **self.degrees}
        return hashlib.sha256(json.dumps(settled, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def folder(self) -> Path:
        place = f"p{self.place.pipeline_rank}-d{self.place.data_rank}-t{self.place.tensor_rank}"
        return self.root / self.model_digest / self.layout_digest / place


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor as the rank holds it, and the parts of the source's that it is made of; crc32c of its bytes."""

    shape: Shape
    regions: Cut
    crc32c: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """shard.json. source: the stamps of the files of weights in the model's directory when the shard was cut."""

    model_digest: str
    layout_digest: str
    place: str
    degrees: Mapping[str, int]
    dtype: str
    model: str
    source: Mapping[str, Stamp]
    created_unix_s: float
    weights: str
    weights_bytes: int
    tensors: Mapping[str, TensorEntry]
    format: int = FORMAT

    def to_json(self) -> str:
        """`from_json` reads it back."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        tensors = {
            name: {"shape": entry.shape, "regions": entry.regions, "crc32c": f"{entry.crc32c:08x}"}
            for name, entry in self.tensors.items()
        }
        return json.dumps(fields | {"tensors": tensors}) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Manifest:
        """Raises UnfitShardError for what `to_json` does not write."""
        try:
            fields: dict[str, Any] = json.loads(text)
            tensors = {
                name: TensorEntry(tuple(entry["shape"]), _cut(entry["regions"]), int(entry["crc32c"], 16))
                for name, entry in fields.pop("tensors").items()
            }
            source = {name: (int(size), int(changed_ns)) for name, (size, changed_ns) in fields.pop("source").items()}
            return cls(tensors=tensors, source=source, **fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UnfitShardError(f"{MANIFEST_FILE} is broken: {error!r}") from error

    def check(self, address: ShardAddress, config: ModelConfig) -> None:
        """Raises UnfitShardError unless it speaks of this rank of this layout of this model."""
        wanted = {
            "format": FORMAT,
            "model_digest": address.model_digest,
            "layout_digest": address.layout_digest,
            "place": address.folder.name,
            "dtype": address.dtype,
        }
        for name, value in wanted.items():
            if (found := getattr(self, name)) != value:
                raise UnfitShardError(f"{MANIFEST_FILE} has {name} {found}, expected {value}")
        expected = cuts(config, address.place)
        found = {name: (entry.shape, entry.regions) for name, entry in self.tensors.items()}
        for name in expected.keys() | found.keys():
            if found.get(name) != expected.get(name):
                held = f"{found.get(name)}, this rank holds {expected.get(name)}"
                raise UnfitShardError(f"{MANIFEST_FILE} has {name} as {held}")

    def weights_in(self, folder: Path) -> Path:
        """The file of weights, which is there and as long as it was written. Raises UnfitShardError or OSError."""
        path = folder / self.weights
        if not path.exists():
            raise UnfitShardError(f"{path} is missing")
        if (size := path.stat().st_size) != self.weights_bytes:
            raise UnfitShardError(f"{path} is torn: {size} bytes, written were {self.weights_bytes}")
        return path

    def check_source(self, directory: Path) -> None:
        """Raises UnfitShardError if a file of the source's weights is not as it was; one that is gone says nothing."""
        for name, stamp in sorted(weight_stamps(directory).items()):
            if self.source.get(name) != stamp:
                changed = "has changed" if name in self.source else "has come"
                raise UnfitShardError(f"the source has changed: {directory / name} {changed} since the shard was cut")


def read_manifest(folder: Path) -> bytes | None:
    """shard.json as it lies there, None where there is none. Raises OSError."""
    try:
        return (folder / MANIFEST_FILE).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def cuts(config: ModelConfig, place: Place) -> dict[str, tuple[Shape, Cut]]:
    """What a rank holds before any expert is moved, by name: the shape, and the parts of the source's tensor."""
    return {
        parameter.name: (parameter.held_shape(place.degrees), cut_of(parameter.held_regions(place)))
        for parameter in held_parameters(config, place)
    }


def cut_of(regions: Iterable[Region]) -> Cut:
    return tuple(tuple((part.start, part.stop) for part in region) for region in regions)


def _cut(regions: Any) -> Cut:
    return tuple(tuple((int(start), int(stop)) for start, stop in region) for region in regions)
