"""Shard checkpoints: what a restore saves of loading, and what writing one costs the steps beside it.

    python benchmarks/shard_checkpoint.py [--store /dev/shm/echelon-bench] [--megabytes 1024] [--layout tensor=2]

Makes a dense random bfloat16 checkpoint in a temporary folder and loads rank 0 of a layout, all in this process and
from the page cache: from the source, and from its shard, the median of five each. Then steps of some milliseconds run
for a while alone and beside a writer: p50 and p99 of their time. One JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1]))  # for tests.tiny

from benchmarks.loading import DENSE, degrees_of
from tests.shards import KeepingRank
from tests.tiny import make_checkpoint
from worker.checkpoint.write import Written

LAYER_MEGABYTES = 126
REPEATS = 5
STEPS = 400
MATRIX, PRODUCTS = 256, 12  # of a step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, help="a new folder; in the temporary one unless given")
    parser.add_argument("--megabytes", type=int, default=1024, help="of weights in the checkpoint, about")
    parser.add_argument("--layout", default="tensor=2", help="as degree=n,degree=n")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="shard-") as folder, tempfile.TemporaryDirectory(dir=options.store) as own:
        layers = max(2, options.megabytes // LAYER_MEGABYTES)
        model = make_checkpoint(Path(folder) / "model", "llama", num_hidden_layers=layers, dtype="bfloat16", **DENSE)
        file = model / "model.safetensors"
        save_file({name: wide.bfloat16() for name, wide in load_file(file).items()}, file)
        rank = KeepingRank(model, None, degrees_of(options.layout).place(0), "bfloat16")
        print(json.dumps({"benchmark": "shard_checkpoint", "layout": options.layout} | measure(rank, Path(own))))


def measure(rank: KeepingRank, store: Path) -> dict[str, object]:
    """Seconds of loading, restoring and writing; milliseconds of steps."""
    source_s = statistics.median(rank.load()[1].took_s for _ in range(REPEATS))
    rank.store = store
    alone = steps(lambda: True)
    told: list[Written] = []
    _, loaded = rank.load()
    assert loaded.writer is not None
    loaded.writer.start(told.append)
    beside = steps(lambda: bool(told))
    assert told[0].bytes, told[0].reason
    restored = [rank.load()[1] for _ in range(REPEATS)]
    assert {each.origin for each in restored} == {"shard"}
    restored_s = statistics.median(each.took_s for each in restored)
    return {
        "shard_bytes": restored[0].bytes,
        "source_s": round(source_s, 3),
        "restored_s": round(restored_s, 3),
        "restored_gb_s": round(restored[0].bytes / restored_s / 1e9, 2),
        "written_beside_steps_s": round(told[0].took_s, 3),
        "step_ms_alone": alone,
        "step_ms_beside_the_writer": beside,
    }


def steps(ended: Callable[[], bool]) -> dict[str, float]:
    """At least so many, and until something has ended."""
    matrix = torch.randn(MATRIX, MATRIX)
    took_ms: list[float] = []
    while len(took_ms) < STEPS or not ended():
        began_s = time.monotonic()
        for _ in range(PRODUCTS):
            matrix = torch.tanh(matrix @ matrix)
        took_ms.append((time.monotonic() - began_s) * 1e3)
    cuts = statistics.quantiles(took_ms, n=100)
    return {"p50": round(cuts[49], 2), "p99": round(cuts[98], 2), "max": round(max(took_ms), 2), "count": len(took_ms)}


if __name__ == "__main__":
    main()
