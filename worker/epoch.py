"""What a rank holds while it serves one epoch, built in the same order on every rank.

Groups, model, weights, cache, and the way plans come in: from the leader's socket, or on the leader itself from its
engine. Runs in a thread of the rank process; blocks until all ranks of the replica have met. Decides nothing.
"""

from __future__ import annotations

import queue
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import structlog
import torch
from llguidance import LLTokenizer

from echelon.internal.link import Fence
from echelon.internal.v1 import control_pb2
from models.config import ModelConfig, read_model_config, with_prediction
from models.constraints import constraint_tokenizer
from models.decoder import DecoderModel
from models.expert_load import ExpertLoads
from models.registry import build_model
from models.tables import held_layers
from parallel import mesh
from parallel.context import ParallelContext
from parallel.degrees import Degrees
from worker.checkpoint.held import HeldShard
from worker.cuda_capture import CudaCapture
from worker.decode_graphs import agreed, graph_sizes, refusal
from worker.engine import EngineCore, EngineLimits
from worker.expert_news import ExpertLoadNews
from worker.kv_cache import KVCache
from worker.later_graphs import Later
from worker.limits import decode_places
from worker.matchers import Matchers
from worker.memory import free_memory_bytes, has_settled, settle_kv_blocks
from worker.op_log import OpLog
from worker.plan import DRAIN
from worker.plan_socket import PlanReceiver, PlanServer
from worker.runner import Runner, RunnerLimits
from worker.spec import RankSpec
from worker.stage import Stage
from worker.weights import Loaded, bring_weights

MEET_TIMEOUT_S = 60.0
SEND_TIMEOUT_S = 30.0  # a rank that takes no plan for so long is wedged; two plans always fit its socket


log = structlog.get_logger("rank")

SendPlans = Callable[[Sequence[bytes]], None]  # one payload for each data rank, or one for all


@dataclass(frozen=True, slots=True)
class Lead:
    """What rank 0 holds besides: the engine, and the way its plans go to every rank. send_plans raises OSError.

    After end_plans every rank comes to the end of its plans behind the last that was sent.
    """

    core: EngineCore
    send_plans: SendPlans
    end_plans: Callable[[], None]


@dataclass(frozen=True, slots=True)
class Epoch:
    """A rank that is ready to serve. plans blocks for the next one and raises OSError when the leader is gone.

    ready: what it holds, and what ranks have settled on. layout: what the coordinator calls the way it was formed.
    took_s: of each part of forming it. Closing resources ends plans and groups, and what waits in them fails.
    """

    fence: Fence
    stage: Stage
    plans: Iterable[bytes]
    lead: Lead | None
    loaded: Loaded
    ready: control_pb2.RankReady
    op_log: OpLog | None
    expert_loads: ExpertLoadNews
    layout: str
    took_s: Mapping[str, float]
    resources: ExitStack


def form_epoch(
    spec: RankSpec,
    fence: Fence,
    command: control_pb2.FormEpoch,
    device: torch.device,
    progress: Callable[[int, int], None],
    compiling: Callable[[], AbstractContextManager[None]],
    captured: Callable[[Later], None],
    held: HeldShard | None = None,
) -> Epoch:
    """Meet the other ranks and load. held: a shard that is ready to be fetched.

    progress(loaded_bytes, total_bytes) is called after each tensor. compiling: entered, in any thread, before what
    holds the interpreter for long while the epoch serves. captured: called when graphs are that were left for then.
    """
    laps = Laps()
    config = _model_config(command)
    laps.end("config")
    context = _meet(spec, fence, command, device)
    resources = ExitStack()
    resources.callback(mesh.close, context)
    laps.end("groups")
    model = build_model(config, context)
    laps.end("model")
    loaded = bring_weights(model, config, command, context, progress, held)
    if loaded.writer is not None:
        resources.callback(loaded.writer.cancel)
    laps.end("weights")
    matchers = _matchers(config, Path(command.model_path), compiling)
    resources.callback(matchers.close)
    no_graphs = agreed(refusal(command.cuda_graphs, device, context.dtype), context.replica)
    runner, ready = _runner(model, config, context, command, matchers, not no_graphs, laps)
    later = _prepare_graphs(runner, command, context, no_graphs, resources, captured)
    laps.end("graphs")
    leads = spec.rank == 0
    plans, lead = _lead(spec, fence, command, later) if leads else (_follow(spec, fence, command, resources), None)
    if lead is not None:
        resources.callback(lead.end_plans)
    stage = Stage(runner, context.place, command.pipeline_depth)
    op_log = None
    if command.trace_dir:
        op_log = OpLog(Path(command.trace_dir), fence.replica, fence.epoch, context.place, runner.clock)
        resources.callback(op_log.close)
    laps.end("plans")
    loads = ExpertLoadNews(ExpertLoads(model, context, held_layers(config, context.place).start))
    return Epoch(fence, stage, plans, lead, loaded, ready, op_log, loads, command.layout, laps.took_s, resources)


def _runner(
    model: DecoderModel,
    config: ModelConfig,
    context: ParallelContext,
    command: control_pb2.FormEpoch,
    matchers: Matchers,
    graphs: bool,
    laps: Laps,
) -> tuple[Runner, control_pb2.RankReady]:
    """Over a cache of as many blocks as all ranks can have, which from now on the command says."""
    command.kv_blocks, reserved = settle_kv_blocks(model, config, context, command, matchers, graphs)
    laps.end("largest_step")
    kv_cache = KVCache(config, context, command.kv_blocks, command.block_tokens, padded=graphs)
    limits = RunnerLimits(command.max_running, command.max_context, command.block_tokens)
    ready = control_pb2.RankReady(parameter_bytes=model.resident_bytes, kv_bytes=kv_cache.resident_bytes)
    ready.settled.CopyFrom(control_pb2.Settled(reserved_blocks=reserved, graphs=graphs))
    runner = Runner(model, kv_cache, context, limits, matchers)
    laps.end("cache")
    return runner, ready


def _prepare_graphs(
    runner: Runner,
    command: control_pb2.FormEpoch,
    context: ParallelContext,
    refused: str,
    resources: ExitStack,
    captured: Callable[[Later], None],
) -> tuple[int, ...]:
    """Capture graphs of all sizes, or return those that are left for plans to ask for: where an epoch is formed again
    streams wait for it, and what graphs take is known. refused: why none is captured, if none is; told once a replica.
    """
    resources.callback(runner.reset_graphs)  # before the groups are closed, which were entered before
    said = log if context.place.rank == 0 else None
    if refused:
        if said is not None:
            said.info("decode steps run without CUDA graphs", reason=refused)
        return ()
    began_s, before = time.monotonic(), free_memory_bytes(context.device)
    sizes = graph_sizes(decode_places(command.max_running, command.speculation_tokens))
    if has_settled(command, graphs=True):
        runner.capture_later(CudaCapture(context.device), sizes, captured)
        return sizes
    runner.capture_graphs(CudaCapture(context.device), sizes)
    taken_bytes = before - free_memory_bytes(context.device)
    if said is not None:
        took_s = round(time.monotonic() - began_s, 2)
        said.info("captured decode steps as CUDA graphs", count=len(sizes), took_s=took_s, bytes=taken_bytes)
    return ()


class Laps:
    """How long each of several parts took, one after the other."""

    def __init__(self) -> None:
        self._began_s = time.monotonic()
        self.took_s: dict[str, float] = {}

    def end(self, part: str) -> None:
        now_s = time.monotonic()
        self.took_s[part] = now_s - self._began_s
        self._began_s = now_s


def _model_config(command: control_pb2.FormEpoch) -> ModelConfig:
    config = read_model_config(Path(command.model_path), command.max_context, keep_float8=command.keep_float8)
    return with_prediction(config) if command.predicts else config


def _meet(spec: RankSpec, fence: Fence, command: control_pb2.FormEpoch, device: torch.device) -> ParallelContext:
    return mesh.form_context(
        store_address=command.store_address,
        prefix=f"replica-{fence.replica}",
        epoch=fence.epoch,
        place=degrees_of(command).place(spec.rank),
        device=device,
        dtype=getattr(torch, command.dtype),
        timeout_s=MEET_TIMEOUT_S,
        depth=command.pipeline_depth,
    )


def degrees_of(command: control_pb2.FormEpoch) -> Degrees:
    """The replica's."""
    return Degrees(
        pipeline=command.pipeline,
        data=command.data,
        tensor=command.tensor,
        expert=command.expert,
        redundant_experts=command.redundant_experts,
    )


def private_host(coordinator_address: str) -> str:
    """The address of this host on the interface that faces the coordinator."""
    host, _, port = coordinator_address.rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, int(port)))  # a datagram socket sends nothing on connect
        return str(probe.getsockname()[0])


def _matchers(config: ModelConfig, directory: Path, compiling: Callable[[], AbstractContextManager[None]]) -> Matchers:
    """Constraints over the model's vocabulary, which is read when the first of them comes."""

    def make_tokenizer() -> LLTokenizer:
        with compiling():
            return constraint_tokenizer(directory, config.vocab_size, config.end_ids)

    return Matchers(make_tokenizer, torch.get_num_threads())


def _lead(
    spec: RankSpec, fence: Fence, command: control_pb2.FormEpoch, captures: tuple[int, ...]
) -> tuple[Iterable[bytes], Lead]:
    """Rank 0: an engine whose plans go to the others by socket, and to itself by a queue."""
    degrees = degrees_of(command)
    others = frozenset(range(1, degrees.replica_ranks))
    server = PlanServer(fence, others, private_host(spec.coordinator_address))
    mesh.publish(command.store_address, _plan_key(fence), server.address)
    server.accept(MEET_TIMEOUT_S)
    own: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    def send(payloads: Sequence[bytes]) -> None:
        server.send(lambda rank: payloads[degrees.place(rank).data_rank % len(payloads)], SEND_TIMEOUT_S)
        own.put(payloads[0])

    def end() -> None:
        with suppress(OSError):
            send([DRAIN])  # stages take in what is on its way back
        server.close()
        own.put(None)

    limits = EngineLimits(
        max_running=command.max_running,
        kv_blocks=command.kv_blocks,
        block_tokens=command.block_tokens,
        max_step_tokens=command.max_step_tokens,
        max_context=command.max_context,
        stages=command.pipeline,
        depth=command.pipeline_depth,
        data=command.data,
        rebalance_steps=command.rebalance_steps,
        speculation_tokens=command.speculation_tokens,
        predicts=command.predicts,
        captures=captures,
    )
    return iter(own.get, None), Lead(EngineCore(fence, limits), send, end)


def _follow(spec: RankSpec, fence: Fence, command: control_pb2.FormEpoch, resources: ExitStack) -> Iterable[bytes]:
    address = mesh.lookup(command.store_address, _plan_key(fence), MEET_TIMEOUT_S)
    receiver = PlanReceiver(address, spec.rank, fence, MEET_TIMEOUT_S)
    resources.callback(receiver.close)
    return receiver


def _plan_key(fence: Fence) -> str:
    """Where in the epoch's store the leader says which address its plans come from."""
    return f"replica-{fence.replica}/epoch-{fence.epoch}/plans"
