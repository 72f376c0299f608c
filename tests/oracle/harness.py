"""Drives Echelon's models directly, without scheduler or sampler, and returns log-probabilities to compare.

Batches are built here on their own: blocks lie scattered, the cache starts full of NaN, and every position is
sampled. `python -m tests.oracle.harness JOB.json TENSOR ADDRESS RANK` is one more rank over gloo.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.batch import ForwardBatch, PrefillRow
from models.config import read_model_config
from models.decoder import DecoderModel
from models.registry import build_model
from parallel.comm import Group
from parallel.context import ParallelContext
from parallel.degrees import Degrees
from parallel.mesh import close, form_context, open_store
from worker.kv_cache import KVCache
from worker.loader import load_weights

BLOCK_TOKENS = 4
NUM_BLOCKS = 64
CHUNK_TOKENS = 7
ROOT = Path(__file__).parents[2]

Arrays = dict[str, npt.NDArray[np.float64]]


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive tokens of one sequence; a single one after the first is a decode row."""

    sequence: int
    first: int
    tokens: int

    @property
    def decodes(self) -> bool:
        return self.first > 0 and self.tokens == 1


class Driver:
    """Feeds sequences to one rank's model, piece by piece."""

    def __init__(self, model: DecoderModel, cache: KVCache, group: Group, sequences: list[list[int]]) -> None:
        self.model, self.cache, self.group, self.sequences = model, cache, group, sequences
        scattered = iter(np.random.default_rng(1).permutation(cache.num_blocks).tolist())
        self.block_tables: list[list[int]] = [
            list(itertools.islice(scattered, -(-len(ids) // BLOCK_TOKENS))) for ids in sequences
        ]
        for tensor in (*cache.keys, *cache.values):
            tensor.fill_(torch.nan)

    def logprobs(self, steps: Sequence[Sequence[Piece]]) -> list[Tensor]:
        """Log-probabilities after every token of each sequence, [tokens, vocabulary]."""
        rows: list[list[Tensor]] = [[] for _ in self.sequences]
        for step in steps:
            pieces = sorted(step, key=lambda piece: not piece.decodes)
            hidden = self.model(self._batch(pieces), self.cache)
            logits = self.group.all_gather(self.model.row_logits(hidden))[: len(hidden)]
            parts = torch.split(logits.double().log_softmax(-1), [piece.tokens for piece in pieces])
            for piece, part in zip(pieces, parts, strict=True):
                rows[piece.sequence].append(part)
        return [torch.cat(parts) for parts in rows]

    def _batch(self, pieces: Sequence[Piece]) -> ForwardBatch:
        tokens = [(p.sequence, p.first + i) for p in pieces for i in range(p.tokens)]
        decodes = [p for p in pieces if p.decodes]
        width = max((len(self._table(p)) for p in decodes), default=0)
        offsets = itertools.accumulate((p.tokens for p in pieces), initial=0)
        return ForwardBatch(
            token_ids=torch.tensor([self.sequences[s][position] for s, position in tokens], dtype=torch.int64),
            positions=torch.tensor([position for _, position in tokens], dtype=torch.int64),
            slot_mapping=torch.tensor([self._slot(s, position) for s, position in tokens], dtype=torch.int64),
            num_decode_rows=len(decodes),
            decode_block_tables=torch.tensor(
                [self._table(p) + [0] * (width - len(self._table(p))) for p in decodes], dtype=torch.int64
            ).reshape(len(decodes), width),
            decode_context_lens=torch.tensor([p.first + 1 for p in decodes], dtype=torch.int64),
            prefill=tuple(
                PrefillRow(offset, p.tokens, p.first + p.tokens, torch.tensor(self._table(p)))
                for p, offset in zip(pieces, offsets, strict=False)
                if not p.decodes
            ),
            sample_index=torch.arange(len(tokens)),
        )

    def _slot(self, sequence: int, position: int) -> int:
        return self.block_tables[sequence][position // BLOCK_TOKENS] * BLOCK_TOKENS + position % BLOCK_TOKENS

    def _table(self, piece: Piece) -> list[int]:
        return self.block_tables[piece.sequence][: -(-(piece.first + piece.tokens) // BLOCK_TOKENS)]


def whole_steps(lengths: Sequence[int]) -> list[list[Piece]]:
    """Every sequence at once, in one step."""
    return [[Piece(sequence, 0, length) for sequence, length in enumerate(lengths)]]


def chunked_steps(prompts: Sequence[int], lengths: Sequence[int]) -> list[list[Piece]]:
    """Prompts in chunks, then one token a step; sequences side by side, so that one decodes while another prefills."""
    queues = []
    for sequence, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        chunks = [Piece(sequence, first, min(CHUNK_TOKENS, prompt - first)) for first in range(0, prompt, CHUNK_TOKENS)]
        queues.append(chunks + [Piece(sequence, position, 1) for position in range(prompt, length)])
    return [[piece for piece in step if piece is not None] for step in itertools.zip_longest(*queues)]


def run_case(case: Mapping[str, Any], context: ParallelContext) -> Arrays:
    """Log-probabilities of both ways to feed the sequences, and what the rank read and holds."""
    directory, prompts, sequences = Path(case["directory"]), case["prompts"], case["sequences"]
    config = read_model_config(directory, case["max_context"])
    model = build_model(config, context)
    read_bytes = load_weights(model, config, directory, context, lambda loaded_bytes, total_bytes: None)
    cache = KVCache(config, context, NUM_BLOCKS, BLOCK_TOKENS)
    lengths = [len(ids) for ids in sequences]
    results: Arrays = {
        "read_bytes": np.array(read_bytes),
        "parameter_bytes": np.array(model.resident_bytes),
        "kv_bytes": np.array(cache.resident_bytes),
    }
    for way, steps in (("whole", whole_steps(lengths)), ("chunked", chunked_steps(prompts, lengths))):
        for sequence, rows in enumerate(Driver(model, cache, context.tensor, sequences).logprobs(steps)):
            results[f"{way}-{sequence}"] = rows.numpy()
    return results


def run_ranks(job: Path, tensor: int) -> list[Arrays]:
    """Runs every case of the job on `tensor` gloo ranks, this process being the first; the results of each."""
    store, address = open_store("127.0.0.1")
    command = [sys.executable, "-m", "tests.oracle.harness", str(job), str(tensor), address]
    others = [subprocess.Popen([*command, str(rank)], cwd=ROOT) for rank in range(1, tensor)]
    try:
        run_rank(job, tensor, address, 0)
        codes = [rank.wait(timeout=120) for rank in others]
    finally:
        for rank in others:
            rank.kill()
            rank.wait()
        del store
    assert not any(codes), f"ranks exited with {codes}"
    return [dict(np.load(job.with_suffix(f".{rank}.npz"))) for rank in range(tensor)]


def run_rank(job: Path, tensor: int, address: str, rank: int) -> None:
    """Runs every case of the job as one rank, and writes its arrays, keyed "case/what", beside the job."""
    place = Degrees(tensor=tensor).place(rank)
    context = form_context(address, "oracle", 1, place, torch.device("cpu"), torch.float64, timeout_s=120, come_s=120)
    results: Arrays = {}
    for name, case in json.loads(job.read_text()).items():
        results |= {f"{name}/{what}": array for what, array in run_case(case, context).items()}
    np.savez(job.with_suffix(f".{rank}.npz"), **results)  # type: ignore[arg-type]
    close(context)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_rank(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
