"""How fast a whole cluster answers: gRPC, journal, scheduler, ranks and all, on one machine.

    python benchmarks/serve.py --model DIR --device cuda --dtype bfloat16 --tensor 2 --cases 1x128x256,64x512x128

A case N x I x O is N requests at once, I random prompt ids, O output ids each, greedy, end ids ignored; the clock runs
from the first submit to the last id at the client. Each case runs once to warm up and then `--repeats` times; the best
counts. One JSON line a case; nothing is compared here: layouts.py does.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import platform
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from echelon import AsyncClient
from echelon.testing import LocalCluster
from models.config import read_model_config

DEGREES = ("replicas", "pipeline", "data", "tensor", "expert", "pipeline_depth")
RANK = ("replica", "pipeline", "data", "tensor", "expert", "device")
RANK_BYTES = ("parameter_bytes", "planned_parameter_bytes", "kv_bytes", "planned_kv_bytes")


@dataclass(frozen=True, slots=True)
class Case:
    """requests x prompt_tokens x output_tokens."""

    requests: int
    prompt_tokens: int
    output_tokens: int

    @classmethod
    def parse(cls, text: str) -> Case:
        return cls(*(int(part) for part in text.split("x")))

    def smaller(self, requests: int, output_tokens: int) -> Case:
        """With at most so many requests and output tokens, to warm up by."""
        return Case(min(self.requests, requests), self.prompt_tokens, min(self.output_tokens, output_tokens))

    def __str__(self) -> str:
        return f"{self.requests}x{self.prompt_tokens}x{self.output_tokens}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run of a case; begun_s since 1970, time_to_first_s by request."""

    begun_s: float
    total_s: float
    time_to_first_s: list[float]


async def run_case(target: str, case: Case, vocabulary: int, seed: int) -> Outcome:
    """Every request at once, each its own stream."""
    draw = random.Random(f"{case} {seed}")  # no two cases begin alike, or the prefix cache would answer one
    prompts = [[draw.randrange(vocabulary) for _ in range(case.prompt_tokens)] for _ in range(case.requests)]
    async with AsyncClient(target) as client:
        await client.cluster()
        begun_s, started_s = time.time(), time.perf_counter()

        async def request(prompt: list[int]) -> float:
            first_s = 0.0
            count = 0
            stream = client.stream(token_ids=prompt, max_tokens=case.output_tokens, temperature=0.0, ignore_eos=True)
            async for event in stream:
                first_s = first_s or time.perf_counter() - started_s
                count += len(event.token_ids)
            assert count == case.output_tokens, f"{count} of {case.output_tokens} tokens came"
            return first_s

        firsts = await asyncio.gather(*(request(prompt) for prompt in prompts))
        return Outcome(begun_s, time.perf_counter() - started_s, list(firsts))


def case_row(case: Case, runs: list[Outcome]) -> dict[str, object]:
    """The best of some runs."""
    best = min(runs, key=lambda run: run.total_s)
    return {
        "case": str(case),
        "total_s": round(best.total_s, 4),
        "all_total_s": [round(run.total_s, 4) for run in runs],
        "output_tokens_per_s": round(case.requests * case.output_tokens / best.total_s, 1),
        "median_time_to_first_s": round(statistics.median(best.time_to_first_s), 4),
    }


def rank_rows(cluster: LocalCluster) -> list[dict[str, object]]:
    """Where each rank stands, and what is resident there."""
    ranks = [dataclasses.asdict(rank) for rank in cluster.ranks()]
    return [{name: rank[name] for name in RANK + RANK_BYTES} for rank in ranks]


def machine(device: str) -> dict[str, object]:
    """What it ran on."""
    import torch

    versions = {"torch": torch.__version__, "python": platform.python_version()}
    if device == "cuda":
        return {"device": torch.cuda.get_device_name(0), "devices": torch.cuda.device_count(), **versions}
    return {"device": platform.processor() or platform.machine(), **versions}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    for name in DEGREES:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help="as echelon serve takes it")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--cases", default="1x16x32,8x16x32")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--max-running", type=int, default=256)
    parser.add_argument("--max-context", type=int, default=None)
    parser.add_argument("--max-step-tokens", type=int, default=8192)
    parser.add_argument("--trace-dir", type=Path, help="where ranks log their operations, for echelon trace")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    degrees = {name: value for name in DEGREES if (value := getattr(arguments, name)) is not None}
    vocabulary = read_model_config(arguments.model).vocab_size
    started_s = time.perf_counter()
    with LocalCluster(
        arguments.model,
        device=arguments.device,
        dtype=arguments.dtype,
        max_running=arguments.max_running,
        max_context=arguments.max_context,
        max_step_tokens=arguments.max_step_tokens,
        trace_dir=arguments.trace_dir,
        start_timeout_s=300.0,
        **degrees,
    ) as cluster:
        start = {
            "model": arguments.model.name,
            **degrees,
            "dtype": arguments.dtype,
            "start_s": round(time.perf_counter() - started_s, 2),
            "ranks": rank_rows(cluster),
            **machine(arguments.device),
        }
        print(json.dumps(start), flush=True)
        for case in [Case.parse(text) for text in arguments.cases.split(",")]:
            seeds = range(arguments.repeats + 1)  # the first to warm up
            runs = [asyncio.run(run_case(cluster.target, case, vocabulary, seed)) for seed in seeds][1:]
            print(json.dumps({**degrees, **case_row(case, runs)}), flush=True)


if __name__ == "__main__":
    main()
