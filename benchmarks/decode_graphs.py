"""Decode steps with and without CUDA graphs: the same numbers, how long a step takes, and how long capturing takes.

    python -m benchmarks.decode_graphs [--only qwen3-8b tensor-2] [--seconds 190] [--output graphs.jsonl]
    python -m benchmarks.decode_graphs --device cpu --scale 16 --rows 1 3 --max-running 8 --context 40   # no graph

Random weights in memory, as many layers as a case says. A case runs in processes of its own, one for each of its
devices, over NCCL; cases of one device run side by side on all there are. Where words are given after --only, cases
whose name has one of them run. JSON lines:

    captured            sizes and seconds, bytes as settled before the cache and as taken
    rows                of a step: eager_us and graph_us through the whole runner, launched one behind the other;
                        device_us of the graph alone; floor_us, bytes of weights and cache over --bandwidth
    same_bits           the graph against the same work launched eagerly over the same buffers; difference: the largest
    plain_difference    against an eager step without padding, relative to the largest number
    same_ids            of 8 greedy steps after each other, the share that eager steps draw too
    counted             rows that experts counted in a replay, over what rows without padding would choose
    closed_s            graphs reset, then groups aborted
    error               what went wrong; other cases go on
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch

from benchmarks.decode_graph_work import Bench
from echelon.errors import EchelonError
from parallel.degrees import Degrees
from parallel.mesh import close, form_context, open_store
from worker.matchers import Matchers

FAILURES = (RuntimeError, EchelonError, AssertionError, OSError, ValueError, ImportError)
LEAST_S, CASE_S = 12.0, 75.0  # that a case needs to be worth beginning, and that it may take
AFTER_FAILURE_S = 5.0  # for the others to tell what has become of them
EPOCH = 1


@dataclass(frozen=True, slots=True)
class Case:
    """layers None: all that the model has."""

    model: str
    layers: int | None
    degrees: Degrees

    @property
    def name(self) -> str:
        degrees = [f"{part}-{getattr(self.degrees, part)}" for part in ("pipeline", "data", "tensor", "expert")]
        told = [degree for degree in degrees if not degree.endswith("-1")] or ["alone"]
        return " ".join([self.model, f"{self.layers or 'all'}-layers", *told])


CASES = (
    Case("qwen3-8b", 4, Degrees()),
    Case("deepseek-v2-lite", 4, Degrees()),
    Case("qwen3-30b-a3b", 4, Degrees()),
    Case("qwen3-8b", None, Degrees()),
    Case("qwen3-8b", 4, Degrees(tensor=2)),
    Case("qwen3-30b-a3b", 4, Degrees(tensor=2, expert=2)),
    Case("deepseek-v2-lite", 4, Degrees(tensor=2, expert=2)),
    Case("qwen3-30b-a3b", 4, Degrees(data=2, expert=2)),
    Case("deepseek-v2-lite", 4, Degrees(tensor=2)),
    Case("qwen3-8b", 4, Degrees(pipeline=2)),
)


def as_rank(case: Case, arguments: argparse.Namespace) -> None:
    """In a process of its own. Rank 0 speaks; others only where they fail."""
    device = torch.device(arguments.device, 0) if arguments.device == "cuda" else torch.device("cpu")

    def say(**values: object) -> None:
        if arguments.rank == 0:
            print(json.dumps({"case": case.name, **values}), flush=True)

    matchers = Matchers(_no_tokenizer, 1)
    try:
        place = case.degrees.place(arguments.rank)
        context = form_context(arguments.store, "graphs", EPOCH, place, device, torch.bfloat16, 60.0, come_s=60.0)
        bench = Bench(case.model, case.layers, context, arguments, matchers)
        say(captured=bench.capture())
        for rows in arguments.rows:
            say(rows=rows, **bench.measure(rows))
        began_s = time.monotonic()
        bench.runner.reset_graphs()
        close(context)
        say(closed_s=round(time.monotonic() - began_s, 2))
    except FAILURES as error:
        print(json.dumps({"case": case.name, "rank": arguments.rank, "error": f"{type(error).__name__}: {error}"}))
        raise
    finally:
        matchers.close()


def _no_tokenizer() -> NoReturn:
    raise AssertionError("these steps have no constraint")


def run_case(case: Case, devices: Sequence[int], words: Sequence[str], deadline_s: float) -> list[str]:
    """Its ranks on these devices; lines of its output. A rank that outlives another's failure or its time is killed."""
    if deadline_s - time.monotonic() < LEAST_S:
        return [json.dumps({"case": case.name, "error": "no time is left"})]
    store, address = open_store("127.0.0.1")
    with ExitStack() as stack:
        ranks = []
        for rank, device in enumerate(devices):
            output = stack.enter_context(tempfile.TemporaryFile("w+"))
            command = [sys.executable, "-m", "benchmarks.decode_graphs", *words, "--case", str(CASES.index(case))]
            command += ["--rank", str(rank), "--store", address]
            environment = os.environ | {"CUDA_VISIBLE_DEVICES": str(device)}
            ranks.append((subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT), output))
        _wait([process for process, _ in ranks], min(deadline_s, time.monotonic() + CASE_S))
        lines = []
        for rank, (process, output) in enumerate(ranks):
            output.seek(0)
            told = output.read().splitlines()
            lines += [line for line in told if line.startswith("{")]
            if process.returncode:
                end = " | ".join(line for line in told if not line.startswith("{"))[-600:]
                lines.append(json.dumps({"case": case.name, "rank": rank, "exit": process.returncode, "output": end}))
    del store
    return lines


def _wait(processes: Sequence[subprocess.Popen[bytes]], deadline_s: float) -> None:
    """Until all have ended; then none is left."""
    while any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes):
            deadline_s = min(deadline_s, time.monotonic() + AFTER_FAILURE_S)
        if time.monotonic() > deadline_s:
            for process in processes:
                process.kill()
        time.sleep(0.1)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[""], help="words of the names of cases")
    parser.add_argument("--seconds", type=float, default=190, help="of all cases together")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 50, 64, 256])
    parser.add_argument("--context", type=int, default=1152, help="tokens that each row has stored")
    parser.add_argument("--max-running", type=int, default=256)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--scale", type=int, default=1, help="divides sizes, for a machine that is to try the script")
    parser.add_argument("--bandwidth", type=float, default=4.46e12, help="bytes a second; default: an H200's")
    parser.add_argument("--output", type=Path, help="a file for the JSON lines")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case is not None:
        as_rank(CASES[arguments.case], arguments)
        return
    deadline_s = time.monotonic() + arguments.seconds
    free: queue.SimpleQueue[int] = queue.SimpleQueue()
    count = torch.cuda.device_count() if arguments.device == "cuda" else 2
    for device in range(count):
        free.put(device)

    def run(case: Case) -> None:
        devices = [free.get() for _ in range(case.degrees.replica_ranks)]
        try:
            lines = run_case(case, devices, sys.argv[1:], deadline_s)
        finally:
            for device in devices:
                free.put(device)
        print("\n".join(lines), flush=True)
        if arguments.output is not None:
            with arguments.output.open("a") as file:
                file.write("".join(f"{line}\n" for line in lines))

    cases = [case for case in CASES if any(word in case.name for word in arguments.only)]
    with ThreadPoolExecutor(max(count, 1)) as pool:
        list(pool.map(run, [case for case in cases if case.degrees.replica_ranks == 1]))
    for case in cases:
        if 1 < case.degrees.replica_ranks <= count:
            run(case)


if __name__ == "__main__":
    main()
