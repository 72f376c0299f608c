"""When to strike: moments of serving and of a recovery, told by two looks at a cluster.

Pure, but for what waits, which looks again and again. A look tells what has happened, not what will: a moment is over
when it is seen, and the next of its kind begins. What a strike hit in fact is judged afterwards, in `outcome.py`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Literal, get_args

from echelon.errors import EchelonError
from echelon.internal.processes import written_bytes
from echelon.types import Cluster

Moment = Literal["prefill", "decode", "journal", "form", "load", "replay"]

ORDER = get_args(Moment)
RECOVERY = ("form", "load", "replay")
JOURNAL = "journal"  # the folder of the files that the coordinator writes records to
LOOK_PAUSE_S = 0.002  # a tiny model's load is over in 50 ms

_COUNTERS = {"prefill": "prefill_chunks", "decode": "decode_rows", "replay": "replayed_requests"}
_FORMING = ("launching", "forming")


def reached(moment: str, before: Cluster, now: Cluster) -> bool:
    """Whether the moment has come between two looks. journal cannot be seen so, and is never reached.

    prefill, decode, replay: a step with such rows has run. form: the ranks of an epoch are there and meet. load: one
    of them loads.
    """
    if moment in _COUNTERS:
        return rows(_COUNTERS[moment], now) > rows(_COUNTERS[moment], before, now)
    forming = {replica.index for replica in now.replicas if replica.state in _FORMING}
    states = {rank.state for rank in now.ranks if rank.replica in forming}
    return bool(states) if moment == "form" else moment == "load" and "loading" in states


def rows(counter: str, cluster: Cluster, epochs_of: Cluster | None = None) -> int:
    """A counter of all replicas that serve; with `epochs_of` of those alone that are in the same epoch there.

    One that does not serve yet still shows what its last engine had counted.
    """
    epochs = {(replica.index, replica.epoch) for replica in (epochs_of or cluster).replicas}
    serving = [replica for replica in cluster.replicas if replica.state == "ready"]
    counting = [replica for replica in serving if (replica.index, replica.epoch) in epochs]
    return sum(replica.counters.get(counter, 0) for replica in counting)


def wait_for(
    moment: str, look: Callable[[], Cluster], before: Cluster, timeout_s: float, pause_s: float = LOOK_PAUSE_S
) -> Cluster:
    """The first look at which the moment has come. A coordinator that is away is looked for again.

    Raises TimeoutError.
    """
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        with contextlib.suppress(EchelonError):
            if reached(moment, before, now := look()):
                return now
        time.sleep(pause_s)
    raise TimeoutError(f"waited {timeout_s:g} s for {moment}, which did not come")


def wait_journal(coordinator_pid: int, timeout_s: float) -> None:
    """Until the coordinator, a process of this machine, has just written to its journal. Raises TimeoutError."""
    deadline_s = time.monotonic() + timeout_s
    before_bytes = written_bytes(coordinator_pid, JOURNAL)
    while written_bytes(coordinator_pid, JOURNAL) == before_bytes:
        if time.monotonic() >= deadline_s:
            raise TimeoutError(f"waited {timeout_s:g} s for journal, to which {coordinator_pid} wrote nothing")
