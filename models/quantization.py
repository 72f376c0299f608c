"""Quantised checkpoints: 8 bit floats with a scale for each block of a matrix, as config.json and the files have them.

Read by the coordinator, which refuses what cannot be read, and by the loader of every rank, which multiplies. Which
tensors are quantised is what their files say: those that are stored as 8 bit floats. It knows no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from echelon.errors import ConfigError
from models.json_source import JsonSource
from models.stored import FLOAT8, StoredTensor
from parallel.sharding import Region, Shape

Block = tuple[int, int]

# Of blocks, and of all else that is computed, with which keeping 8 bit floats was measured to be faster.
KEPT_BLOCK, KEPT_DTYPE = (128, 128), "bfloat16"
SCALE_DTYPES = ("F32", "BF16", "F16")

_SUPPORTED = (
    "supported: fp8 with fmt e4m3 (weight_block_size, or one scale a tensor), and compressed-tensors with weights of 8 "
    "bit floats; or give an unquantised checkpoint"
)
_REMEDY = "download the checkpoint again, or give an unquantised one"
_WEIGHT = ".weight"
_SCALES = ("weight_scale_inv", "weight_scale")  # in its place: DeepSeek's and transformers', all others'


@dataclass(frozen=True, slots=True)
class Quantization:
    """rows and columns: of a block of a matrix, which is multiplied by one scale; None for all of the matrix.

    kept: matrices stay 8 bit floats on the device, those of blocks. kind: what their scales are called.
    """

    rows: int | None = None
    columns: int | None = None
    kept: bool = False
    kind: str = "weight_scale_inv"

    @property
    def held(self) -> Block | None:
        """Rows and columns of a block of what stays 8 bit floats; None where nothing does."""
        return (self.rows, self.columns) if self.kept and self.rows and self.columns else None

    def scales_name(self, name: str) -> str:
        """Of the scales of a matrix."""
        return f"{name.removesuffix(_WEIGHT)}.{self.kind}"

    def blocks(self, shape: Shape) -> tuple[int, int]:
        """Rows and columns of a block of a matrix; of a smaller one at its end."""
        return self.rows or shape[0], self.columns or shape[1]

    def scales(self, name: str, stored: StoredTensor, index: Mapping[str, StoredTensor]) -> StoredTensor:
        """The scales of a quantised tensor, [rows of blocks, columns of blocks]. Raises ConfigError."""
        if len(stored.shape) != 2 or not name.endswith(_WEIGHT):
            raise _refusal(
                stored.file, f"{name} of shape {stored.shape} is stored as {FLOAT8}, which only a matrix may be"
            )
        names = [f"{name.removesuffix(_WEIGHT)}.{scale}" for scale in _SCALES]
        scale = next((scale for scale in names if scale in index), None)
        if scale is None:
            either = " or ".join(names)
            raise _refusal(stored.file, f"{name} is stored as {FLOAT8}, and no file holds its scales {either}")
        found, (rows, columns) = index[scale], self.blocks(stored.shape)
        grid = math.ceil(stored.shape[0] / rows), math.ceil(stored.shape[1] / columns)
        if math.prod(found.shape) != math.prod(grid) or (len(found.shape) == 2 and found.shape != grid):
            blocks = f"blocks of {rows} x {columns} of {stored.shape}"
            raise _refusal(found.file, f"{scale} has shape {found.shape}, expected {grid} for {blocks}")
        if found.dtype not in SCALE_DTYPES:
            supported = ", ".join(SCALE_DTYPES)
            raise _refusal(found.file, f"{scale} is stored as {found.dtype}; supported: {supported}")
        return replace(found, shape=grid)


class Scaled(NamedTuple):
    """Scales that cover a region of a matrix: the region of theirs, and where the first block of it begins."""

    region: Region
    first_row: int
    first_column: int


def covering(region: Region, blocks: tuple[int, int]) -> Scaled:
    """Which scales a region of a matrix needs, wherever it was cut."""
    rows, columns = (_covering(part, length) for part, length in zip(region, blocks, strict=True))
    return Scaled((rows, columns), rows.start * blocks[0], columns.start * blocks[1])


def _covering(part: slice, length: int) -> slice:
    first = part.start // length
    return slice(first, math.ceil(part.stop / length) if part.stop > part.start else first)


def read_quantization(config: JsonSource, keep: bool = False) -> Quantization | None:
    """quantization_config of config.json, None for a checkpoint that is not quantised. Raises ConfigError.

    keep: matrices shall stay 8 bit floats, for which each needs scales of blocks.
    """
    found = _read(config)
    if not keep:
        return found
    if found is None or found.rows is None or found.columns is None:
        has = "no quantization_config" if found is None else "one scale for a tensor or a channel"
        config.refuse(f"{has}: only matrices with scales of blocks are kept as 8 bit floats; leave --float8 kept out")
    return replace(found, kept=True)


def _read(config: JsonSource) -> Quantization | None:
    keys = config.table("quantization_config")
    match keys.get("quant_method"):
        case None:
            return None
        case "fp8":
            return _fp8(keys)
        case "compressed-tensors":
            return _compressed_tensors(keys)
        case method:
            config.refuse(f"quantization_config.quant_method={method!r} is not supported; {_SUPPORTED}")


def _fp8(keys: JsonSource) -> Quantization:
    """DeepSeek's, with a scale a block, and that of one scale a tensor."""
    if (form := keys.get("fmt", "e4m3")) != "e4m3":
        keys.refuse(f"quantization_config.fmt={form!r} is not supported; {_SUPPORTED}")
    block = keys.get("weight_block_size")
    if block is None:
        return Quantization()
    return Quantization(*_block(keys, "weight_block_size", block))


def _compressed_tensors(keys: JsonSource) -> Quantization:
    """All groups must be quantised alike: which tensors are in which is not looked up."""
    found = {_group(JsonSource(keys.path, group)) for group in _groups(keys)}
    if (status := keys.get("quantization_status", "compressed")) != "compressed":
        keys.refuse(f"quantization_config.quantization_status={status!r} is not supported; {_SUPPORTED}")
    if len(found) != 1:
        keys.refuse(f"quantization_config.config_groups quantise weights in {len(found)} ways; one is supported")
    return found.pop()


def _groups(keys: JsonSource) -> list[Mapping[str, object]]:
    groups: list[Mapping[str, object]] = [
        group for group in keys.table("config_groups").values.values() if isinstance(group, dict)
    ]
    if not groups:
        keys.refuse("quantization_config.config_groups has no group")
    return groups


def _group(group: JsonSource) -> Quantization:
    weights = group.table("weights")
    for key, wanted in (("type", "float"), ("num_bits", 8), ("symmetric", True), ("dynamic", False)):
        if (value := weights.get(key, wanted)) != wanted:
            group.refuse(f"quantization_config: weights.{key}={value!r} is not supported; {_SUPPORTED}")
    match weights.get("strategy", "tensor"):
        case "tensor":
            return Quantization()
        case "channel":
            return Quantization(rows=1)
        case "block":
            block = _block(weights, "block_structure", weights.get("block_structure"))
            return Quantization(*block, kind="weight_scale")
        case strategy:
            supported = "supported: tensor, channel, block"
            group.refuse(f"quantization_config: weights.strategy={strategy!r} is not supported; {supported}")


def _block(keys: JsonSource, key: str, value: object) -> tuple[int, int]:
    match value:
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
    keys.refuse(f"quantization_config: {key} must be two integers > 0, found {value!r}")


def _refusal(file: Path, problem: str) -> ConfigError:
    return ConfigError(f"{file}: {problem}; {_REMEDY}", field="model")
