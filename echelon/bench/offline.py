"""One case through the whole system: every request at once, each its own stream, the clock at the client.

In the user's terminal. Says what came and when; what the figures mean is others' business.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from echelon.aio import AsyncClient
from echelon.bench.cases import Case, prompts
from echelon.errors import InternalError


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run of a case, from the first submit to the last id; begun_s since 1970, time_to_first_s by request."""

    begun_s: float
    total_s: float
    time_to_first_s: list[float]


async def run_case(target: str, case: Case, vocabulary: int, seed: int) -> Outcome:
    """Greedy, end ids ignored. Raises EchelonError."""
    asked = prompts(case, vocabulary, seed)
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
            if count != case.output_tokens:
                raise InternalError(f"{count} of {case.output_tokens} tokens came")
            return first_s

        firsts = await asyncio.gather(*(request(prompt) for prompt in asked))
        return Outcome(begun_s, time.perf_counter() - started_s, list(firsts))


def case_row(case: Case, runs: Sequence[Outcome]) -> dict[str, object]:
    """The best of some runs, and the times of all."""
    best = min(runs, key=lambda run: run.total_s)
    return {
        "case": str(case),
        "seconds": round(best.total_s, 4),
        "all_seconds": [round(run.total_s, 4) for run in runs],
        "output_tokens_per_s": round(case.output_count / best.total_s, 1),
        "median_time_to_first_s": round(statistics.median(best.time_to_first_s), 4),
    }
