"""Requests that come when they come: a schedule of Poisson arrivals, each sent at its time, and how long users wait.

In the user's terminal. The load is open: who comes does not wait for those before, and times count from when a request
was due, so that a client that lags is not forgiven. The schedule and the figures are pure.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from echelon.aio import AsyncClient
from echelon.errors import ConfigError, EchelonError

SHARES = (0.5, 0.9, 0.99)


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request, so many seconds after the first may come."""

    due_s: float
    prompt: tuple[int, ...]
    output_tokens: int


@dataclass(slots=True)
class Answer:
    """What came of it: arrivals_s of ids, since it was due, and how many there were in all; error: of the server."""

    arrivals_s: list[float] = field(default_factory=list)
    tokens: int = 0
    error: str = ""

    @property
    def first_s(self) -> float:
        """Time to the first id."""
        return self.arrivals_s[0]

    @property
    def gaps_s(self) -> list[float]:
        """Between arrivals that follow each other; several ids that come at once are one arrival."""
        return [later - earlier for earlier, later in itertools.pairwise(self.arrivals_s)]

    @property
    def pace_s(self) -> float:
        """Of an id behind the first, on average."""
        return (self.arrivals_s[-1] - self.first_s) / (self.tokens - 1) if self.tokens > 1 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """rate: requests a second, for duration_s. Lengths are uniform within `spread` of the mean, a share of it."""

    rate: float
    duration_s: float
    prompt_tokens: int
    output_tokens: int
    spread: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rate", "duration_s"):
            if not 0 < getattr(self, name) < float("inf"):
                given = f"--{name.replace('_', '-')} {getattr(self, name)}"
                raise ConfigError(f"{given} must be a number above 0", field=name)
        for name in ("prompt_tokens", "output_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1", field=name)
        if not 0 <= self.spread < 1:
            raise ConfigError(f"--spread {self.spread} must be at least 0 and below 1", field="spread")

    def check_fits(self, max_context: int) -> None:
        """Raises ConfigError where a request may be longer than what will be served."""
        prompt, answer = (_most(mean, self.spread) for mean in (self.prompt_tokens, self.output_tokens))
        if prompt + answer > max_context:
            raise ConfigError(
                f"--prompt-tokens and --output-tokens: up to {prompt} + {answer} = {prompt + answer} tokens are more "
                f"than max-context {max_context}",
                field="prompt_tokens",
            )


def schedule(load: Load, vocabulary: int) -> list[Arrival]:
    """The same for the same seed: gaps between arrivals are exponential, and prompts random ids. May be empty."""
    draw = random.Random(f"arrivals {load.seed} {load.rate}")
    arrivals: list[Arrival] = []
    due_s = draw.expovariate(load.rate)
    while due_s < load.duration_s:
        prompt = draw.choices(range(vocabulary), k=_length(draw, load.prompt_tokens, load.spread))
        arrivals.append(Arrival(due_s, tuple(prompt), _length(draw, load.output_tokens, load.spread)))
        due_s += draw.expovariate(load.rate)
    return arrivals


async def run_load(target: str, arrivals: Sequence[Arrival]) -> tuple[list[Answer], float]:
    """Sends each at its time, greedy, end ids ignored; the answers, and seconds until the last has ended."""
    async with AsyncClient(target, max_retries=0) as client:
        await client.cluster()
        started_s = time.perf_counter()
        answers = await asyncio.gather(*(_send(client, arrival, started_s) for arrival in arrivals))
        return list(answers), time.perf_counter() - started_s


async def _send(client: AsyncClient, arrival: Arrival, started_s: float) -> Answer:
    due_s, answer = started_s + arrival.due_s, Answer()
    await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
    tokens, prompt = arrival.output_tokens, list(arrival.prompt)
    try:
        async for event in client.stream(token_ids=prompt, max_tokens=tokens, temperature=0.0, ignore_eos=True):
            if event.token_ids:
                answer.arrivals_s.append(time.perf_counter() - due_s)
                answer.tokens += len(event.token_ids)
    except EchelonError as error:
        answer.error = str(error)
    return answer


def figures(
    answers: Sequence[Answer], total_s: float, ttft_slo_s: float | None = None, itl_slo_s: float | None = None
) -> dict[str, object]:
    """Percentiles of waiting, rates, and goodput: requests a second whose first id and whose mean pace are in time."""
    whole = [answer for answer in answers if not answer.error and answer.arrivals_s]
    failed = [answer for answer in answers if answer.error or not answer.arrivals_s]
    good = [answer for answer in whole if _in_time(answer, ttft_slo_s, itl_slo_s)]
    found: dict[str, object] = {
        "requests": len(answers),
        "failed": len(failed),
        "total_s": round(total_s, 3),
        "output_tokens_per_s": round(sum(answer.tokens for answer in whole) / total_s, 1),
        "requests_per_s": round(len(whole) / total_s, 3),
        "ttft_s": percentiles([answer.first_s for answer in whole]),
        "itl_s": percentiles([gap_s for answer in whole for gap_s in answer.gaps_s]),
        "e2e_s": percentiles([answer.arrivals_s[-1] for answer in whole]),
        "goodput_per_s": round(len(good) / total_s, 3),
        "slo": {"ttft_s": ttft_slo_s, "itl_s": itl_slo_s},
    }
    return found | ({"first_error": failed[0].error} if failed else {})


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p90 and p99: the least value that so large a share of them does not exceed. Empty for none."""
    ordered = sorted(values)
    ranks = {f"p{round(share * 100)}": max(0, math.ceil(share * len(ordered)) - 1) for share in SHARES}
    return {name: round(ordered[rank], 5) for name, rank in ranks.items()} if ordered else {}


def _in_time(answer: Answer, ttft_slo_s: float | None, itl_slo_s: float | None) -> bool:
    first = ttft_slo_s is None or answer.first_s <= ttft_slo_s
    return first and (itl_slo_s is None or answer.pace_s <= itl_slo_s)


def _length(draw: random.Random, mean: int, spread: float) -> int:
    return draw.randint(max(1, mean - _less(mean, spread)), _most(mean, spread))


def _most(mean: int, spread: float) -> int:
    return mean + _less(mean, spread)


def _less(mean: int, spread: float) -> int:
    return int(mean * spread)
