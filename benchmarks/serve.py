"""How fast a whole cluster answers: gRPC, journal, scheduler, ranks and all, on one machine.

    python benchmarks/serve.py --model DIR --device cuda --dtype bfloat16 --tensor 2 --cases 1x128x256,64x512x128

A case N x I x O is N requests at once, I random prompt ids, O output ids each, greedy, end ids ignored; the clock runs
from the first submit to the last id at the client. Each case runs once to warm up and then `--repeats` times; the best
counts. One JSON line a case; nothing is compared here.
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


@dataclass(frozen=True, slots=True)
class Case:
    """requests x prompt_tokens x output_tokens."""

    requests: int
    prompt_tokens: int
    output_tokens: int

    @classmethod
    def parse(cls, text: str) -> Case:
        return cls(*(int(part) for part in text.split("x")))

    def __str__(self) -> str:
        return f"{self.requests}x{self.prompt_tokens}x{self.output_tokens}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run of a case; time_to_first_s by request."""

    total_s: float
    time_to_first_s: list[float]


async def run_case(target: str, case: Case, vocabulary: int, seed: int) -> Outcome:
    """Every request at once, each its own stream."""
    draw = random.Random(seed)
    prompts = [[draw.randrange(vocabulary) for _ in range(case.prompt_tokens)] for _ in range(case.requests)]
    async with AsyncClient(target) as client:
        await client.cluster()
        started_s = time.perf_counter()

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
        return Outcome(time.perf_counter() - started_s, list(firsts))


def measure(cluster: LocalCluster, case: Case, vocabulary: int, repeats: int) -> dict[str, object]:
    """The best of the repeats, after one run to warm up."""
    runs = [asyncio.run(run_case(cluster.target, case, vocabulary, seed)) for seed in range(repeats + 1)][1:]
    best = min(runs, key=lambda run: run.total_s)
    return {
        "case": str(case),
        "total_s": round(best.total_s, 4),
        "all_total_s": [round(run.total_s, 4) for run in runs],
        "output_tokens_per_s": round(case.requests * case.output_tokens / best.total_s, 1),
        "median_time_to_first_s": round(statistics.median(best.time_to_first_s), 4),
    }


def machine(device: str) -> dict[str, str]:
    """What it ran on."""
    import torch

    name = torch.cuda.get_device_name(0) if device == "cuda" else platform.processor() or platform.machine()
    return {"device": name, "torch": torch.__version__, "python": platform.python_version()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--cases", default="1x16x32,8x16x32")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--max-running", type=int, default=256)
    parser.add_argument("--max-context", type=int, default=None)
    parser.add_argument("--max-step-tokens", type=int, default=8192)
    arguments = parser.parse_args()
    vocabulary = read_model_config(arguments.model).vocab_size
    started_s = time.perf_counter()
    with LocalCluster(
        arguments.model,
        tensor=arguments.tensor,
        device=arguments.device,
        dtype=arguments.dtype,
        max_running=arguments.max_running,
        max_context=arguments.max_context,
        max_step_tokens=arguments.max_step_tokens,
        start_timeout_s=300.0,
    ) as cluster:
        ranks = [dataclasses.asdict(rank) for rank in cluster.ranks()]
        kept = ("tensor", "device", "parameter_bytes", "planned_parameter_bytes", "kv_bytes", "planned_kv_bytes")
        start = {
            "model": arguments.model.name,
            "tensor": arguments.tensor,
            "dtype": arguments.dtype,
            "start_s": round(time.perf_counter() - started_s, 2),
            "ranks": [{name: rank[name] for name in kept} for rank in ranks],
            **machine(arguments.device),
        }
        print(json.dumps(start), flush=True)
        for case in [Case.parse(text) for text in arguments.cases.split(",")]:
            row = measure(cluster, case, vocabulary, arguments.repeats)
            print(json.dumps({"tensor": arguments.tensor, **row}), flush=True)


if __name__ == "__main__":
    main()
