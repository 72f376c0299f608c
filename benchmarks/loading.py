"""Sharded loading: what each rank of a layout reads of a checkpoint, its peak of host memory, and its time.

    python benchmarks/loading.py [--layouts tensor=4 pipeline=2,tensor=2 ...] [--megabytes 1024] [--json]

Makes a dense checkpoint and one of many small experts, both bfloat16 and random, in a temporary folder. Every rank
loads in a process of its own, one after the other, from the page cache. read: what it took of the files, in rows by
read, in columns from a mapping (of which a cold disk brings whole pages, once for all ranks of a host). peak: the most
that was resident while the model was built and loaded, mapped pages included, less Python and torch before it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1]))  # for tests.tiny

from models.config import read_model_config
from models.registry import build_model
from models.tables import parameter_bytes
from parallel.context import ParallelContext
from parallel.degrees import Degrees
from tests.tiny import make_checkpoint
from worker.loader import load_weights

BFLOAT16_BYTES = 2
HEADS = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32_000}
DENSE = HEADS | {"hidden_size": 2048, "intermediate_size": 8192}
EXPERTS = HEADS | {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 64, "num_experts_per_tok": 8}
MODELS = {"dense": ("llama", DENSE, 126), "experts": ("qwen3-moe", EXPERTS, 629)}  # the last: MB in a layer
LAYOUTS = {
    "dense": ["tensor=1", "tensor=4", "pipeline=4", "pipeline=2,tensor=2"],
    "experts": ["tensor=4", "data=2,tensor=2,expert=4", "pipeline=2,data=2,expert=2", "pipeline=2,tensor=2"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="*", help="as degree=n,degree=n; several for each model unless given")
    parser.add_argument("--megabytes", type=int, default=1024, help="of weights in each checkpoint, about")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rank", nargs=3, metavar=("MODEL", "LAYOUT", "RANK"), help="load this one alone")
    options = parser.parse_args()
    if options.rank:
        directory, layout, rank = options.rank
        print(json.dumps(load(Path(directory), layout, int(rank))))
        return
    with tempfile.TemporaryDirectory(prefix="loading-") as folder:
        for name, (family, shape, layer_megabytes) in MODELS.items():
            layers = max(2, options.megabytes // layer_megabytes)
            directory = make_checkpoint(
                Path(folder) / name, family, num_hidden_layers=layers, dtype="bfloat16", **shape
            )
            file = directory / "model.safetensors"
            save_file({tensor: wide.bfloat16() for tensor, wide in load_file(file).items()}, file)
            for layout in options.layouts or LAYOUTS[name]:
                measure(directory, layout, options.json)


def measure(directory: Path, layout: str, as_json: bool) -> None:
    """One line for each rank of a layout."""
    for rank in range(degrees_of(layout).replica_ranks):
        command = [sys.executable, __file__, "--rank", str(directory), layout, str(rank)]
        answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        figures = json.loads(answer)
        if as_json:
            print(answer, end="", flush=True)
            continue
        mib = {what: figures[f"{what}_bytes"] / 2**20 for what in ("shard", "read", "peak")}
        sizes = "  ".join(f"{what} {size:7.1f} MiB" for what, size in mib.items())
        print(f"{directory.name:8} {layout:28} rank {rank}  {sizes}  {figures['took_s']:.2f} s", flush=True)


def load(directory: Path, layout: str, rank: int) -> dict[str, object]:
    """Builds the rank's model and loads it, in this process."""
    place, device = degrees_of(layout).place(rank), torch.device("cpu")
    torch.set_num_threads(1)
    config = read_model_config(directory)
    context = ParallelContext(epoch=1, device=device, dtype=torch.bfloat16, place=place)
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    resident, began_s = proc("VmRSS") * 1024, time.monotonic()
    model = build_model(config, context)
    read_bytes = load_weights(model, config, directory, context, lambda loaded_bytes, total_bytes: None)
    return {
        "benchmark": "loading",
        "model": directory.name,
        "checkpoint_bytes": (directory / "model.safetensors").stat().st_size,
        "layout": layout,
        "rank": rank,
        "shard_bytes": parameter_bytes(config, place, BFLOAT16_BYTES),
        "read_bytes": read_bytes,
        "peak_bytes": proc("VmHWM") * 1024 - resident,
        "took_s": round(time.monotonic() - began_s, 3),
    }


def proc(key: str) -> int:
    """A number that the kernel keeps of this process, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1])


def degrees_of(layout: str) -> Degrees:
    return Degrees(**{name: int(size) for name, size in (part.split("=") for part in layout.split(","))})


if __name__ == "__main__":
    main()
