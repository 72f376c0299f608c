"""What benchmarks/decode_graphs.py does on one rank: a model of random weights, its steps with and without graphs.

Weights are the same on all ranks, so that those which all must have are. Every row has stored so many random tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from echelon.internal.link import Fence
from models.batch import ForwardBatch
from models.config import ModelConfig, read_model_config
from models.decoder import DecoderModel
from models.moe import MixtureOfExperts
from models.registry import build_model
from parallel.context import ParallelContext
from parallel.expert import ExchangedExperts, SplitExperts
from worker import memory
from worker.batch import DecodeRows, apply_and_build
from worker.cuda_capture import Capture, CudaCapture
from worker.decode_graphs import DecodeGraphs, graph_sizes
from worker.kv_cache import KVCache
from worker.matchers import Matchers
from worker.plan import PlanTables, Row, StepPlan, decode, encode, lane_of
from worker.runner import Runner, RunnerLimits

BLOCK_TOKENS = 16
GREEDY_STEPS, REPEATS = 8, 20
QWEN3: dict[str, object] = {
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
}
CONFIGS: Mapping[str, dict[str, object]] = {
    "qwen3-8b": QWEN3
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
    },
    "qwen3-30b-a3b": QWEN3
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
    },
    "deepseek-v2-lite": {
        "architectures": ["DeepseekV2ForCausalLM"],
        "first_k_dense_replace": 1,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "kv_lora_rank": 512,
        "max_position_embeddings": 163840,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_attention_heads": 16,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 27,
        "q_lora_rank": None,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False,
        "vocab_size": 102400,
    },
}
SCALED = ("hidden_size", "intermediate_size", "moe_intermediate_size", "vocab_size")


class Again:
    """In place of a graph, where there is no device: the work is done anew."""

    def __init__(self, work: Callable[[], Tensor]) -> None:
        self.replay = work
        self.made = work()

    def reset(self) -> None:
        return None


def config_of(model: str, layers: int | None, scale: int, max_context: int) -> ModelConfig:
    values = dict(CONFIGS[model])
    if layers is not None:
        values["num_hidden_layers"] = layers
    for key in SCALED:
        if key in values:
            values[key] = int(str(values[key])) // scale
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(values))
        return read_model_config(Path(folder), max_context)


class Bench:
    """One rank's runner, whose slots have all stored as many tokens. options: of the command line."""

    def __init__(
        self, model: str, layers: int | None, context: ParallelContext, options: argparse.Namespace, matchers: Matchers
    ) -> None:
        torch.manual_seed(1)
        self._context, self._options = context, options
        max_context = options.context + BLOCK_TOKENS
        self._config = config_of(model, layers, options.scale, max_context)
        self._model = random_model(self._config, context)
        self._limits = RunnerLimits(options.max_running, max_context, BLOCK_TOKENS)
        self._matchers = matchers
        width = -(-max_context // BLOCK_TOKENS)
        self._blocks = max(map(int, options.rows)) * width
        self._cache, self.runner = self._new_runner(self._blocks)
        for stored in (*self._cache.keys, *self._cache.values):
            stored.normal_()
        state = self.runner._state
        self._places = torch.randperm(self._blocks, device=context.device).view(-1, width)
        state.history.random_(0, self._config.vocab_size)
        self._history = state.history.clone()

    @property
    def _on_device(self) -> bool:
        return self._context.device.type == "cuda"

    def _new_runner(self, blocks: int) -> tuple[KVCache, Runner]:
        cache = KVCache(self._config, self._context, blocks, BLOCK_TOKENS, padded=True)
        return cache, Runner(self._model, cache, self._context, self._limits, self._matchers)

    def capture(self) -> dict[str, object]:
        """All sizes, and before that what their memory is settled to be."""
        sizes, device, settled_bytes = graph_sizes(self._limits.max_running), self._context.device, 0
        if self._on_device:
            settled_bytes = memory._graphs_bytes(self._new_runner(1)[1], sizes, device)
        torch.cuda.empty_cache()
        free_bytes, began_s = memory.free_memory_bytes(device), time.monotonic()
        capture: Capture = CudaCapture(device) if self._on_device else Again
        self.runner.capture_graphs(capture, sizes)
        took_s = time.monotonic() - began_s
        torch.cuda.empty_cache()
        taken_bytes = free_bytes - memory.free_memory_bytes(device)
        self.runner._state.block_tables[: len(self._places)] = self._places
        memory_bytes = {"settled_bytes": settled_bytes, "taken_bytes": taken_bytes}
        return {"sizes": len(sizes), "took_s": round(took_s, 2), **memory_bytes}

    def measure(self, rows: int) -> dict[str, object]:
        """One line."""
        found: dict[str, object] = {}
        graphs = self.runner._graphs
        assert graphs is not None
        found |= self._compared(graphs, rows)
        tables = [self._tables(rows, self._options.context - GREEDY_STEPS + step) for step in range(GREEDY_STEPS)]
        drawn = self._drawn(tables)
        graph_us = self._step_us(tables[-1])
        self.runner._graphs = None
        eager = self._drawn(tables)
        eager_us = self._step_us(tables[-1])
        self.runner._graphs = graphs
        same = sum(one == other for one, other in zip(drawn, eager, strict=True)) / max(len(eager), 1)
        return found | {"same_ids": round(same, 4), "eager_us": round(eager_us, 1), "graph_us": round(graph_us, 1)}

    def _tables(self, rows: int, position: int) -> PlanTables:
        plan = StepPlan(
            Fence(0, 0, self._context.epoch), 1, rows=tuple(Row(slot, position, 1, None, True) for slot in range(rows))
        )
        data = self._context.place.degrees.data
        lanes = (lane_of(plan),) * data if data > 1 else ()
        return decode(encode(StepPlan(plan.fence, 1, rows=plan.rows, lanes=lanes)))

    def _drawn(self, tables: list[PlanTables]) -> list[int]:
        """Ids of steps after each other, always from the same ones."""
        self.runner._state.history.copy_(self._history)
        return [token for step in tables for token in self.runner.run(step).ids]

    def _step_us(self, tables: PlanTables) -> float:
        """Through the runner; with several stages each step is waited for."""
        alone = self._context.place.degrees.pipeline == 1
        return self._us(lambda: self.runner.forward(tables) if alone else self.runner.run(tables))

    @torch.inference_mode()
    def _compared(self, graphs: DecodeGraphs, rows: int) -> dict[str, object]:
        """The graph against the same work launched eagerly, and against a step without padding; its time and floor."""
        device, place, position = self._context.device, self._context.place, self._options.context - 1
        tables, state = self._tables(rows, position), self.runner._state
        size = graphs.rows_for(tables)
        slots = torch.arange(size, device=device)
        slots = slots.where(slots < rows, state.padding_slot)
        inputs = DecodeRows(rows, torch.stack((slots, torch.where(slots < rows, position, 0))))
        shape = rows, self._config.hidden_size
        handed = None if place.first_stage else torch.randn(shape, device=device, dtype=self._context.dtype)
        padded = None if handed is None else torch.nn.functional.pad(handed, (0, 0, 0, size - rows))
        counted = self._counted()
        made = graphs.replay(inputs, handed).clone()
        counted = self._counted() - counted
        again = graphs.compute(inputs.inputs, padded)[:rows]
        batch = apply_and_build(tables, state, 0, 1, 1)
        assert isinstance(batch.forward, ForwardBatch)
        plain = self._model(batch.forward, self._cache, handed)
        experts = [layer.routing.experts_per_token for layer in self._config.layers if layer.routing is not None]
        found: dict[str, object] = {
            "size": size,
            "same_bits": made.equal(again),
            "finite": bool(made.isfinite().all()),
            "difference": float((made - again).abs().max()),
            "plain_difference": round(float((made - plain).abs().max() / plain.abs().max()), 5),
            "device_us": round(self._us(lambda: graphs.replay(inputs, handed)), 1),
            "floor_us": round(self._least_bytes(rows) / self._options.bandwidth * 1e6, 1),
        }
        if experts and place.degrees.pipeline == 1:
            found["counted"] = counted / (rows * sum(experts) * place.degrees.data)
        return found

    def _sparse(self) -> list[MixtureOfExperts]:
        return [layer.mlp for layer in self._model.layers if isinstance(layer.mlp, MixtureOfExperts)]

    def _counted(self) -> int:
        """Choices of all rows of the stage so far."""
        total = torch.zeros(1, dtype=torch.int64, device=self._context.device)
        exchanged = False
        for mlp in self._sparse():
            match mlp.dispatcher:
                case ExchangedExperts() as exchange:
                    total, exchanged = total + exchange.map.loads.sum(), True
                case SplitExperts(counted=Tensor() as counted):  # by every rank alike; each with those before it
                    total = total + counted[-1]
        return int(self._context.stage.all_reduce(total) if exchanged else total)

    def _least_bytes(self, rows: int) -> float:
        """That this rank must read: weights, of experts those that some row is likely to choose, and what is stored."""
        embedding = self._model.embedding
        head = self._model.head
        least = float(self._model.resident_bytes)
        if embedding is not None and (head is None or head.weight is not embedding.weight):
            least -= embedding.weight.nbytes
        routed = [layer.routing for layer in self._config.layers if layer.routing is not None]
        for mlp, routing in zip(self._sparse(), routed, strict=False):
            together = rows * self._context.place.degrees.data
            untouched = math.pow(1 - routing.experts_per_token / routing.experts, together)
            least -= untouched * (mlp.experts.gate_up.nbytes + mlp.experts.down.nbytes)
        stored = self._cache.resident_bytes / self._blocks / BLOCK_TOKENS
        return float(least + rows * self._options.context * stored)

    def _us(self, work: Callable[[], object]) -> float:
        """Of one of several that are launched without waiting."""
        for _ in range(3):
            work()
        self._wait()
        began_s = time.perf_counter()
        for _ in range(REPEATS):
            work()
        self._wait()
        return (time.perf_counter() - began_s) / REPEATS * 1e6

    def _wait(self) -> None:
        if self._on_device:
            torch.cuda.synchronize()


@torch.inference_mode()
def random_model(config: ModelConfig, context: ParallelContext) -> DecoderModel:
    """Norms are ones."""
    model = build_model(config, context)
    for shard in model.shards.values():
        if shard.dim() == 1:
            shard.fill_(1)
        else:
            shard.normal_(std=shard.shape[-1] ** -0.5)
    return model
