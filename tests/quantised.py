"""Checkpoints of 8 bit floats beside what they stand for: number by number, written down a second time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from examples.quantize_fp8 import Block, quantise_checkpoint
from tests.tiny import make_checkpoint


def make_quantised(
    directory: Path, family: str, block: Block, *, shards: int = 1, **overrides: Any
) -> tuple[Path, Path]:
    """A tiny checkpoint of 8 bit floats, and a plain one in float32 of what those stand for."""
    source = make_checkpoint(directory / "source", family, shards=shards, **overrides)
    quantise_checkpoint(source, directory / "float8", block)
    shutil.copytree(source, directory / "plain")
    for file in (directory / "float8").glob("*.safetensors"):
        save_file(dequantised(load_file(file), block), directory / "plain" / file.name, metadata={"format": "pt"})
    return directory / "float8", directory / "plain"


def dequantised(tensors: dict[str, Tensor], block: Block) -> dict[str, Tensor]:
    """Every number times the scale of the block that it lies in."""
    suffix = "_scale" if block is None else "_scale_inv"
    plain = {name: tensor for name, tensor in tensors.items() if not name.endswith(suffix)}
    for name, tensor in plain.items():
        if tensor.dtype != torch.float8_e4m3fn:
            continue
        scales, numbers = tensors[name + suffix], tensor.float()
        for row in range(tensor.shape[0]):
            for column in range(tensor.shape[1]):
                scale = scales[0] if block is None else scales[row // block[0], column // block[1]]
                numbers[row, column] *= scale
        plain[name] = numbers
    return plain


def change_config(directory: Path, **quantization: object) -> Path:
    """Keys of quantization_config; None takes one away."""
    path = directory / "config.json"
    values = json.loads(path.read_text())
    changed = values["quantization_config"] | quantization
    values["quantization_config"] = {key: value for key, value in changed.items() if value is not None}
    path.write_text(json.dumps(values))
    return directory
