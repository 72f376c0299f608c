"""Thousands of requests with cancels, disconnects and deadlines: nothing may grow, in any process.

    python benchmarks/soak.py [--requests 10000] [--concurrency 16] [--output FILE]

A cluster of one CPU rank with the tiny model; `soak_load.py` says what its clients do. Memory, descriptors and threads
of each process are read from /proc, the rest from the coordinator's metrics, once a second. A figure is flat when over
the last 80 % of the run a robust line through it (Theil and Sen: the median slope of all pairs of samples) rises by no
more than its row of LIMITS allows. Prints a table and ends with exit code 1 if anything grew.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import socket
import statistics
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

sys.path.insert(0, str(Path(__file__).parents[1]))  # for tests.tiny

from benchmarks.soak_load import Load, connect
from echelon.testing import LocalCluster
from tests.tiny import make_checkpoint

RESUME_WINDOW_S = 3.0
SMALL = {"max_context": 128, "kv_cache_tokens": 256, "max_step_tokens": 64}  # prompts are chunked, blocks are short
SAMPLE_S = 1.0
WARM_UP = 0.2  # of the run, not judged
MIB = 2**20
# What is let grow over the judged part of the run, the larger of: a share of the median, and an amount.
LIMITS: Mapping[str, tuple[float, float]] = {
    "rss_mib": (0.02, 4.0),
    "fds": (0.05, 3),
    "threads": (0.05, 2),
    "asyncio_tasks": (0.25, 16),  # this and the next two follow the load, too
    "open_streams": (0.5, 8),
    "num_requests_remembered": (0.5, 100),
    "kv_blocks_referenced": (0.5, 8),
}
BOUNDS: Mapping[str, float] = {"kept_events": 10_000, "journal_bytes": 64 * MIB}  # grow to here, and no further
OURS = {"-m coordinator": "coordinator", "-m echelon serve": "supervisor", "ray::Rank": "rank", "ray::Agent": "agent"}

RAYS = "ray's own"

Samples = list[tuple[float, float]]  # seconds since the start, value


@dataclass(frozen=True, slots=True)
class Row:
    """One figure over the run."""

    name: str
    first: float
    median: float
    last: float
    growth: float
    allowed: float

    @property
    def flat(self) -> bool:
        return self.growth <= self.allowed


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """Of one soak. left_over: what was still held when every window had passed, above what was held before."""

    requests: int
    duration_s: float
    ends: Mapping[str, int]
    counters: Mapping[str, int]  # of the leader
    left_over: Mapping[str, float]
    rows: Sequence[Row]
    rays: Sequence[Row]

    @property
    def passed(self) -> bool:
        return not self.left_over and all(row.flat for row in self.rows)

    def lines(self) -> Iterator[Mapping[str, object]]:
        """For the record."""
        yield {"requests": self.requests, "duration_s": round(self.duration_s, 1), "left_over": dict(self.left_over)}
        yield {"ends": dict(self.ends), "counters": dict(self.counters)}
        for row in (*self.rows, *self.rays):
            figures = {name: round(value, 2) for name, value in asdict(row).items() if name != "name"}
            yield {"figure": row.name, **figures, "flat": row.flat}


def theil_sen(samples: Sequence[tuple[float, float]]) -> float:
    """The median of the slopes of all pairs, per second (Sen 1968): a third of wild samples do not move it."""
    pairs = itertools.combinations(samples, 2)
    return statistics.median((y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in pairs if x2 > x1)


def judge(name: str, samples: Samples) -> Row:
    """name: process.figure. Over the part of the run after the warm-up."""
    end_s = samples[-1][0]
    judged = [(x, y) for x, y in samples if x >= WARM_UP * end_s]
    values = [y for _, y in judged]
    growth = theil_sen(judged) * (judged[-1][0] - judged[0][0])
    figure, median = name.rpartition(".")[2], statistics.median(values)
    if figure in BOUNDS:
        return Row(name, samples[0][1], median, values[-1], max(values), BOUNDS[figure])
    share, amount = LIMITS[figure]
    return Row(name, samples[0][1], median, values[-1], growth, max(share * abs(median), amount))


class Watch:
    """Samples of every figure by name."""

    def __init__(self, cluster: LocalCluster, metrics_address: str) -> None:
        self.samples: dict[str, Samples] = {}
        self._cluster = cluster
        self._metrics = f"http://{metrics_address}/metrics"
        self._ranks = {rank.pid for rank in cluster.ranks()}  # below the supervisor only if their Ray is
        self._begin_s = time.monotonic()

    async def run(self) -> None:
        while True:
            await asyncio.to_thread(self.sample)
            await asyncio.sleep(SAMPLE_S)

    def sample(self) -> None:
        now_s = time.monotonic() - self._begin_s
        for name, value in {**self._processes(), **self.metrics()}.items():
            self.samples.setdefault(name, []).append((now_s, value))

    def metrics(self) -> dict[str, float]:
        """Those of the coordinator that LIMITS and BOUNDS name, and the blocks of its replica."""
        with urllib.request.urlopen(self._metrics, timeout=10) as answer:
            families = text_string_to_metric_families(answer.read().decode())
            samples = {s.name.removeprefix("echelon_"): s.value for family in families for s in family.samples}
        found = {f"coordinator.{name}": samples[name] for name in (*LIMITS, *BOUNDS) if name in samples}
        blocks = self._cluster.status().replicas[0].kv_blocks_referenced
        return {**found, "replica.kv_blocks_referenced": blocks}

    def _processes(self) -> dict[str, float]:
        """Of the ranks and of all that descends from the supervisor; Ray's own are added up."""
        totals: dict[str, float] = {}
        for pid in self._ranks.union(descendants(self._cluster.pid)):
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            owner = next((name for mark, name in OURS.items() if mark in command), RAYS)
            for figure, value in figures(pid).items():
                totals[f"{owner}.{figure}"] = totals.get(f"{owner}.{figure}", 0.0) + value
        return totals


def figures(pid: int) -> dict[str, float]:
    """Of one process, as /proc has them."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return {
        "rss_mib": int(status["VmRSS"].split()[0]) / 1024,
        "threads": int(status["Threads"]),
        "fds": len(list(Path(f"/proc/{pid}/fd").iterdir())),
    }


def descendants(pid: int) -> Iterator[int]:
    """The process and all below it."""
    yield pid
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield from descendants(int(child))


async def soak(cluster: LocalCluster, watch: Watch, requests: int, concurrency: int, choices: int) -> Counter[str]:
    """The load, watched."""
    async with connect(cluster.target) as channel:
        load = Load(channel, random.Random(0), choices)
        watching = asyncio.create_task(watch.run())
        try:
            await load.run(requests, concurrency)
        finally:
            watching.cancel()
            await asyncio.wait([watching])
    if not watching.cancelled():
        watching.result()
    return load.ends


def left_over(cluster: LocalCluster, watch: Watch, before: Mapping[str, float]) -> dict[str, float]:
    """What is still held once every window has passed; empty if all is as it was before the first request."""
    time.sleep(RESUME_WINDOW_S + 1)
    status = cluster.wait(lambda now: not (now.queued or now.running or now.parked), "an idle cluster")
    after = watch.metrics()
    names = ("num_requests_remembered", "open_streams", "asyncio_tasks")
    more = {name: after[f"coordinator.{name}"] - before[f"coordinator.{name}"] for name in names}
    more["kv_blocks_referenced"] = status.replicas[0].kv_blocks_referenced
    return {name: value for name, value in more.items() if value > 0}


def run(model: Path, requests: int, concurrency: int, choices: int = 3, **flags: object) -> Result:
    """A whole soak on a cluster of its own."""
    metrics_address = f"127.0.0.1:{free_port()}"
    flags = {"resume_window_s": RESUME_WINDOW_S, "max_running": 16, **SMALL, **flags}
    flags["metrics_address"] = metrics_address
    with LocalCluster(model, **flags) as cluster:  # type: ignore[arg-type]
        watch = Watch(cluster, metrics_address)
        asyncio.run(soak(cluster, watch, concurrency * 4, concurrency, choices))  # connections, threads, imports
        time.sleep(RESUME_WINDOW_S + 1)
        before = watch.metrics()
        watch.samples.clear()
        begin_s, counted = time.monotonic(), Counter(cluster.status().replicas[0].counters)
        ends = asyncio.run(soak(cluster, watch, requests, concurrency, choices))
        duration_s = time.monotonic() - begin_s
        counters = Counter(cluster.status().replicas[0].counters) - counted
        rows = {name: judge(name, samples) for name, samples in sorted(watch.samples.items())}
        return Result(
            requests=requests,
            duration_s=duration_s,
            ends=dict(sorted(ends.items())),
            counters=dict(sorted(counters.items())),
            left_over=left_over(cluster, watch, before),
            rows=tuple(row for name, row in rows.items() if not name.startswith(RAYS)),
            rays=tuple(row for name, row in rows.items() if name.startswith(RAYS)),
        )


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def table(rows: Sequence[Row]) -> str:
    """For people."""
    head = f"{'figure':<38}{'first':>10}{'median':>10}{'last':>10}{'growth':>10}{'allowed':>10}"
    lines = [
        f"{row.name:<38}{row.first:>10.1f}{row.median:>10.1f}{row.last:>10.1f}{row.growth:>10.2f}{row.allowed:>10.1f}"
        + ("" if row.flat else "  GROWS")
        for row in rows
    ]
    return "\n".join([head, *lines])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = run(make_checkpoint(Path(folder) / "tiny"), arguments.requests, arguments.concurrency)
    print(f"{result.requests} requests in {result.duration_s:.0f} s")
    print(json.dumps(result.ends))
    print(json.dumps(result.counters))
    print(table(result.rows))
    print("for the record, not judged:")
    print(table(result.rays))
    print(f"left over: {json.dumps(result.left_over)}")
    if arguments.output:
        arguments.output.write_text("\n".join(json.dumps(line) for line in result.lines()) + "\n")
    return 0 if result.passed else 1


if __name__ == "__main__":
    sys.exit(main())
