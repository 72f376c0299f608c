"""Scheduler, block pool and plan encoding: CPU time of one step with many requests running.

    python benchmarks/scheduler.py [--running 256] [--steps 2000]

Every step schedules one decode row a request and, as requests end and others take their slots, chunks of new
prompts; encodes the plan and commits its ids. Prints one JSON line in microseconds of CPU time; aim: a median step of
1000 with 256 running.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time

from echelon.internal.link import Assign, Fence, Progress, Sampling
from worker.limits import EngineLimits
from worker.plan import StepResult, encode
from worker.scheduler import Scheduler

PROMPT_TOKENS = 512
MAX_TOKENS = 512


def request(number: int) -> Assign:
    """Lengths differ, so that requests do not end in the same step; prompts too, so that none is found in the cache."""
    sampling = Sampling(temperature=1.0, top_p=0.9, top_k=50, max_tokens=MAX_TOKENS - 97 * number % 256, seed=number)
    return Assign(f"request-{number}", 1, tuple(range(number, number + PROMPT_TOKENS)), (Progress(0),), sampling)


def measure(running: int, steps: int) -> dict[str, list[float]]:
    """Seconds of each part of each step; the running set is full throughout, and one plan is always ahead."""
    limits = EngineLimits(
        max_running=running,
        kv_blocks=running * (PROMPT_TOKENS + MAX_TOKENS) // 16,
        block_tokens=16,
        max_step_tokens=2 * running + 2048,
        max_context=PROMPT_TOKENS + MAX_TOKENS,
    )
    scheduler, fence = Scheduler(limits), Fence(1, 0, 1)
    seconds: dict[str, list[float]] = {"schedule": [], "encode": [], "commit": [], "step": []}
    added = 0
    ahead = None
    while len(seconds["step"]) < steps:
        while sum(1 for _ in scheduler) < running + 8:  # a few wait
            scheduler.add(request(added))
            added += 1
        begin = time.thread_time()
        plan = scheduler.schedule(fence)
        scheduled = time.thread_time()
        assert plan is not None
        encode(plan)
        encoded = time.thread_time()
        if ahead is not None:
            sampled = sum(row.sampled for row in ahead.rows)
            result = StepResult(ahead.step, (7,) * sampled, (None,) * sampled)
            ready = time.thread_time()
            scheduler.commit(result)
            done = time.thread_time()
            if len(plan.rows) >= running:  # otherwise the first prompts still come in
                parts = (scheduled - begin, encoded - scheduled, done - ready)
                for name, part in zip(seconds, (*parts, sum(parts)), strict=True):
                    seconds[name].append(part)
        ahead = plan
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--running", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2000)
    arguments = parser.parse_args()
    gc.freeze()
    seconds = measure(arguments.running, arguments.steps)
    figures: dict[str, object] = {"benchmark": "scheduler", "running": arguments.running, "steps": arguments.steps}
    for name, values in seconds.items():
        figures[f"{name}_us_median"] = round(statistics.median(values) * 1e6, 1)
    figures["step_us_p99"] = round(statistics.quantiles(seconds["step"], n=100)[98] * 1e6, 1)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
