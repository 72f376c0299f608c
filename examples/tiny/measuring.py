"""What the tiny model is worth, measured through a running cluster and, for comparison, by transformers.

Runs beside a cluster, as a user of it: its SDK and its command line. Counters come with the ranks' heartbeats, so they
are read until they stand still. It draws nothing and decides nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers

from echelon import Client
from echelon.evaluation import Score, longest_window, windows
from echelon.testing import LocalCluster
from echelon.types import Completion, ExpertLoad

HEARTBEAT_S = 0.1  # of clusters that are measured
STILL_S = 6 * HEARTBEAT_S  # counters that have not moved for so long have all been told
CONCURRENCY = 8  # of prompts that are only read

Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class Decoded:
    """Greedy answers, and what guessing has brought them. rows: steps in which a choice decoded, of all choices."""

    answers: tuple[tuple[int, ...], ...]
    rows: int
    drafted: int
    accepted: int
    seconds: float

    @property
    def tokens(self) -> int:
        """That rows have brought: the first of an answer comes with its prompt."""
        return sum(len(answer) - 1 for answer in self.answers)

    @property
    def tokens_per_step(self) -> float:
        """That a choice gains by a step in which it decodes, on average; without guesses at most 1."""
        return self.tokens / self.rows

    @property
    def acceptance(self) -> float:
        """Of the guesses, those that came true; 0 if there was none."""
        return self.accepted / self.drafted if self.drafted else 0.0

    def figures(self) -> dict[str, object]:
        """For programs."""
        return {
            "tokens": self.tokens,
            "rows": self.rows,
            "drafted_tokens": self.drafted,
            "accepted_tokens": self.accepted,
            "acceptance": round(self.acceptance, 4),
            "tokens_per_step": round(self.tokens_per_step, 4),
            "seconds": round(self.seconds, 2),
        }


def settled(read: Callable[[], Found]) -> Found:
    """What read answers, once it has answered the same for STILL_S."""
    last, since_s = read(), time.monotonic()
    while time.monotonic() - since_s < STILL_S:
        time.sleep(HEARTBEAT_S)
        if (now := read()) != last:
            last, since_s = now, time.monotonic()
    return last


def decode(cluster: LocalCluster, prompts: Sequence[str], max_tokens: int) -> Decoded:
    """Greedy answers to prompts, one after the other; its figures are the differences of the leader's counters.

    One at a time: there a single guess pays surely, for the device would wait. See docs/speculation.md.
    """
    before, start_s = counters(cluster), time.monotonic()
    answers = ask(cluster.client(), prompts, max_tokens, 1)
    seconds = time.monotonic() - start_s
    after = counters(cluster)
    rows, drafted, accepted = (
        after.get(name, 0) - before.get(name, 0) for name in ("decode_rows", "drafted_tokens", "accepted_tokens")
    )
    return Decoded(tuple(answer.token_ids for answer in answers), rows, drafted, accepted, seconds)


def ask(client: Client, prompts: Iterable[str], max_tokens: int, concurrency: int = CONCURRENCY) -> list[Completion]:
    """All prompts under greedy, so many at a time, in their order."""
    return list(client.map(prompts, concurrency=concurrency, max_tokens=max_tokens, temperature=0.0))


def counters(cluster: LocalCluster) -> Mapping[str, int]:
    """Of the first replica's leader, since its epoch began."""

    def work() -> dict[str, int]:
        told = cluster.status().replicas[0].counters
        return {name: told.get(name, 0) for name in ("decode_rows", "drafted_tokens", "accepted_tokens")}

    return settled(work)


def loads(cluster: LocalCluster) -> list[ExpertLoad]:
    """By layer, since the epoch began."""
    return settled(cluster.client().expert_load)


def loads_by_kind(cluster: LocalCluster, kinds: Mapping[str, Sequence[str]]) -> dict[str, dict[int, tuple[int, ...]]]:
    """How often the experts of each layer were chosen for each kind of text: kind -> layer -> by expert. Every text is
    read once, and one token is drawn behind it."""
    found: dict[str, dict[int, tuple[int, ...]]] = {}
    before = {load.layer: load.rows for load in loads(cluster)}
    for kind, texts in kinds.items():
        ask(cluster.client(), texts, 1)
        after = {load.layer: load.rows for load in loads(cluster)}
        found[kind] = {
            layer: tuple(now - then for now, then in zip(rows, before.get(layer, (0,) * len(rows)), strict=True))
            for layer, rows in after.items()
        }
        before = after
    return found


def evaluate(target: str, file: Path, documents: int | None = None) -> Mapping[str, Any]:
    """What `echelon eval perplexity` says of a file. documents: only the first so many."""
    command = [sys.executable, "-m", "echelon", "eval", "perplexity", str(file), "--address", target, "--json"]
    command += ["--documents", str(documents)] if documents else []
    figures: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return figures


def transformers_score(model: Path, texts: Iterable[str], dtype: torch.dtype) -> Score:
    """The same of transformers, over the same windows."""
    transformers.utils.logging.set_verbosity_error()  # of keys that it does not use, and of long texts
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    theirs = transformers.DeepseekV3ForCausalLM.from_pretrained(model, dtype=dtype, experts_implementation="eager")
    longest = longest_window(theirs.config.max_position_embeddings)
    total = Score()
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        total += Score(1, len(text.encode()))
        for part in windows(ids.shape[1], longest, longest // 2):
            given, first = ids[:, part.first : part.last], part.scored - part.first
            with torch.inference_mode():
                logprobs = theirs(given).logits[0, first - 1 : -1].double().log_softmax(-1)
            targets = given[0, first:]
            nats = -logprobs.gather(-1, targets[:, None]).sum().item()
            total += Score(scored=len(targets), nats=nats, correct=int((logprobs.argmax(-1) == targets).sum()))
    return total
