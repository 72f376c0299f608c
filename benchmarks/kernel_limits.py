"""What an interpreter cannot show of kernels, on a device: a family of benchmarks/kernels.py of checks alone.

    python -m benchmarks.kernels --only limits

Caches and weights of more than 2**32 numbers, whose unused parts are not numbers; the same bits each time; CUDA graphs
whose lengths, tables and choices change between replays; and that a rank that has settled compiles nothing more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernel_problems import BLOCK_TOKENS, PLAIN, QWEN3_8B, V2_LITE, V3, Heads, Maker, Problem, Sizes
from echelon.internal.v1 import control_pb2
from models.batch import ForwardBatch
from models.config import ModelConfig
from models.decode_attention import GatheredDecode
from models.moe import Experts
from models.registry import build_model
from models.routing import Routing
from parallel.context import solo_context
from parallel.expert import Copies
from parallel.float8 import meant
from worker.kv_cache import KVCache
from worker.matchers import Matchers
from worker.memory import largest_step, settle_kv_blocks
from worker.plan import decode, encode
from worker.runner import Runner, RunnerLimits
from worker.warm import SMALL

NUMBERS = (1 << 32) + (1 << 20)  # of a big cache: more than 32 bits can address, signed or not
AGAIN = 20
V3_EXPERTS = Sizes(7168, 2048, 256, 8)
CHOSEN = (255, 0, 128, 254, 1, 127, 253, 64)  # of V3's, their weights up to the last number
CONTEXTS = (1, 17, 300, 1025)
LATER = ((1, 1, 1), (2, 3, 1), (2, 1900, 2), (1, 40, 30), (60, 2, 59), (1, 90, 70), (1, 300, 250), (130, 77, 129))


@dataclass(frozen=True, slots=True)
class Kept:
    """Something that must hold. wrong: what does not, empty if all does."""

    name: str
    wrong: Callable[[], str]


def big(maker: Maker) -> Iterator[Problem]:
    """Addresses beyond 32 bits."""
    shrunk = maker.divided**2
    yield big_cache(maker, "heads in a cache beyond 32 bits", QWEN3_8B, NUMBERS // shrunk)
    yield big_cache(maker, "latent in a cache beyond 32 bits", V2_LITE, NUMBERS // shrunk)
    hidden, neurons = V3_EXPERTS.hidden // maker.divided, V3_EXPERTS.neurons // maker.divided
    yield big_experts(maker, replace(V3_EXPERTS, hidden=hidden, neurons=neurons))


def big_cache(maker: Maker, name: str, heads: Heads, numbers: int) -> Problem:
    """Blocks of rows lie from the first to the last; those of nobody hold what is not a number."""
    from models.kernels.paged_decode import PagedDecode

    lengths = torch.tensor(CONTEXTS, device=maker.device)
    rows, width = len(CONTEXTS), -(-max(CONTEXTS) // BLOCK_TOKENS)
    blocks = max(2 * rows * width, numbers // (BLOCK_TOKENS * heads.kv_heads * heads.value_dim))
    used = torch.linspace(0, blocks - 1, rows * width, dtype=torch.float64).long().to(maker.device)

    def cache(dim: int) -> Tensor:
        shape = (blocks, BLOCK_TOKENS, heads.kv_heads, dim)
        made = torch.full(shape, torch.nan, device=maker.device, dtype=maker.dtype)
        made[used] = maker.random(len(used), *shape[1:])
        return made

    keys = cache(heads.key_dim)
    values = keys[..., : heads.value_dim] if heads.latent else cache(heads.value_dim)
    order = torch.randperm(len(used), device=maker.device)
    tables, query = used[order].view(rows, width), maker.random(rows, heads.heads, heads.key_dim)

    def gathered(tables: Tensor, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        batch = ForwardBatch(query, query, query, rows, tables, lengths, (), query)
        return GatheredDecode(batch, BLOCK_TOKENS, {None})(PLAIN, query, keys, values)

    def exact() -> Tensor:
        small = keys[used].double()
        others = small[..., : heads.value_dim] if heads.latent else values[used].double()
        return gathered(order.view(rows, width), query.double(), small, others)

    def kernel(index: int) -> Tensor:
        return PagedDecode(tables, lengths, maker.processors)(PLAIN, query, keys, values)

    return Problem(name, 0, 1, kernel, lambda index: gathered(tables, query, keys, values), exact)


def big_experts(maker: Maker, sizes: Sizes) -> Problem:
    """Three rows that choose the same slots, the last ones among them, of a layer that has many."""
    from models.kernels.few_rows import experts_of_few_rows

    layer = maker.layer(sizes)
    gate_up, down = (meant(matrix, maker.dtype) for matrix in (layer.gate_up, layer.down))
    chosen = torch.tensor(CHOSEN, device=maker.device)
    places = torch.stack([torch.randperm(len(CHOSEN), device=maker.device) for _ in range(3)])
    x, shares = maker.random(3, sizes.hidden), torch.rand(places.shape, device=maker.device)
    copies = Copies.of(chosen[places], shares, sizes.slots)

    def exact() -> Tensor:
        few, wide = Copies.of(places, shares, len(CHOSEN)), x.double()
        held = Experts(gate_up[chosen].double(), down[chosen].double(), F.silu)
        return few.sums(held.outputs(few.taken(wide), few.ends))

    def today(index: int) -> Tensor:
        return copies.sums(layer.outputs(copies.taken(x), copies.ends))

    def kernel(index: int) -> Tensor:
        return experts_of_few_rows(x, gate_up, down, copies)

    return Problem("experts of V3, with weights beyond 32 bits", 0, 1, kernel, today, exact)


def kept(maker: Maker) -> Iterator[Kept]:
    """What must hold besides."""
    small, lengths = maker.divided, [1 + 37 * row % 900 for row in range(max(2, 64 // maker.divided))]
    problems = [
        maker.attention("heads", lengths, QWEN3_8B),
        maker.attention("heads, one long row", [max(300, 5000 // small)], QWEN3_8B),
        maker.attention("latent", lengths, V2_LITE),
        maker.attention("latent, 128 heads", lengths[:3], V3),
        maker.experts("experts", 100 // small + 3, Sizes(512, 256, 32, 4), elsewhere=3),
        maker.sorting("choices", 500 // small + 3, 6, 64),
    ]
    for problem in problems:
        yield Kept(f"{problem.name}: the same bits {AGAIN} times", partial(_differing, problem))
    if maker.device.type == "cuda":
        yield Kept("a graph of attention reads new lengths and tables", partial(_attention_graph, maker))
        yield Kept("a graph of experts reads new choices", partial(_experts_graph, maker))
        for graphs in (False, True):
            for name, config in (("dense", SMALL), ("with experts", _with_experts())):
                named = f"a rank, {name}, {'with' if graphs else 'without'} graphs, compiles nothing once it serves"
                yield Kept(named, partial(_late, maker, _with_other_heads(config) if graphs else config, graphs))


def _differing(problem: Problem) -> str:
    first = problem.kernel(0).clone()
    count = sum(not torch.equal(first, problem.kernel(0)) for _ in range(AGAIN))
    return f"{count} differ" if count else ""


def _captured(work: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = work()
    return graph, output


def _attention_graph(maker: Maker) -> str:
    """Rows of a graph that nobody has are of length 0."""
    from models.kernels.paged_decode import PagedDecode

    heads, rows, width = QWEN3_8B, 8, 64
    keys, values = (maker.random(rows * width, BLOCK_TOKENS, heads.kv_heads, heads.key_dim) for _ in range(2))
    query, lengths = maker.random(rows, heads.heads, heads.key_dim), torch.ones(rows, dtype=torch.int64)
    lengths, tables = lengths.to(maker.device), torch.zeros(rows, width, dtype=torch.int64, device=maker.device)

    def work() -> Tensor:
        return PagedDecode(tables, lengths, maker.processors)(PLAIN, query, keys, values)

    graph, output = _captured(work)
    for stored in ((0, 1, 2, 16, 17, 500, 1023, 1024), (1024, 0, 64, 65, 128, 129, 257, 3)):
        lengths.copy_(torch.tensor(stored))
        tables.copy_(torch.randperm(rows * width, device=maker.device).view(rows, width))
        query.normal_()
        graph.replay()
        if not torch.equal(output, work()):
            return f"lengths {stored}"
    return ""


def _experts_graph(maker: Maker) -> str:
    from models.kernels.few_rows import experts_of_few_rows

    sizes, rows = Sizes(512, 256, 32, 4), 20
    layer, x = maker.layer(sizes), maker.random(rows, sizes.hidden)
    gate_up, down = (meant(matrix, x.dtype) for matrix in (layer.gate_up, layer.down))
    ids = torch.zeros(rows, sizes.chosen, dtype=torch.int64, device=maker.device)
    shares = torch.rand(ids.shape, device=maker.device)

    def work() -> Tensor:
        copies = Copies.of_own(ids - 3, shares, sizes.slots, None)
        return experts_of_few_rows(x, gate_up, down, copies)

    graph, output = _captured(work)
    for all_on_one in (False, True, False):
        chosen = torch.rand(rows, sizes.slots + 6, device=maker.device).topk(sizes.chosen, dim=-1)[1]
        ids.copy_(torch.full_like(chosen, 7) if all_on_one else chosen)
        graph.replay()
        if not torch.equal(output, work()):
            return "all on one slot" if all_on_one else "spread over slots"
    return ""


def _with_experts() -> ModelConfig:
    """With other heads than the dense one, for which nothing of attention has been compiled yet."""
    layer = replace(SMALL.layers[0], routing=Routing(16, 4, 256, normalizes=True), window=300)
    return replace(SMALL, architecture="Qwen3MoeForCausalLM", layers=(layer,), num_attention_heads=16)


def _with_other_heads(config: ModelConfig) -> ModelConfig:
    """Four times as many, and other experts: what was compiled for the config is of no use to this one."""
    layers = tuple(
        layer if layer.routing is None else replace(layer, routing=replace(layer.routing, neurons=512))
        for layer in config.layers
    )
    return replace(config, layers=layers, num_attention_heads=4 * config.num_attention_heads)


def _late(maker: Maker, config: ModelConfig, graphs: bool) -> str:
    """What steps outside graphs compile of kernels after a rank has settled how many blocks it can have."""
    from triton import knobs

    context, matchers = solo_context(maker.device, maker.dtype), Matchers(_no_tokenizer, 1)
    limits = RunnerLimits(max_running=160, max_context=2048, block_tokens=BLOCK_TOKENS)
    compiled: list[str] = []

    def compiles(**told: Any) -> None:
        compiled.append(told["fn"].name)

    with torch.inference_mode():
        model = build_model(config, context)
        for shard in model.shards.values():
            shard.normal_(std=0.02)
        command = control_pb2.FormEpoch(
            kv_blocks=1 << 20, block_tokens=BLOCK_TOKENS, max_context=2048, max_running=4, max_step_tokens=64
        )
        knobs.runtime.jit_post_compile_hook = compiles
        try:
            settle_kv_blocks(model, config, context, command, matchers, graphs)
            torch.cuda.synchronize()
            before = set(compiled)
            compiled.clear()
            for running, stored, tokens in LATER:
                runner = Runner(model, KVCache(config, context, 1, BLOCK_TOKENS), context, limits, matchers)
                runner.run(decode(encode(largest_step(running, stored + 1, tokens, context.epoch))))
        finally:
            knobs.runtime.jit_post_compile_hook = None
    matchers.close()
    # What joins pieces knows no number of heads: another rank of this process may have compiled it.
    return ", ".join(compiled) or ("" if "_read_piece" in before else f"the hook has heard of {sorted(before)} alone")


def _no_tokenizer() -> NoReturn:
    raise AssertionError("these steps have no constraint")
