"""How long a stream stands still when a process dies: a rank, the leader, the coordinator, each by SIGKILL.

    python benchmarks/faults.py --model DIR [--tensor 2] [--device cuda] [--dtype float32] [--nodes]

With --nodes the ranks run on one of two nodes beside Ray's head, and what dies is also the agent of that node, the
whole node, Ray's GCS, and the raylet of its head.

One greedy stream a fault; the gap is its longest silence after the signal, at the client. One JSON line a fault, which
also says how many tokens equal those of an undisturbed run (all of them, where the arithmetic repeats itself).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import time
from pathlib import Path

from echelon import SamplingParams
from echelon.testing import LocalCluster, Victim
from echelon.types import Cluster

PROMPT = "Geese fly so, cyclists ride so in a crosswind"
TOKENS, KILL_AT = 300, 60
GREEDY = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
VICTIMS: dict[str, Victim] = {"rank": 1, "leader": 0, "coordinator": "coordinator"}
OF_NODES = ("agent", "node", "gcs", "raylet")
JOIN_TIMEOUT_S = 120.0


def strike(cluster: LocalCluster, name: str, undisturbed: tuple[int, ...]) -> dict[str, object]:
    """Kill one process in the middle of a stream."""
    before = cluster.status()
    ids: list[int] = []
    last_s, gap_s = 0.0, 0.0
    for event in cluster.client().stream(PROMPT, sampling=GREEDY):
        ids.extend(event.token_ids)
        if not last_s and len(ids) >= KILL_AT:
            kill(cluster, name)
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


def kill(cluster: LocalCluster, name: str) -> None:
    """SIGKILL to what the name means now."""
    if name in VICTIMS:
        cluster.kill(VICTIMS[name])
        return
    head, *others = (node for node in cluster.nodes() if node.state == "alive")
    leads = next((node for node in others if node.node_id == cluster.ranks()[0].node_id), head)
    match name:
        case "agent":
            os.kill(leads.agent_pid, signal.SIGKILL)
        case "node":
            cluster.kill(leads)
        case "gcs":
            cluster.kill("gcs")
        case "raylet":
            os.kill(head.raylet_pid, signal.SIGKILL)


def wait_nodes(cluster: LocalCluster) -> None:
    """Until ranks can be placed on every node that lives."""

    def joined(_: Cluster) -> bool:
        told = {event.subject for event in cluster.events() if event.kind == "node.joined"}
        return all(f"node/{node.node_id}" in told for node in cluster.nodes() if node.state == "alive")

    cluster.wait(joined, "all nodes", JOIN_TIMEOUT_S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tensor", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--nodes", action="store_true")
    arguments = parser.parse_args()
    names = [name for name, victim in VICTIMS.items() if not isinstance(victim, int) or victim < arguments.tensor]
    flags = {"tensor": arguments.tensor, "device": arguments.device, "dtype": arguments.dtype, "max_context": 2048}
    nodes = (0, arguments.tensor, arguments.tensor) if arguments.nodes else 1
    with LocalCluster(arguments.model, nodes=nodes, **flags) as cluster:
        undisturbed = cluster.client().generate(PROMPT, sampling=GREEDY).token_ids
        for name in [*names, *(OF_NODES if arguments.nodes else ())]:
            if arguments.nodes:
                wait_nodes(cluster)
            print(json.dumps(strike(cluster, name, undisturbed)), flush=True)


if __name__ == "__main__":
    main()
