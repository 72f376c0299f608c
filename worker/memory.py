"""How many KV blocks a rank can really have: what the plan allows, less what steps and their graphs take besides.

In rank processes, once an epoch, after the weights are loaded. On CUDA the largest step is run over a cache of one
block and its peak is measured, then what two graphs of decode steps take; on a CPU, whose memory is not ours to fill,
the plan stands. All ranks settle on the smallest answer, which an epoch that is formed the same way takes over. What is
run here compiles all kernels while nobody waits for a step. Knows no request.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from echelon.errors import ConfigError
from echelon.internal.link import Fence, Sampling
from echelon.internal.v1 import control_pb2
from models.config import ModelConfig
from models.decoder import DecoderModel
from models.moe import MixtureOfExperts
from models.tables import kv_bytes_per_block
from parallel.context import ParallelContext
from parallel.float8 import SOME_ROWS
from parallel.linear import LEAST_ROWS
from worker.cuda_capture import CudaCapture
from worker.decode_graphs import graph_sizes
from worker.kv_cache import KVCache
from worker.limits import decode_places
from worker.matchers import Matchers
from worker.plan import Admit, Row, StepPlan, decode, encode
from worker.runner import Runner, RunnerLimits


class KvBlocks(NamedTuple):
    """held: by every rank. reserved: of those planned, what steps and graphs may take."""

    held: int
    reserved: int


def free_memory_bytes(device: torch.device) -> int:
    """What weights and cache may take: free device memory, or available host memory."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable")


def settle_kv_blocks(
    model: DecoderModel,
    config: ModelConfig,
    context: ParallelContext,
    command: control_pb2.FormEpoch,
    matchers: Matchers,
    graphs: bool,
) -> KvBlocks:
    """Blocks for every rank, up to the limit. graphs: whether decode steps will be captured.

    Nothing is run where ranks have settled before: on the same model, limits and nodes, so that kernels are on disk.

    Raises ConfigError when not one request of max_context tokens has room beside a step.
    """
    block_bytes = kv_bytes_per_block(config, context.place, command.block_tokens, context.dtype.itemsize)
    step_bytes = graphs_bytes = 0
    known = has_settled(command, graphs)
    if context.device.type == "cuda" and not known:
        rows = decode_places(command.max_running, command.speculation_tokens)
        limits = RunnerLimits(rows, command.max_context, command.block_tokens)
        cache = KVCache(config, context, 1, command.block_tokens, padded=graphs)
        runner = Runner(model, cache, context, limits, matchers)
        plans = rehearsed_steps(rows, command.max_context, command.max_step_tokens, context.epoch, graphs)
        step_bytes = _peak_bytes(runner, plans, context)
        if graphs:
            graphs_bytes = block_bytes + _graphs_bytes(runner, graph_sizes(rows), context.device)
        del runner, cache
        torch.cuda.empty_cache()
    reserved = command.settled.reserved_blocks if known else -(-(step_bytes + graphs_bytes) // block_bytes)
    own = torch.tensor([command.kv_blocks - reserved], dtype=torch.int64)
    blocks = int(context.replica.all_gather(own).min())
    needed = -(-command.max_context // command.block_tokens)
    if blocks < needed:
        fitting = max(blocks, 0) * command.block_tokens
        raise ConfigError(
            f"no memory for the KV cache: {command.kv_blocks} blocks fit beside the weights; less {step_bytes} bytes "
            f"of the largest step and {graphs_bytes} of CUDA graphs {max(blocks, 0)} blocks of {command.block_tokens} "
            f"tokens are left; one request of max-context {command.max_context} needs {needed}; lower max-context to "
            f"{fitting} or less, or lower max-step-tokens or max-running",
            field="max_context",
        )
    return KvBlocks(min(blocks, command.kv_blocks_limit or blocks), command.kv_blocks - blocks)


def has_settled(command: control_pb2.FormEpoch, graphs: bool) -> bool:
    """Whether it is known from an earlier epoch what steps take, and graphs if there are to be any."""
    return command.HasField("settled") and command.settled.graphs >= graphs


def rehearsed_steps(
    max_running: int, max_context: int, max_step_tokens: int, epoch: int, graphs: bool
) -> list[StepPlan]:
    """The largest step, and small ones, for which kernels are cut otherwise. graphs: whether some will be captured."""
    sizes = [tokens for tokens in (*LEAST_ROWS, SOME_ROWS) if tokens < max_step_tokens]
    plans = [largest_step(min(tokens, max_running), max_context, tokens, epoch) for tokens in (max_step_tokens, *sizes)]
    if not graphs:  # the graph of one row, over the widest table, compiles what a lone step would
        plans.append(lone_step(max_context, epoch))
    return plans


def rehearse(runner: Runner, plans: Iterable[StepPlan], context: ParallelContext) -> None:
    """Run these, and what no plan is sure to meet: kernels of experts are cut by how many rows choose them, and that of
    the head by how many are sampled.

    A kernel is compiled when it is first launched, for seconds. Here the rank loads; in a step that others of its kind
    have been faster than, it would count as one that stands still.
    """
    model = runner.model
    row = torch.zeros(1, model.config.hidden_size, dtype=context.dtype, device=context.device)
    for layer in model.layers:
        if isinstance(layer.mlp, MixtureOfExperts):
            layer.mlp.try_kernels(row)
    if model.norm is not None:
        for rows in LEAST_ROWS:
            model.row_logits(model.norm.weight.new_zeros(rows, model.config.hidden_size))
    for plan in plans:
        runner.run(decode(encode(plan)))


def largest_step(max_running: int, max_context: int, max_step_tokens: int, epoch: int) -> StepPlan:
    """As many slots as it takes prefill the longest chunks; all others decode at the end of their contexts, by the
    costliest rules."""
    sampling = Sampling(
        temperature=1.0, top_p=0.9, top_k=0, max_tokens=1, seed=0, repetition_penalty=1.1, presence_penalty=0.1
    )
    context = max(max_context - 1, 1)  # what the last id of all is drawn from
    chunks = min(max_running, max(1, math.ceil((max_step_tokens - max_running) / max(context - 1, 1))))
    decoding = max(0, min(max_running, max_step_tokens) - chunks)
    rows = [Row(slot, context - 1, 1, None, True, 0) for slot in range(decoding)]
    left = max_step_tokens - decoding
    while left and len(rows) < max_running:
        chunk = min(left, context)
        rows.append(Row(len(rows), context - chunk, chunk, (0,) * chunk, True, 0))
        left -= chunk
    admits = tuple(Admit(row.slot, 0, 1, sampling) for row in rows)
    return StepPlan(Fence(0, 0, epoch), 1, admits, (), tuple(rows))


def lone_step(max_context: int, epoch: int) -> StepPlan:
    """One slot decodes at the end of its context: no other row is cut into as many pieces, which are then joined."""
    last = max(max_context - 2, 0)
    row, sampling = Row(0, last, 1, None, True), Sampling(temperature=0.0, top_p=1.0, top_k=0, max_tokens=1, seed=0)
    return StepPlan(Fence(0, 0, epoch), 2, (Admit(0, 0, 1, sampling),), (), (row,))


def _peak_bytes(runner: Runner, plans: Iterable[StepPlan], context: ParallelContext) -> int:
    """Device bytes that the steps take at their peak. Block tables start as zeros, so that all rows read block 0."""
    before = torch.cuda.memory_allocated(context.device)
    torch.cuda.reset_peak_memory_stats(context.device)
    rehearse(runner, plans, context)
    return torch.cuda.max_memory_allocated(context.device) - before


def _graphs_bytes(runner: Runner, sizes: Sequence[int], device: torch.device) -> int:
    """Device bytes of graphs of all these sizes: the largest brings what all share, and each other one as much as the
    smallest. The runner is of no use afterwards."""
    capture, taken = CudaCapture(device), []
    for size in (sizes[-1], sizes[0]):
        torch.cuda.empty_cache()
        before = free_memory_bytes(device)
        runner.capture_graphs(capture, (size,))
        torch.cuda.empty_cache()
        taken.append(max(before - free_memory_bytes(device), 0))
    runner.reset_graphs()
    return taken[0] + taken[1] * (len(sizes) - 1)
