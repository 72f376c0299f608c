"""What it costs, while nothing fails, that nothing is lost: throughput with journal and heartbeats, and without.

    python benchmarks/recovery_cost.py [--model DIR] [--tensor 2] [--pairs 60] [--case 16x64x64]

Two clusters join one Ray. One is as it is by default; the other keeps no journal and beats every ten seconds. They
answer the same requests through gRPC in turns, the first of each pair changing. Prints JSON lines: of tokens a second,
and of the CPU time of coordinator and ranks for a token, the median of the pairs' ratios with / without, its 95 %
interval, and by how much the same cluster differs from one run to the next. Then the parts, which a busy machine
disturbs less: CPU time of a token's record, CPU time of the heartbeats of idle clusters, and what both come to of a
token's. Aim: 2 % at most.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import platform
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for tests.tiny

import itertools

from coordinator.fences import Fences
from coordinator.journal.file import JournalFile
from coordinator.journal.state import Assigned, Opened, Tokens
from coordinator.requests.nouns import Request
from coordinator.supervisor.ray_head import RayHead, RayHeadConfig
from echelon.bench.cases import Case
from echelon.bench.offline import run_case
from echelon.internal.link import Sampling
from echelon.testing import LocalCluster
from models.config import read_model_config
from tests.tiny import make_checkpoint

WITHOUT = {"journal": "off", "heartbeat_s": 10}
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
RECORD_STEPS = 400
STEP_S = 0.02


@dataclass(frozen=True, slots=True)
class Run:
    """One case, answered once; CPU time of the coordinator and the ranks."""

    tokens_per_s: float
    cpu_us_per_token: float


@contextlib.contextmanager
def ray(folder: Path) -> Iterator[str]:
    """The address of a Ray of our own."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        port, client_port = (probe.getsockname()[1] for probe in probes)
    config = RayHeadConfig("127.0.0.1", port, client_port, num_cpus=16, folder=folder / "ray")
    head = RayHead(config)
    head.start(dict(os.environ))
    try:
        while not head.is_up():
            time.sleep(0.1)
        yield config.address
    finally:
        head.stop()


def pids_of(cluster: LocalCluster) -> list[int]:
    """Its coordinator and its ranks."""
    return [cluster.coordinator_pid, *(rank.pid for rank in cluster.ranks())]


def cpu_s(pids: Sequence[int]) -> float:
    """User and system time so far."""
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(each[11]) + int(each[12]) for each in fields) / TICKS_PER_S


def run(cluster: LocalCluster, case: Case, vocabulary: int, seed: int) -> Run:
    """The case once."""
    pids = pids_of(cluster)
    before_s = cpu_s(pids)
    outcome = asyncio.run(run_case(cluster.target, case, vocabulary, seed))
    tokens = case.requests * case.output_tokens
    return Run(tokens / outcome.total_s, (cpu_s(pids) - before_s) / tokens * 1e6)


def row(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, object]:
    """Their ratio. noise: half of the ratios between runs of the same cluster that follow each other differ more."""
    ratios = sorted(our / their for our, their in zip(ours, theirs, strict=True))
    reach = 0.98 * math.sqrt(len(ratios))  # of a median by order statistics, 95 %
    low, high = math.floor(len(ratios) / 2 - reach) - 1, math.ceil(len(ratios) / 2 + reach)
    same = [abs(later / earlier - 1) for runs in (ours, theirs) for earlier, later in itertools.pairwise(runs)]
    return {
        "median_with": round(statistics.median(ours), 1),
        "median_without": round(statistics.median(theirs), 1),
        "ratio": round(statistics.median(ratios), 4),
        "interval_95": [round(ratios[max(low, 0)], 4), round(ratios[min(high, len(ratios) - 1)], 4)],
        "noise": round(statistics.median(same), 4),
    }


def turns(
    kept: LocalCluster, bare: LocalCluster, pairs: int, case: Case, vocabulary: int
) -> tuple[list[Run], list[Run]]:
    """All pairs."""
    runs: dict[LocalCluster, list[Run]] = {kept: [], bare: []}
    for pair in range(pairs + 1):  # the first to warm up
        for cluster in (kept, bare) if pair % 2 else (bare, kept):
            runs[cluster].append(run(cluster, case, vocabulary, pair))
    return runs[kept][1:], runs[bare][1:]


def idle_ms_per_s(kept: LocalCluster, bare: LocalCluster, seconds: float) -> tuple[float, float]:
    """What both spend while nothing is asked of them: they differ by the heartbeats."""
    pids = pids_of(kept), pids_of(bare)
    before_s = [cpu_s(each) for each in pids]
    time.sleep(seconds)
    ours, theirs = ((cpu_s(each) - before) / seconds * 1e3 for each, before in zip(pids, before_s, strict=True))
    return ours, theirs


def record_us(case: Case, folder: Path) -> float:
    """CPU time of a token's record: encoded, written, the term looked at. A step brings one to each stream, and the
    processor does other things in between: without the pause it is a third of that."""
    fences = Fences.open(folder / "fences")
    journal = JournalFile(folder / "journal", fences.term, check_term=fences.check)
    sampling = Sampling(0.0, 1.0, 0, RECORD_STEPS, 7, ())
    names = [f"{number:032x}" for number in range(case.requests)]
    for attempt, name in enumerate(names, start=1):
        request = Request(name, b"digest", "model", tuple(range(case.prompt_tokens)), sampling, 1e9, 1e9)
        opening = Opened(request), Assigned(name, attempt, 0, 1)
        journal.state.apply_all(opening)
        journal.append(opening)
    spent_s: list[float] = []
    for step in range(RECORD_STEPS):
        records = [Tokens(name, attempt, step, (step,)) for attempt, name in enumerate(names, start=1)]
        journal.state.apply_all(records)
        time.sleep(STEP_S)
        began_s = time.thread_time()
        journal.append(records)
        spent_s.append(time.thread_time() - began_s)
    journal.close()
    fences.close()
    return statistics.median(spent_s) / case.requests * 1e6


def measure(arguments: argparse.Namespace, folder: Path) -> Iterator[dict[str, object]]:
    """All figures."""
    model, case = arguments.model or make_checkpoint(folder / "model"), arguments.case
    vocabulary = read_model_config(model).vocab_size
    with ray(folder) as ray_address:

        def start(name: str, **flags: object) -> LocalCluster:
            return LocalCluster(
                model,
                arguments.tensor,
                state_dir=folder / name,
                ray_address=ray_address,
                **flags,  # type: ignore[arg-type]
            )

        with start("with") as kept, start("without", **WITHOUT) as bare:
            ours, theirs = turns(kept, bare, arguments.pairs, case, vocabulary)
            beats = idle_ms_per_s(kept, bare, arguments.idle_s)
    for name in ("tokens_per_s", "cpu_us_per_token"):
        yield {"figure": name, **row([getattr(each, name) for each in ours], [getattr(each, name) for each in theirs])}
    record = record_us(case, folder)
    yield {"figure": "cpu_us_per_record", "median": round(record, 2)}
    yield {"figure": "idle_cpu_ms_per_s", "with": round(beats[0], 2), "without": round(beats[1], 2)}
    token = statistics.median(each.cpu_us_per_token for each in theirs)
    busy_ms_per_s = token * statistics.median(each.tokens_per_s for each in theirs) / 1e3
    shares = record / token, (beats[0] - beats[1]) / busy_ms_per_s
    yield {"figure": "share_of_cpu", "journal": round(shares[0], 4), "heartbeats": round(shares[1], 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="default: the tests' small one")
    parser.add_argument("--tensor", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--case", type=Case.parse, default=Case(16, 64, 64))
    parser.add_argument("--idle-s", type=float, default=30.0)
    arguments = parser.parse_args()
    told = {"benchmark": "recovery_cost", "case": str(arguments.case), "tensor": arguments.tensor}
    print(json.dumps({**told, "pairs": arguments.pairs, "python": platform.python_version()}))
    with tempfile.TemporaryDirectory(prefix="echelon-cost-") as name:
        for figure in measure(arguments, Path(name)):
            print(json.dumps(figure), flush=True)


if __name__ == "__main__":
    main()
