"""What the tiny model that ships is worth, through a whole cluster: JSON lines, and the heat map of its experts.

    python benchmarks/tiny_model.py [--output FILE.jsonl] [--pictures docs] [--only perplexity | drafts]

On four CPU ranks, tensor 2, expert 2, pipeline 2. Perplexity of its held-out text beside transformers', in float32 and
in the checkpoint's bfloat16; bits per byte beside gzip's and xz's; how evenly experts are chosen, and for what; then
greedy answers to beginnings of held-out code with each drafter, in float64, where they must be the same. Ends with 1
where a figure is not what the model is there to show.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for examples.tiny

from echelon.cli.trace.drawing import to_png
from echelon.testing import LocalCluster
from echelon.types import ExpertLoad
from examples.tiny import measuring, specialists, texts
from examples.tiny.evaluate import compressed_bits_per_byte
from examples.tiny.held_out import TEXT
from examples.tiny.show import DRAFTERS, LEAST_TOKENS_PER_STEP, MOST_PERPLEXITY_ERROR
from examples.tiny.sources import PYTHON, Document

ROOT = Path(__file__).parents[1]
LAYOUT: Mapping[str, Any] = {"tensor": 2, "expert": 2, "pipeline": 2}
PICTURE = "tiny-experts.png"
PROMPTS, TOKENS = 24, 48
BFLOAT16_DOCUMENTS = 6
ALL_TEXT = "all held-out text"


class Results:
    """Lines on standard output, and in a file if there is one; and what was not as it should be."""

    def __init__(self, output: Path | None) -> None:
        self._output = output
        self.problems: list[str] = []

    def line(self, **figures: object) -> None:
        text = json.dumps(figures, ensure_ascii=False)
        print(text, flush=True)
        if self._output is not None:
            with self._output.open("a", encoding="utf-8") as file:
                file.write(f"{text}\n")

    def check(self, fine: bool, problem: str) -> None:
        if not fine:
            self.problems.append(problem)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="file to which the lines are added")
    parser.add_argument("--pictures", type=Path, default=ROOT / "docs", help="folder for the heat map")
    parser.add_argument("--only", choices=("perplexity", "drafts"), help="perplexity with experts, or drafts")
    options = parser.parse_args()
    results = Results(options.output)
    results.line(**circumstances())
    flags = {"served_model_name": "tiny", "heartbeat_s": measuring.HEARTBEAT_S, **LAYOUT}
    with LocalCluster(model=texts.MODEL, dtype="float32", **flags) as cluster:
        if options.only != "drafts":
            foretold(results, cluster, options.pictures / PICTURE)
        if options.only != "perplexity":
            drafts(results, cluster)
    for problem in results.problems:
        print(f"not as it should be: {problem}", file=sys.stderr)
    return 1 if results.problems else 0


def circumstances() -> dict[str, object]:
    """Where and when this was measured."""
    return {
        "benchmark": "tiny_model",
        "date": datetime.date.today().isoformat(),
        "layout": LAYOUT,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "transformers", "ray")},
    }


def foretold(results: Results, cluster: LocalCluster, picture: Path) -> None:
    """Perplexity in both dtypes, and the experts that were chosen for it."""
    documents = texts.held_out()
    bits = compressed(results, documents)
    perplexity(results, cluster, documents, "float32", bits)
    load = expert_load(results, cluster)
    cluster.reconfigure(dtype="bfloat16")
    perplexity(results, cluster, dict(list(documents.items())[:BFLOAT16_DOCUMENTS]), "bfloat16", bits)
    cluster.reconfigure(dtype="float64")
    kinds(results, cluster, load, picture)


def compressed(results: Results, documents: Mapping[str, str]) -> tuple[float, float]:
    """Of gzip -9 and xz -9e over all documents as one file."""
    gzipped, xzipped = compressed_bits_per_byte([Document(PYTHON, path, text) for path, text in documents.items()])
    results.line(measure="bits_per_byte", gzip_9=round(gzipped, 4), xz_9e=round(xzipped, 4))
    return gzipped, xzipped


def perplexity(
    results: Results, cluster: LocalCluster, documents: Mapping[str, str], dtype: str, bits: tuple[float, float]
) -> None:
    """By the cluster and by transformers, over the same windows."""
    found = measuring.evaluate(cluster.target, texts.MODEL / TEXT, len(documents))
    theirs = measuring.transformers_score(texts.MODEL, documents.values(), getattr(torch, dtype))
    off = found["perplexity"] / theirs.perplexity - 1
    results.line(
        measure="perplexity",
        dtype=dtype,
        **found,
        transformers_perplexity=theirs.perplexity,
        transformers_accuracy=theirs.accuracy,
        transformers_scored_tokens=theirs.scored,
        off_by=off,
    )
    results.check(theirs.scored == found["scored_tokens"], "transformers scored other tokens")
    if dtype == "float32":
        results.check(abs(off) < MOST_PERPLEXITY_ERROR, f"the perplexity is {100 * off:.3f} % off transformers'")
        results.check(found["bits_per_byte"] < min(bits) / 1.5, "gzip or xz is nearly as good")


def expert_load(results: Results, cluster: LocalCluster) -> list[ExpertLoad]:
    """Of the held-out text that was just measured."""
    loads = measuring.loads(cluster)
    for load in loads:
        results.line(
            measure="expert_load",
            layer=load.layer,
            rows=load.rows,
            max_over_mean=round(load.max_over_mean, 4),
            rank_max_over_mean=round(load.rank_max_over_mean, 4),
        )
    return loads


def kinds(results: Results, cluster: LocalCluster, load: list[ExpertLoad], picture: Path) -> None:
    """Which experts take which kind of text; two halves of one kind, as far apart as chance has them."""
    found = texts.kinds()
    halves = {"one half of the code": found["code"][::2], "the other half": found["code"][1::2]}
    read = measuring.loads_by_kind(cluster, {name: found[name] for name in found if name != "code"} | halves)
    one, other = (read.pop(name) for name in halves)
    code = {layer: tuple(map(sum, zip(one[layer], other[layer], strict=True))) for layer in one}
    choices = {ALL_TEXT: {layer.layer: layer.rows for layer in load}, "code": code, **read}
    for specialist in specialists.specialists(choices):
        rows = choices[specialist.kind]
        apart = specialists.differing(choices, "code", specialist.kind)
        results.line(
            measure="experts_by_kind",
            kind=specialist.kind,
            choices=sum(map(sum, rows.values())),
            from_code=round(apart, 4),
            most_of_it=f"layer {specialist.layer}, expert {specialist.expert}: {specialist.heat:.2f} of an even share",
            rows=rows,
        )
    chance = specialists.differing({"one": one, "other": other}, "one", "other")
    results.line(measure="experts_by_kind", kind="two halves of the code", from_each_other=round(chance, 4))
    busiest = max(layer.max_over_mean for layer in load)
    title = f"Experts of the tiny model by kind of text; over all, the busiest of a layer has {busiest:.2f} of the mean"
    picture.write_bytes(to_png(specialists.draw_kinds(choices, title)))


def drafts(results: Results, cluster: LocalCluster) -> None:
    """Greedy answers to the same prompts, with each drafter and without."""
    prompts = texts.code_prompts(PROMPTS)
    decoded: dict[str, measuring.Decoded] = {}
    for drafter in DRAFTERS:
        cluster.reconfigure(dtype="float64", speculation=drafter)
        decoded[drafter] = measuring.decode(cluster, prompts, TOKENS)
        same = decoded[drafter].answers == decoded["mtp"].answers
        results.line(measure="drafts", drafter=drafter, prompts=PROMPTS, same_tokens=same, **decoded[drafter].figures())
        results.check(same, f"answers with drafter {drafter} are others")
    gained = decoded["mtp"].tokens_per_step
    results.check(gained > LEAST_TOKENS_PER_STEP, f"{gained:.2f} tokens a step with the model's own drafts")


if __name__ == "__main__":
    raise SystemExit(main())
