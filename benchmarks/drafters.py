"""What guesses bring with and without CUDA graphs: greedy answers of the tiny model that ships, by each drafter.

    python -m benchmarks.drafters --device cuda --dtype bfloat16 [--layout tensor=2] [--drafters mtp off]

One cluster is reconfigured from case to case; prompts are asked one after the other, as there a guess pays surely. JSON
lines: tokens a second, tokens a step, guesses that came true, and how many answers are those of the first case, token
for token: all in float64; in bfloat16 a graph rounds the last bits otherwise, and a near tie may fall the other way.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # for examples.tiny

from echelon.bench.about import versions
from echelon.testing import LocalCluster
from examples.tiny import measuring, texts
from examples.tiny.show import DRAFTERS

WARM_TOKENS = 8
GRAPHS = {"cuda": ("auto", "off"), "cpu": ("off",)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=tuple(GRAPHS), default="cpu")
    parser.add_argument("--dtype", default="float64")
    parser.add_argument("--layout", default="tensor=1", help="as tensor=2,expert=2")
    parser.add_argument("--drafters", nargs="+", choices=tuple(DRAFTERS), default=tuple(DRAFTERS))
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128, help="of each answer")
    asked = parser.parse_args()
    layout: dict[str, Any] = {
        name: int(value) for name, _, value in (part.partition("=") for part in asked.layout.split(","))
    }
    prompts = texts.code_prompts(asked.prompts)
    first: tuple[tuple[int, ...], ...] = ()
    flags: dict[str, Any] = {"speculation": "off", "cuda_graphs": GRAPHS[asked.device][0], **layout}
    with LocalCluster(texts.MODEL, device=asked.device, dtype=asked.dtype, **flags) as cluster:
        print(
            json.dumps({"benchmark": "drafters", "layout": asked.layout, "device": asked.device, **versions()}),
            flush=True,
        )
        for drafter in asked.drafters:
            for graphs in GRAPHS[asked.device]:
                cluster.reconfigure(speculation=drafter, cuda_graphs=graphs)
                measuring.ask(cluster.client(), prompts, WARM_TOKENS)
                found = measuring.decode(cluster, prompts, asked.tokens)
                first = first or found.answers
                same = sum(map(tuple.__eq__, found.answers, first))
                per_s = {"tokens_per_s": round(found.tokens / found.seconds, 1), "same_answers": same}
                print(json.dumps({"drafter": drafter, "graphs": graphs, **found.figures(), **per_s}), flush=True)


if __name__ == "__main__":
    main()
