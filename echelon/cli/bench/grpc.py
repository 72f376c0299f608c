"""Cases through the whole system: a cluster of this machine, or one that runs, asked as any client asks it.

In the user's terminal. Starts `echelon serve` with the flags that were given, and counts what the prefix cache had.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from coordinator.plan.floor import decode_rows
from coordinator.supervisor.float8 import settled_float8
from echelon.bench.cases import Case
from echelon.bench.experts import expected_distinct
from echelon.bench.offline import Outcome, run_case
from echelon.cli.bench.setting import Experts, Setting
from echelon.cli.serve import without_variables
from echelon.client import Client
from echelon.config import Device, Float8Storage
from echelon.errors import UnavailableError
from echelon.testing import LocalCluster
from parallel.degrees import Degrees

START_TIMEOUT_S, TARGET_TIMEOUT_S = 600.0, 10.0
SHARES = "expected of rows that choose by the shares that GetExpertLoad tells"


@dataclass(frozen=True, slots=True)
class Target:
    """A cluster that serves. start_s: None of one that ran before, whose layout is in the setting."""

    setting: Setting
    address: str
    start_s: float | None

    def run(self, case: Case, vocabulary: int, seeds: Sequence[int]) -> tuple[list[Outcome], int]:
        """One run a seed, and how many prompt tokens the prefix cache had in all of them."""
        with Client(self.address) as client:
            before = _cached_tokens(client)
            runs = [asyncio.run(run_case(self.address, case, vocabulary, seed)) for seed in seeds]
            return runs, _cached_tokens(client) - before

    def distinct_experts(self, case: Case) -> Experts | None:
        """By how often each expert was chosen so far; None if nobody says."""
        routing = self.setting.census.routing
        with Client(self.address) as client:
            loads = [load.rows for load in client.expert_load()]
        if routing is None or not any(map(sum, loads)):
            return None
        degrees = self.setting.degrees
        rows = decode_rows(degrees, case)[1] * degrees.data
        return Experts(expected_distinct(loads, routing.experts_per_token, rows), SHARES)


@contextlib.contextmanager
def cluster(setting: Setting, address: str | None) -> Iterator[Target]:
    """address: of one that runs; else one is started with the setting's flags, and ended."""
    if address is not None:
        yield Target(setting.laid_out(_degrees(address)), address, None)
        return
    flags = setting.config.model_dump(exclude={"address"})
    setting = setting.stored(_float8(setting))
    began_s = time.perf_counter()
    try:
        with without_variables():
            started = LocalCluster(**flags, start_timeout_s=START_TIMEOUT_S)
    except (RuntimeError, TimeoutError) as error:
        raise UnavailableError(_reason(str(error))) from error
    with started:
        yield Target(setting, started.target, round(time.perf_counter() - began_s, 2))


def _float8(setting: Setting) -> Float8Storage:
    """As the cluster will settle it: where there are no GPUs, none is asked for what it is."""
    device: Device = "cpu" if setting.config.device == "cpu" else "cuda"
    return settled_float8(setting.config, setting.directory, device, setting.dtype)


def _degrees(address: str) -> Degrees:
    """By the places of its ranks. Raises UnavailableError where nobody answers at once."""
    with Client(address, timeout_s=TARGET_TIMEOUT_S, max_retries=0) as client:
        ranks = client.ranks()
    if not ranks:
        raise UnavailableError(f"the cluster at {address} has no ranks yet; `echelon status` says what it waits for")
    names = ("replica", "pipeline", "data", "tensor", "expert")
    replicas, pipeline, data, tensor, expert = (1 + max(getattr(rank, name) for rank in ranks) for name in names)
    return Degrees(replicas=replicas, pipeline=pipeline, data=data, tensor=tensor, expert=expert)


def _cached_tokens(client: Client) -> int:
    return sum(replica.counters.get("cached_tokens", 0) for replica in client.cluster().replicas)


def _reason(text: str) -> str:
    """What the server said last, or all that is known."""
    told = [line for line in text.splitlines() if line.startswith("echelon: error:")]
    return told[-1].removeprefix("echelon: error:").strip() if told else text
