"""Ranks of one replica as threads of the test's process, over gloo: for what needs groups and no processes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from parallel.context import ParallelContext
from parallel.degrees import Degrees
from parallel.mesh import close, form_context, open_store

T = TypeVar("T")
TIMEOUT_S = 30.0


def as_ranks(
    degrees: Degrees, work: Callable[[ParallelContext], T], dtype: torch.dtype = torch.float64, epoch: int = 1
) -> list[T]:
    """What a function returns as each rank of a replica, in the order of ranks."""
    store, address = open_store("127.0.0.1")

    def as_rank(rank: int) -> T:
        place = degrees.place(rank)
        context = form_context(
            address, "test", epoch, place, torch.device("cpu"), dtype, timeout_s=TIMEOUT_S, come_s=TIMEOUT_S
        )
        try:
            found = work(context)
            context.replica.barrier()
            return found
        finally:
            close(context)

    with ThreadPoolExecutor(degrees.replica_ranks) as pool:
        found = list(pool.map(as_rank, range(degrees.replica_ranks)))
    del store
    return found
