"""Steady decode through the leader's own loop, profiled: does the thread that launches steps wait, does the device?

    python -m benchmarks.trace_decode [--gpus 2] [--rows 1 64] [--output trace.json] [--keep folder]
    python -m benchmarks.trace_decode --device cpu --scale 16 --layers 2 --rows 2 --steps 20    # no graph, no profile

Random weights in memory. Each rank is a process with the epoch's own engine, leader, stage and threads; a stand-in for
the coordinator hands out requests and acknowledges reports over gRPC. For each number of rows first steps without a
profile (tokens_s, host_us: of the launching thread a step, from a plan to its work queued; engine_us: of the engine
and the encoding of plans), then at least 100 with it, of every rank (benchmarks/trace_steps.py says what each figure
is). A table, and one JSON line for each number of rows, which --output keeps. --keep: the whole traces.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc.aio
import torch

from benchmarks.decode_graph_work import BLOCK_TOKENS, Bench
from benchmarks.trace_watch import Watch, measure, profiled
from echelon.internal import wire
from echelon.internal.link import Abandon, Assign, Command, Fence, Progress, Sampling
from echelon.internal.v1 import control_pb2, link_pb2, link_pb2_grpc
from parallel.degrees import Degrees
from parallel.mesh import close, form_context, open_store
from worker.epoch import Epoch, _follow, _lead
from worker.leader import Leader
from worker.matchers import Matchers
from worker.plan import StepResult
from worker.spec import RankSpec
from worker.stage import Stage
from worker.steps import Steps

FENCE = Fence(0, 0, 1)
CASES = {1: ("qwen3-8b", Degrees()), 2: ("deepseek-v2-lite", Degrees(tensor=2, expert=2))}
MODELS = ("qwen3-8b", "qwen3-30b-a3b", "deepseek-v2-lite")
PROMPT_TOKENS = 16
RANKS_S = 85.0
ASKED = ("rank", "rows", "tokens_s")
COLUMNS = (
    *ASKED,
    "step_us",
    "host_us",
    "engine_us",
    "ahead",
    "waits",
    "blocking_copies",
    "calls",
    "outside",
    "idle_us",
)


class Coordinator(link_pb2_grpc.ReplicaLinkServicer):
    """Hands out what `ask` says over the only link, and acknowledges every report. On the loop of the leader."""

    def __init__(self) -> None:
        self.commands: asyncio.Queue[Command] = asyncio.Queue()
        self._acked = 0

    async def Serve(
        self, request_iterator: AsyncIterator[link_pb2.ReplicaReport], context: object
    ) -> AsyncIterator[link_pb2.ReplicaCommand]:
        async def acknowledge() -> None:
            async for report in request_iterator:
                self._acked = max(self._acked, report.report_seq)
                await self.commands.put(Command(FENCE, self._acked))

        reading = asyncio.create_task(acknowledge())
        try:
            while True:
                yield wire.command_to_proto(await self.commands.get())
        finally:
            reading.cancel()


def as_rank(model: str, degrees: Degrees, arguments: argparse.Namespace) -> None:
    """In a process of its own; every rank prints a line for each number of rows."""
    device = torch.device("cuda", 0) if arguments.device == "cuda" else torch.device("cpu")
    place = degrees.place(arguments.rank)
    context = form_context(arguments.store, "trace", FENCE.epoch, place, device, torch.bfloat16, 60.0, come_s=60.0)
    matchers = Matchers(lambda: cast(Any, None), 1)
    options = argparse.Namespace(**vars(arguments) | {"rows": [max(arguments.rows) + 1]})
    bench = Bench(model, arguments.layers, context, options, matchers)
    bench.capture()
    with profiled(arguments, None):  # the first profile of a process takes its time
        torch.zeros(1, device=device)
    watch = Watch()
    bench.runner.forward = watch.time("host_us", bench.runner.forward)  # type: ignore[method-assign]
    asyncio.run(_serve(bench, Stage(bench.runner, place, 1), degrees, arguments, watch))
    matchers.close()
    bench.runner.reset_graphs()
    close(context)


async def _serve(bench: Bench, stage: Stage, degrees: Degrees, arguments: argparse.Namespace, watch: Watch) -> None:
    coordinator, server, loop = Coordinator(), grpc.aio.server(), asyncio.get_running_loop()
    link_pb2_grpc.add_ReplicaLinkServicer_to_server(coordinator, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    address, command = f"127.0.0.1:{port}", _command(bench, degrees, arguments)
    spec = RankSpec(
        coordinator_address=address,
        cluster="trace",
        replica=0,
        rank=arguments.rank,
        incarnation="",
        device=arguments.device,
        heartbeat_s=1.0,
        term=0,
    )
    leads, taken = arguments.rank == 0, watch.count
    resources = SimpleNamespace(callback=lambda call: None)
    if leads:
        plans, lead = await asyncio.to_thread(_lead, spec, FENCE, command, ())
        lead.core.step = watch.time("engine_us", lead.core.step)  # type: ignore[method-assign]
        leader = Leader(lead.core, address, lead.send_plans, lambda: FENCE.term, lambda broken: os._exit(1))
        leading = asyncio.create_task(leader.run())

        def taken(result: StepResult) -> None:
            loop.call_soon_threadsafe(leader.completed, result)
            watch.count(result)
    else:
        plans = await asyncio.to_thread(_follow, spec, FENCE, command, cast(Any, resources))
    epoch = cast(Epoch, SimpleNamespace(plans=plans, stage=stage, op_log=None))
    Steps(epoch, taken, lambda error: print(f"{error!r}", file=sys.stderr, flush=True)).start()
    for rows in arguments.rows:
        if leads:
            await coordinator.commands.put(
                Command(FENCE, 0, tuple(_ask(rows, number, arguments) for number in range(rows)))
            )
        found = await asyncio.to_thread(measure, rows, arguments, watch)
        print(json.dumps({"rank": arguments.rank, "rows": rows, **found}), flush=True)
        if leads:
            abandons = tuple(Abandon(f"{rows}-{number}", 1) for number in range(rows))
            await coordinator.commands.put(Command(FENCE, 0, (), abandons))
        await asyncio.sleep(1.0)  # what was planned has run
        await asyncio.to_thread(bench._context.replica.barrier)
    if leads:
        leading.cancel()
        lead.end_plans()
    await server.stop(0)


def _command(bench: Bench, degrees: Degrees, arguments: argparse.Namespace) -> control_pb2.FormEpoch:
    """As a coordinator tells it, as far as plans depend on it."""
    return control_pb2.FormEpoch(
        store_address=arguments.store,
        tensor=degrees.tensor,
        data=degrees.data,
        expert=degrees.expert,
        pipeline=1,
        pipeline_depth=1,
        kv_blocks=bench._blocks,
        block_tokens=BLOCK_TOKENS,
        max_running=arguments.max_running,
        max_step_tokens=2048,
        max_context=arguments.context,
    )


def _ask(rows: int, number: int, arguments: argparse.Namespace) -> Assign:
    tokens = arguments.context - PROMPT_TOKENS
    sampling = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_tokens=tokens, seed=0)
    return Assign(f"{rows}-{number}", 1, (number + 2,) * PROMPT_TOKENS, (Progress(0),), sampling)


def run(arguments: argparse.Namespace, words: Sequence[str]) -> list[dict[str, Any]]:
    """All ranks, each in a process; what they have told."""
    _, degrees = _case(arguments)
    store, address = open_store("127.0.0.1")
    deadline_s, ranks = time.monotonic() + RANKS_S, []
    for rank in range(degrees.replica_ranks):
        command = [sys.executable, "-m", "benchmarks.trace_decode", *words, "--rank", str(rank), "--store", address]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": str(rank)}
        ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    told = []
    for process in ranks:
        try:
            output, _ = process.communicate(timeout=max(deadline_s - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
        told += [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    del store
    return told


def _case(arguments: argparse.Namespace) -> tuple[str, Degrees]:
    model, degrees = CASES[arguments.gpus]
    if arguments.model is None:
        return model, degrees
    return arguments.model, Degrees() if arguments.gpus == 1 else Degrees(tensor=2)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpus", type=int, choices=sorted(CASES), default=1)
    parser.add_argument(
        "--model", choices=MODELS, help="default: qwen3-8b on one, deepseek-v2-lite on two, with experts shared"
    )
    parser.add_argument("--rows", nargs="+", type=int, default=[1])
    parser.add_argument("--steps", type=int, default=140, help="that are measured, without a profile and with it")
    parser.add_argument("--context", type=int, default=4096, help="tokens of a request, none of which may end before")
    parser.add_argument("--layers", type=int, help="default: all")
    parser.add_argument("--max-running", type=int, default=64)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--scale", type=int, default=1, help="divides sizes, for a machine that is to try the script")
    parser.add_argument("--output", type=Path, help="a file for the JSON lines")
    parser.add_argument("--keep", type=Path, help="a folder for the traces")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    model, degrees = _case(arguments)
    if arguments.rank is not None:
        as_rank(model, degrees, arguments)
        return
    told = run(arguments, sys.argv[1:])
    print(f"{model}, {degrees}")
    print(*(f"{name:>{len(name) + 2}}" for name in COLUMNS))
    for line in told:
        print(*(f"{line.get(name, '-')!s:>{len(name) + 2}}" for name in COLUMNS))
    lines = [json.dumps({"model": model, "gpus": arguments.gpus, **line}) for line in told]
    print("\n".join(lines))
    if arguments.output is not None:
        arguments.output.write_text("".join(f"{line}\n" for line in lines))
    sys.exit(len(told) != degrees.replica_ranks * len(arguments.rows))


if __name__ == "__main__":
    main()
