"""Constraints: what their masks cost in each step, with a large vocabulary.

    python benchmarks/constraint_masks.py [--vocabulary 131072] [--rows 1 16 64 256] [--device cpu] [--json]

A byte-level BPE vocabulary is trained on the interpreter's own libraries. Each step takes the last id of every row and
fills its next mask (follow: CPU time, of the matchers' thread while the device computes), then carries the masks to the
device and bars what they forbid (apply: CPU time, or time on CUDA). Ids are drawn at random among the allowed ones: no
model writes such text, and it takes a matcher through many states. Prints a table with the versions, or JSON lines.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from llguidance import LLTokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from echelon.internal.link import Fence, Sampling
from models.constraints import compile_constraint, constraint_tokenizer
from worker.logit_rules import Allowed
from worker.matchers import Masks, Matchers
from worker.plan import Admit, Row, StepPlan, decode, encode
from worker.upload import upload_one

CORPUS_CHARACTERS = 60_000_000
END = 0
COLUMN = 24
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 60},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 8},
        "kind": {"enum": ["person", "robot", "other"]},
    },
    "required": ["name", "age", "tags", "kind"],
    "additionalProperties": False,
}
GRAMMARS = {
    "json_schema": compile_constraint("json_schema", json.dumps(SCHEMA)),
    "json_object": compile_constraint("json_object", True),
    "regex of a date": compile_constraint("regex", r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z"),
    "regex of a text": compile_constraint("regex", r"[A-Za-z ,.]{40,400}"),
}


class DrawnIds:
    """A step's ids, as the runner's pending step gives them to the matchers."""

    def __init__(self, ids: list[int]) -> None:
        self._ids = ids

    def id_of(self, row: int) -> int:
        return self._ids[row]


def corpus() -> Iterator[str]:
    left = CORPUS_CHARACTERS
    for folder in ("stdlib", "purelib"):
        for file in sorted(Path(sysconfig.get_paths()[folder]).rglob("*.py")):
            text = file.read_text(encoding="utf-8", errors="replace")
            left -= len(text)
            if left < 0:
                return
            yield text


def train(vocabulary: int, directory: Path) -> None:
    """A tokenizer.json of so many ids; the first one ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.save(str(directory / "tokenizer.json"))


def follow(matchers: Matchers, grammar: str, rows: int, steps: int) -> tuple[list[float], Masks]:
    """Seconds of CPU time of each step, until its masks are there; and the last masks. Answers that end begin anew."""
    random = np.random.default_rng(1)
    sampling = Sampling(1.0, 1.0, 0, 100, 0, stop_token_ids=(END,), grammar=grammar)
    positions = [0] * rows
    ended = set(range(rows))
    seconds = []
    for step in range(1, steps + 2):
        positions = [0 if slot in ended else position + 1 for slot, position in enumerate(positions)]
        admits = tuple(Admit(slot, 0, 1, sampling) for slot in sorted(ended))
        planned = [Row(slot, positions[slot], 1, (5,) if slot in ended else None, True) for slot in range(rows)]
        tables = decode(encode(StepPlan(Fence(0, 0, 0), step, admits, rows=tuple(planned))))
        begin = time.process_time()
        following = matchers.begin(tables, range(rows))
        assert following is not None
        masks = following.result()
        seconds.append(time.process_time() - begin)
        ids = [int(random.choice(np.flatnonzero(_bits(mask)))) for mask in masks.bits]
        for slot, constraint in matchers.of(range(rows)).items():
            constraint.drawn = (DrawnIds(ids), slot)
        ended = {slot for slot, token in enumerate(ids) if token == END}
    return seconds[1:], masks


def apply(masks: Masks, vocabulary: int, device: torch.device, steps: int) -> list[float]:
    """Seconds to bring masks to the device and bar what they forbid, on float64 scores."""
    rows = len(masks.bits)
    scores = torch.randn(rows, vocabulary, dtype=torch.float64, device=device)
    places = torch.arange(rows, device=device)

    clock = time.perf_counter if device.type == "cuda" else time.process_time
    seconds = []
    for _ in range(steps + 1):
        begin = clock()
        Allowed(places, upload_one(masks.bits, device))(scores)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(clock() - begin)
    return seconds[1:]


def _bits(mask: np.ndarray[tuple[int], np.dtype[np.int32]]) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.unpackbits(mask.view(np.uint8), bitorder="little")


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, object]]:
    device = torch.device(arguments.device)
    with tempfile.TemporaryDirectory() as folder:
        train(arguments.vocabulary, Path(folder))

        def read() -> LLTokenizer:
            return constraint_tokenizer(Path(folder), arguments.vocabulary, (END,))

        begin = time.process_time()
        vocabulary = read()
        yield {"read_vocabulary_ms": round((time.process_time() - begin) * 1e3, 1)}
        matchers = Matchers(lambda: vocabulary, threads=1)
        for name, grammar in GRAMMARS.items():
            for rows in arguments.rows:
                steps = max(20, arguments.row_steps // rows)
                followed, masks = follow(matchers, grammar, rows, steps)
                applied = apply(masks, arguments.vocabulary, device, 10)
                yield {
                    "constraint": name,
                    "rows": rows,
                    "follow_us_per_row_median": _us(statistics.median(followed) / rows),
                    "follow_us_per_row_mean": _us(statistics.fmean(followed) / rows),
                    "follow_us_p99": _us(statistics.quantiles(followed, n=100)[98]),
                    "apply_us_median": _us(statistics.median(applied)),
                }


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 1)


def print_row(figures: dict[str, object], header: bool) -> None:
    if header:
        print("  ".join(f"{name:>{COLUMN}}" for name in figures))
    print("  ".join(f"{value:>{COLUMN}}" for value in figures.values()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=131_072)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--row-steps", type=int, default=10_000, help="rows times steps of each measurement")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    packages = ("llguidance", "tokenizers", "torch", "numpy")
    setting = {
        "benchmark": "constraint_masks",
        "vocabulary": arguments.vocabulary,
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu",
        "cores": os.cpu_count(),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
    }
    print(json.dumps(setting))
    rows = 0
    for figures in measure(arguments):
        if arguments.json or len(figures) == 1:
            print(json.dumps(figures), flush=True)
        else:
            print_row(figures, header=not rows)
            rows += 1


if __name__ == "__main__":
    main()
