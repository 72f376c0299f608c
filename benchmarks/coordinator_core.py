"""Coordinator core: CPU time from an engine message to queued events, per token, journal append included.

    python benchmarks/coordinator_core.py [--streams 64] [--steps 1000] [--model DIR]

Every message brings one token for each stream, as a step does: parsed from its wire form, journaled in one write(),
detokenised, queued. Without --model the tokenizer is the tests' small one. Prints one JSON line in microseconds of CPU
time per token; aim: a median of 20.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for tests.tiny

from coordinator.answer_text import AnswerText
from coordinator.detokenizer import Detokenizer
from coordinator.journal.file import JournalFile
from coordinator.requests.core import CoordinatorCore, CoreConfig
from coordinator.requests.events import Append, Deliver, Event, LinkOpened, Reported, Send, Submit
from coordinator.requests.nouns import Request, Shown
from coordinator.tokenizer import Tokenizer
from echelon.internal import wire
from echelon.internal.link import Assign, Fence, ReplicaHello, Report, Sampling, TokenRun
from echelon.internal.v1 import link_pb2
from tests.tiny import make_checkpoint

FENCE = Fence(1, 0, 1)
PROMPT = tuple(range(512))


class Shell:
    """Executes effects as the service does."""

    def __init__(self, directory: Path, tokenizer: Tokenizer) -> None:
        self.journal = JournalFile(directory, term=1)
        config = CoreConfig(1, 60.0, 2**31)
        self.core = CoordinatorCore(
            config, lambda stops: AnswerText(Detokenizer(tokenizer.decode), stops), self.journal.state
        )
        self.queues: dict[int, asyncio.Queue[Shown]] = {}
        self.assigns: list[Assign] = []

    def post(self, now: float, event: Event) -> None:
        effects = self.core.step(now, event)
        self.journal.append([effect.record for effect in effects if isinstance(effect, Append)])
        for effect in effects:
            if isinstance(effect, Deliver):
                self.queues[effect.stream].put_nowait(effect.event)
            elif isinstance(effect, Send):
                self.assigns.extend(effect.command.assigns)


def messages(assigns: list[Assign], steps: int, vocab_size: int) -> list[bytes]:
    """Wire forms of the steps' reports: one token for each that was assigned."""
    draw = random.Random(0)
    reports: list[bytes] = []
    for step in range(steps):
        drawn = [(assign, draw.randrange(vocab_size)) for assign in assigns]
        runs = tuple(TokenRun(assign.request, 0, assign.attempt, step, (token_id,)) for assign, token_id in drawn)
        reports.append(wire.report_to_proto(Report(FENCE, step + 1, runs)).SerializeToString())
    return reports


def measure(streams: int, steps: int, directory: Path, tokenizer: Tokenizer) -> list[float]:
    """Seconds per token of every message."""
    shell = Shell(directory, tokenizer)
    shell.post(0.0, LinkOpened(FENCE, ReplicaHello(streams, 2**30, 16, 2**20)))
    for i in range(streams):
        shell.queues[i] = asyncio.Queue()
        sampling = Sampling(1.0, 1.0, 0, steps + 1, i, (2**31 - 1,))
        shell.post(0.0, Submit(i, Request(f"request-{i}", b"", "m", PROMPT, sampling, 1e9, 0.0)))
    seconds: list[float] = []
    for content in messages(shell.assigns, steps, tokenizer.vocab_size):
        begin = time.thread_time()
        report = wire.report_from_proto(link_pb2.ReplicaReport.FromString(content))
        shell.post(1.0, Reported(report))
        seconds.append((time.thread_time() - begin) / streams)
    assert all(queue.qsize() == steps + 1 for queue in shell.queues.values()), "a token was lost"
    shell.journal.close()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--model", type=Path, help="directory whose tokenizer is used")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or make_checkpoint(Path(folder) / "model")
        tokenizer = Tokenizer.from_directory(model)
        gc.disable()
        seconds = measure(arguments.streams, arguments.steps, Path(folder) / "journal", tokenizer)
    cuts = statistics.quantiles(seconds, n=100)
    figures = {"median": cuts[49], "p99": cuts[98], "mean": statistics.fmean(seconds)}
    per_token = {name: round(value * 1e6, 2) for name, value in figures.items()}
    line = {"benchmark": "coordinator_core", "streams": arguments.streams, "steps": arguments.steps}
    print(json.dumps({**line, "us_per_token": per_token, "aim_us": 20}))


if __name__ == "__main__":
    main()
