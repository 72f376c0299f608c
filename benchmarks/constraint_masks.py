"""Constraints: what a step waits for beside the forward pass, in microseconds, with a large vocabulary.

    python benchmarks/constraint_masks.py [--vocabulary 131072] [--rows 1 16 64 256] [--threads 1] [--json]

A byte-level BPE vocabulary is trained on the interpreter's own libraries. Each step takes the last id of every row and
fills its next mask (`follow`, in the matchers' thread while the device computes), then carries the masks to the device
and bars what they forbid (`apply`). Ids are drawn at random among the allowed ones: text like no model writes, which
takes a matcher through many states. Prints medians as a table with the versions, or as JSON lines.
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
from collections.abc import Callable, Iterator
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
    "regex": compile_constraint("regex", r"[A-Za-z ,.]{40,400}"),
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
    """Seconds of each step from its beginning to its masks, and the last masks. Answers that end begin anew."""
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
        begin = time.perf_counter()
        following = matchers.begin(tables, range(rows))
        assert following is not None
        masks = following.result()
        seconds.append(time.perf_counter() - begin)
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

    def once() -> None:
        Allowed(places, upload_one(masks.bits, device))(scores)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return timed(once, steps)


def timed(call: Callable[[], object], times: int) -> list[float]:
    call()
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return seconds


def _bits(mask: np.ndarray[tuple[int], np.dtype[np.int32]]) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.unpackbits(mask.view(np.uint8), bitorder="little")


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, object]]:
    device = torch.device(arguments.device)
    with tempfile.TemporaryDirectory() as folder:
        train(arguments.vocabulary, Path(folder))

        def read() -> LLTokenizer:
            return constraint_tokenizer(Path(folder), arguments.vocabulary, (END,))

        begin = time.perf_counter()
        vocabulary = read()
        yield {
            "figure": "read_vocabulary",
            "vocabulary": vocabulary.vocab_size,
            "ms": _rounded(time.perf_counter() - begin, 1e3),
        }
        matchers = Matchers(lambda: vocabulary, arguments.threads)
        for name, grammar in GRAMMARS.items():
            for rows in arguments.rows:
                steps = max(20, arguments.row_steps // rows)
                followed, masks = follow(matchers, grammar, rows, steps)
                applied = statistics.median(apply(masks, arguments.vocabulary, device, 10))
                median = statistics.median(followed)
                yield {
                    "figure": "masks",
                    "constraint": name,
                    "rows": rows,
                    "follow_us": _rounded(median, 1e6),
                    "follow_us_per_row": _rounded(median / rows, 1e6),
                    "follow_us_p99": _rounded(statistics.quantiles(followed, n=100)[98], 1e6),
                    "apply_us": _rounded(applied, 1e6),
                }


def _rounded(seconds: float, unit: float) -> float:
    return round(seconds * unit, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=131_072)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--row-steps", type=int, default=10_000, help="rows times steps of each measurement")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    packages = ("llguidance", "tokenizers", "torch", "numpy")
    setting = {
        "benchmark": "constraint_masks",
        "vocabulary": arguments.vocabulary,
        "threads": arguments.threads,
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu",
        "cores": os.cpu_count(),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
    }
    print(json.dumps(setting))
    for figures in measure(arguments):
        if arguments.json:
            print(json.dumps(figures), flush=True)
        else:
            print("  ".join(f"{name} {value:>10}" for name, value in figures.items()), flush=True)


if __name__ == "__main__":
    main()
