"""How long streams stand still when a rank dies under load, by phase of the recovery.

    python benchmarks/recovery.py --model DIR --layout tensor=2 [--device cuda --dtype bfloat16] [--spares 2]

Streams are greedy and have random prompts; once each has some tokens, a rank is killed (SIGKILL), then, when all is as
before, the leader. Times are seconds since the signal: of the cluster's events, and of the first and the last stream's
next token at the client. One JSON line a death. Every stream must come to its end with all its tokens. Where graphs
are captured while it serves, `graphs` is when the last rank had all of them, and `captured` how long steps waited.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.layouts_session import DEGREES
from echelon import AsyncClient
from echelon.testing import LocalCluster, Victim
from echelon.types import ClusterEvent
from models.config import read_model_config

STRUCK_AT, VICTIMS = 32, ("rank", "leader")  # each stream has so many tokens by then
RECOVERY_LIMIT_S, SETTLE_LIMIT_S = 120.0, 120.0
HOLD_S = 7.0  # spares are asked, and told of the shard, each 5 s
PHASES = {
    "rank.lost": "detected",
    "replica.gone": "killed",
    "spare.started": "handed over",
    "replica.forming": "attached",
    "weights.loaded": "loaded",
    "replica.ready": "serves",
    "graphs.captured": "graphs",
    "graphs.refused": "graphs",
}


@dataclass(slots=True)
class Stream:
    """One request at the client: when tokens came, since 1970, and how many."""

    arrivals: list[tuple[float, int]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(count for _, count in self.arrivals)

    def resumed_s(self, struck_s: float, ready_s: float) -> float:
        """The first token of the new epoch, since the strike. Raises StopIteration where none came."""
        return next(at_s for at_s, _ in self.arrivals if at_s > ready_s) - struck_s


@dataclass(frozen=True, slots=True)
class Load:
    """What runs while a rank dies."""

    streams: int
    prompt_tokens: int
    output_tokens: int
    vocabulary: int


async def read(client: AsyncClient, prompt: Sequence[int], tokens: int, into: Stream) -> None:
    """One stream to its end."""
    async for event in client.stream(token_ids=prompt, max_tokens=tokens, temperature=0.0, ignore_eos=True):
        into.arrivals.append((time.time(), len(event.token_ids)))


async def struck(cluster: LocalCluster, load: Load, victim: Victim, seed: int) -> tuple[float, list[Stream]]:
    """All streams, and when the victim was killed in their middle."""
    draw = random.Random(seed)
    streams = [Stream() for _ in range(load.streams)]
    async with AsyncClient(cluster.target) as client, asyncio.TaskGroup() as readers:
        for stream in streams:
            prompt = [draw.randrange(load.vocabulary) for _ in range(load.prompt_tokens)]
            readers.create_task(read(client, prompt, load.output_tokens, stream))
        async with asyncio.timeout(RECOVERY_LIMIT_S):
            while min(stream.tokens for stream in streams) < STRUCK_AT:
                await asyncio.sleep(0.01)
        await asyncio.to_thread(cluster.kill, victim)
        struck_s = time.time()
    return struck_s, streams


def phases(events: Sequence[ClusterEvent], struck_s: float) -> dict[str, float]:
    """Until all of each kind had come."""
    last: dict[str, float] = {}
    for event in events:
        if event.unix_s > struck_s and (phase := PHASES.get(event.kind)):
            last[phase] = round(event.unix_s - struck_s, 3)
    return last


def strike(cluster: LocalCluster, load: Load, victim: str, seed: int) -> dict[str, object]:
    """Kill one process under all streams."""
    before = cluster.status()
    asked_s = time.time()
    struck_s, streams = asyncio.run(struck(cluster, load, 1 if victim == "rank" else "leader", seed))
    after, events = cluster.status(), cluster.events()
    assert all(stream.tokens == load.output_tokens for stream in streams), [stream.tokens for stream in streams]
    ready_s = next(event.unix_s for event in events if event.kind == "replica.ready" and event.unix_s > struck_s)
    resumed = sorted(stream.resumed_s(struck_s, ready_s) for stream in streams)
    replayed = [event for event in events if event.kind == "request.replayed" and event.unix_s > struck_s]
    formed = [dict(event.detail) for event in events if event.kind == "rank.formed" and event.unix_s > struck_s]
    captured = [dict(event.detail) for event in events if event.kind.startswith("graphs.") and event.unix_s > struck_s]
    loads = [event.detail for event in events if event.kind == "weights.loaded" and event.unix_s > struck_s]
    return {
        "killed": victim,
        "phases_s": phases(events, struck_s),
        "first_token_s": round(resumed[0], 3),
        "middle_token_s": round(resumed[len(resumed) // 2], 3),
        "last_token_s": round(resumed[-1], 3),
        "weights": [f"{one['origin']} {float(str(one['took_s'])):.2f} s" for one in loads],
        "formed": formed,
        "captured": captured,
        "first_tokens_took_s": round(max(stream.arrivals[0][0] for stream in streams) - asked_s, 3),
        "recomputed_tokens": sum(int(str(event.detail["recomputed_tokens"])) for event in replayed),
        "epoch": [before.replicas[0].epoch, after.replicas[0].epoch],
        "kv_bytes": [[rank.kv_bytes for rank in status.ranks] for status in (before, after)],
    }


def settle(cluster: LocalCluster, ranks: int, spares: int, stores: bool) -> None:
    """Until spares are warm, shards are written, and spares hold them ready."""
    if spares:
        cluster.wait_spares(min(spares, ranks), SETTLE_LIMIT_S)
    deadline_s = time.monotonic() + SETTLE_LIMIT_S
    while stores and time.monotonic() < deadline_s:
        written = {event.subject for event in cluster.events() if event.kind.startswith("shard.")}
        if len(written) == ranks:
            break
        time.sleep(0.2)
    if spares and stores:
        time.sleep(HOLD_S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--layout", default="tensor=2", help="as tensor=2,pipeline=2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--spares", type=int, default=2)
    parser.add_argument("--checkpoint-dir", type=Path)
    parser.add_argument("--load", default="64x512x400", help="streams x prompt tokens x output tokens")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--events", action="store_true", help="print each event of a recovery")
    arguments = parser.parse_args()
    layout = {name: int(value) for name, _, value in (part.partition("=") for part in arguments.layout.split(","))}
    assert set(layout) <= set(DEGREES), f"--layout: one of {set(layout) - set(DEGREES)} is none of {DEGREES}"
    streams, prompt_tokens, output_tokens = (int(part) for part in arguments.load.split("x"))
    load = Load(streams, prompt_tokens, output_tokens, read_model_config(arguments.model).vocab_size)
    flags = layout | {"spares": arguments.spares, "checkpoint_dir": arguments.checkpoint_dir, "max_running": streams}
    with LocalCluster(
        arguments.model,
        device=arguments.device,
        dtype=arguments.dtype,
        max_context=prompt_tokens + output_tokens,
        start_timeout_s=SETTLE_LIMIT_S,
        **flags,
    ) as cluster:
        ranks, told = len(cluster.ranks()), 0
        for number in range(arguments.rounds):
            for victim in VICTIMS:
                settle(cluster, ranks, arguments.spares, arguments.checkpoint_dir is not None)
                told = len(cluster.events())
                found = strike(cluster, load, victim, 2 * number + VICTIMS.index(victim))
                print(json.dumps({"layout": arguments.layout, "load": arguments.load} | found), flush=True)
                if arguments.events:
                    for event in cluster.events()[told:]:
                        if event.kind != "request.replayed":
                            print(f"  {event.unix_s:.3f} {event.kind} {event.subject} {dict(event.detail)}", flush=True)


if __name__ == "__main__":
    main()
