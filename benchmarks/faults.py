"""How long a stream stands still when a process dies: a rank, the leader, the coordinator, each by SIGKILL.

    python benchmarks/faults.py --model DIR [--tensor 2] [--device cuda] [--dtype float32]

One greedy stream a fault; the gap is its longest silence after the signal, at the client. One JSON line a fault, which
also says how many tokens equal those of an undisturbed run (all of them, where the arithmetic repeats itself).
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path

from echelon import SamplingParams
from echelon.testing import LocalCluster, Victim

PROMPT = "Geese fly so, cyclists ride so in a crosswind"
TOKENS, KILL_AT = 300, 60
GREEDY = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
VICTIMS: dict[str, Victim] = {"rank": 1, "leader": 0, "coordinator": "coordinator"}


def strike(cluster: LocalCluster, name: str, undisturbed: tuple[int, ...]) -> dict[str, object]:
    """Kill one process in the middle of a stream."""
    before = cluster.status()
    ids: list[int] = []
    last_s, gap_s = 0.0, 0.0
    for event in cluster.client().stream(PROMPT, sampling=GREEDY):
        ids.extend(event.token_ids)
        if not last_s and len(ids) >= KILL_AT:
            cluster.kill(VICTIMS[name])
            last_s = time.monotonic()
        elif last_s:
            gap_s = max(gap_s, time.monotonic() - last_s)
            last_s = time.monotonic()
    after = cluster.status()
    assert len(ids) == TOKENS, f"{len(ids)} of {TOKENS} tokens came"
    equal = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ids, undisturbed, strict=True)))
    return {
        "killed": name,
        "gap_s": round(gap_s, 2),
        "equal_tokens": f"{equal}/{TOKENS}",
        "epoch": [before.replicas[0].epoch, after.replicas[0].epoch],
        "term": [before.term, after.term],
        "same_ranks": [rank.pid for rank in before.ranks] == [rank.pid for rank in after.ranks],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tensor", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    with LocalCluster(
        arguments.model, tensor=arguments.tensor, device=arguments.device, dtype=arguments.dtype, max_context=2048
    ) as cluster:
        undisturbed = cluster.client().generate(PROMPT, sampling=GREEDY).token_ids
        for name, victim in VICTIMS.items():
            if not isinstance(victim, int) or victim < arguments.tensor:
                print(json.dumps(strike(cluster, name, undisturbed)), flush=True)


if __name__ == "__main__":
    main()
