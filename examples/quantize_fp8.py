"""Writes a checkpoint of 8 bit floats from another one, as DeepSeek publishes them: a scale for each block of a matrix.

    python examples/quantize_fp8.py DIR NEW_DIR                            blocks of 128 x 128
    python examples/quantize_fp8.py DIR NEW_DIR --block 64 256
    python examples/quantize_fp8.py DIR NEW_DIR --one-scale                compressed-tensors, a scale a tensor

Matrices of attention, MLPs and experts are quantised; embedding, head, norms, routers and layers for multi-token
prediction stay as they are. The scale of a block is its greatest number over 448, the greatest that e4m3 has. One
tensor is in memory at a time and a file of them on its way out.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from models.config import ModelConfig, read_model_config
from models.files import INDEX_FILE, checkpoint_index
from models.tables import is_of_prediction, parameter_table, router_name

FLOAT8 = torch.float8_e4m3fn
GREATEST = torch.finfo(FLOAT8).max

Block = tuple[int, int] | None


def quantise(weight: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """A matrix [rows, columns], and the scales of its blocks [rows of blocks, columns of blocks] float32, or [1]."""
    (height, width), (rows, columns) = weight.shape, block or weight.shape
    padded = F.pad(weight.float(), (0, -width % columns, 0, -height % rows))
    blocks = padded.view(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
    greatest = blocks.abs().amax((1, 3), keepdim=True)
    scales = torch.where(greatest > 0, greatest / GREATEST, 1.0)
    values = (blocks / scales).clamp(-GREATEST, GREATEST).to(FLOAT8).view(padded.shape)
    return values[:height, :width], scales.view(1) if block is None else scales[:, 0, :, 0]


def router_names(config: ModelConfig) -> list[str]:
    """What chooses experts, layer by layer."""
    return [router_name(config, n) for n, layer in enumerate(config.layers) if layer.routing is not None]


def quantised_names(config: ModelConfig) -> set[str]:
    """The matrices of layers, less what chooses experts."""
    matrices = (p for p in parameter_table(config) if p.layer is not None and len(p.shape) == 2)
    return {parameter.name for parameter in matrices} - set(router_names(config))


def plain_modules(source: Path, config: ModelConfig) -> list[str]:
    """Those that are left as they are: also the matrices of layers for multi-token prediction."""
    index = checkpoint_index(source)
    left = [name for name, tensor in index.items() if is_of_prediction(config, name) and len(tensor.shape) == 2]
    return ["lm_head", *(name.removesuffix(".weight") for name in [*router_names(config), *left])]


def quantization_config(block: Block, plain: list[str]) -> dict[str, object]:
    """What config.json then says: how, and which modules are not, for readers that do not see it."""
    if block is not None:
        return {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "modules_to_not_convert": plain,
            "quant_method": "fp8",
            "weight_block_size": list(block),
        }
    weights = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": plain,
    }


def quantise_file(source: Path, target: Path, names: set[str], block: Block) -> list[str]:
    """One file of weights; the names of the tensors that the new one holds."""
    suffix = "_scale" if block is None else "_scale_inv"
    tensors: dict[str, Tensor] = {}
    with safe_open(source, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - no mapping
            tensor = file.get_tensor(name)
            if name in names:
                tensors[name], tensors[f"{name}{suffix}"] = quantise(tensor, block)
            else:
                tensors[name] = tensor
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target, metadata={"format": "pt"})
    return list(tensors)


def quantise_checkpoint(source: Path, target: Path, block: Block) -> None:
    """The whole directory. Raises ConfigError for a model that cannot be read."""
    config = read_model_config(source)
    if config.quantization is not None:
        raise SystemExit(f"{source} is quantised already")
    if target.is_dir() and any(target.iterdir()):
        raise SystemExit(f"{target} is not empty; give a new folder")  # least of all the source itself
    target.mkdir(parents=True, exist_ok=True)
    names = quantised_names(config)
    weight_map: dict[str, str] = {}
    for path in sorted(source.iterdir()):
        if path.suffix == ".safetensors":
            held = quantise_file(path, target / path.name, names, block)
            weight_map |= dict.fromkeys(held, path.name)
        elif path.is_file() and path.name not in ("config.json", INDEX_FILE):
            shutil.copy(path, target / path.name)
    said = quantization_config(block, plain_modules(source, config))
    values = json.loads((source / "config.json").read_text(encoding="utf-8"))
    write_json(target / "config.json", {**values, "quantization_config": said})
    if (source / INDEX_FILE).exists():
        write_json(target / INDEX_FILE, {"metadata": {}, "weight_map": weight_map})


def write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--block", type=int, nargs=2, default=(128, 128), metavar=("ROWS", "COLUMNS"))
    parser.add_argument("--one-scale", action="store_true", help="of each tensor, as compressed-tensors writes it")
    options = parser.parse_args()
    rows, columns = options.block
    if min(rows, columns) < 1:
        parser.error(f"--block {rows} {columns}: a block has a row and a column at least")
    quantise_checkpoint(options.source, options.target, None if options.one_scale else (rows, columns))
    size = sum(file.stat().st_size for file in options.target.glob("*.safetensors"))
    print(f"{options.target} {math.ceil(size / 1e6)} MB")


if __name__ == "__main__":
    main()
