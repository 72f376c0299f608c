"""What benchmarks/kernels.py measures of prompts: attention of all chunks of a batch, and experts of many rows.

Sizes of published models, and odd ones that are checked alone. Products bind these, so their floor is of arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernel_problems import BLOCK_TOKENS, PLAIN, QWEN3_8B, Choice, Heads, Maker, Problem, Sizes
from models.attention_rule import AttentionRule
from models.batch import ForwardBatch, PrefillRow
from models.latent import LatentAttention
from models.latent_attention import LatentQueries
from models.moe import Experts
from models.prefill_attention import GatheredPrefill
from parallel.expert import Copies
from parallel.float8 import meant

SETS = 2
V2_LITE_LATENT, V2_LITE_HEADS = LatentAttention(None, 512, 128, 64, 128), 16
Chunks = Sequence[tuple[int, int]]  # of tokens, the last of so many that are stored


class Prompts:
    """A batch of chunks whose blocks lie scattered."""

    def __init__(self, maker: Maker, chunks: Chunks) -> None:
        self.maker = maker
        counts = [-(-stored // BLOCK_TOKENS) for _, stored in chunks]
        self.blocks, self.tokens = sum(counts), sum(tokens for tokens, _ in chunks)
        tables = torch.randperm(self.blocks, device=maker.device).split(counts)
        rows, offset = [], 0
        for (tokens, stored), table in zip(chunks, tables, strict=True):
            rows.append(PrefillRow(offset, tokens, stored, table))
            offset += tokens
        nothing = torch.zeros(0, dtype=torch.int64, device=maker.device)
        self.batch = ForwardBatch(nothing, nothing, nothing, 0, nothing, nothing, tuple(rows), nothing)

    def cache(self, heads: int, dim: int) -> Tensor:
        return self.maker.random(self.blocks, BLOCK_TOKENS, heads, dim)


def seen(chunks: Chunks, window: int | None) -> int:
    """Pairs of a query and a key that it sees."""
    return sum(
        sum(min(position + 1, window or position + 1) for position in range(stored - tokens, stored))
        for tokens, stored in chunks
    )


def attention(
    maker: Maker, name: str, chunks: Chunks, heads: Heads, rule: AttentionRule = PLAIN, choices: Sequence[Choice] = ()
) -> Problem:
    """Of heads over their cache."""
    from models.kernels.prefill import PagedPrefill

    def one() -> tuple[Prompts, Tensor, Tensor, Tensor]:
        prompts = Prompts(maker, chunks)
        keys, values = (prompts.cache(heads.kv_heads, heads.key_dim) for _ in range(2))
        return prompts, maker.random(prompts.tokens, heads.heads, heads.key_dim), keys, values

    inputs = [one() for _ in range(SETS)]
    gathered = [GatheredPrefill(prompts.batch, {rule.window}) for prompts, *_ in inputs]
    made: dict[tuple[int, str], Any] = {}  # tables are made before a graph is captured

    def today(index: int) -> Tensor:
        _, query, keys, values = inputs[index]
        output = torch.empty_like(query)
        gathered[index](rule, query, keys, values, output)
        return output

    def exact() -> Tensor:
        _, *tensors = inputs[0]
        query, keys, values = (tensor.double() for tensor in tensors)
        output = torch.empty_like(query)
        gathered[0](rule, query, keys, values, output)
        return output

    def kernel(index: int, **choice: Any) -> Tensor:
        prompts, query, keys, values = inputs[index]
        attend = made.setdefault((index, str(choice)), PagedPrefill(prompts.batch, **choice))
        output = torch.empty_like(query)
        attend(rule, query, keys, values, output)
        return output

    flop = 4 * seen(chunks, rule.window) * heads.heads * heads.key_dim
    return Problem(name, 0, SETS, kernel, today, exact, choices, flop=flop)


def latent(maker: Maker, name: str, chunks: Chunks, choices: Sequence[Choice] = ()) -> Problem:
    """Of V2-Lite's heads, whose keys and values are made of what is cached."""
    from models.kernels.prefill import PagedPrefill

    shape, heads = V2_LITE_LATENT, V2_LITE_HEADS
    expand = maker.random(heads * (shape.plain_dim + shape.value_dim), shape.rank).mul_(shape.rank**-0.5)

    def one() -> tuple[Prompts, Tensor, Tensor]:
        prompts = Prompts(maker, chunks)
        return prompts, maker.random(prompts.tokens, heads, shape.head_dim), prompts.cache(1, shape.cached_numbers)

    inputs = [one() for _ in range(SETS)]
    gathered = [GatheredPrefill(prompts.batch, {None}) for prompts, *_ in inputs]
    made: dict[tuple[int, str], Any] = {}

    def run(attend: Any, query: Tensor, keys: Tensor, expand: Tensor) -> Tensor:
        queries = LatentQueries(shape, expand, *query.split([shape.plain_dim, shape.rotary_dim], dim=-1))
        output = query.new_empty(len(query), heads, shape.value_dim)
        attend.latent(PLAIN, queries, keys, output)
        return output

    def kernel(index: int, **choice: Any) -> Tensor:
        prompts, query, keys = inputs[index]
        return run(made.setdefault((index, str(choice)), PagedPrefill(prompts.batch, **choice)), query, keys, expand)

    def today(index: int) -> Tensor:
        return run(gathered[index], *inputs[index][1:], expand)

    def exact() -> Tensor:
        _, query, keys = inputs[0]
        return run(gathered[0], query.double(), keys.double(), expand.double())

    flop = 2 * seen(chunks, None) * heads * (shape.head_dim + shape.value_dim)
    flop += 2 * sum(stored for _, stored in chunks) * expand.numel()
    return Problem(name, 0, SETS, kernel, today, exact, choices, flop=flop)


def side_by_side(maker: Maker, requests: int, tokens: int, heads: Heads) -> Problem:
    """What torch makes of whole prompts of one length that nobody has to gather: no way to serve, but a measure."""
    query = maker.random(requests, heads.heads, tokens, heads.key_dim)
    keys, values = (maker.random(requests, heads.kv_heads, tokens, heads.key_dim) for _ in range(2))

    def sdpa(index: int) -> Tensor:
        return F.scaled_dot_product_attention(query, keys, values, is_causal=True, scale=PLAIN.scale, enable_gqa=True)

    flop = 4 * seen([(tokens, tokens)] * requests, None) * heads.heads * heads.key_dim
    name = f"torch alone, side by side, {requests} x {tokens:,}"
    return Problem(name, 0, 1, sdpa, sdpa, lambda: sdpa(0).double(), flop=flop)


def experts(maker: Maker, name: str, rows: int, sizes: Sizes, elsewhere: int = 0, few: bool = False) -> Problem:
    """elsewhere: so many experts are held by other ranks. few: the kernel for few rows is tried beside."""
    from models.kernels.few_rows import experts_of_few_rows
    from models.kernels.many_rows import experts_of_many_rows

    layers = maker.layers_of(sizes)

    def one() -> tuple[Tensor, Copies]:
        scores = torch.rand(rows, sizes.slots + elsewhere, device=maker.device)
        shares, ids = scores.softmax(-1).topk(sizes.chosen, dim=-1)
        copies = Copies.of_own(ids, shares, sizes.slots, None) if elsewhere else Copies.of(ids, shares, sizes.slots)
        return maker.random(rows, sizes.hidden), copies

    inputs = [one() for _ in range(SETS)]

    def today(index: int) -> Tensor:
        (x, copies), layer = inputs[index], layers[index % len(layers)]
        return copies.sums(layer.outputs(copies.taken(x), copies.ends))

    def exact() -> Tensor:
        (x, copies), layer = inputs[0], layers[0]
        gate_up, down = (meant(matrix, x.dtype).double() for matrix in (layer.gate_up, layer.down))
        wide = Experts(gate_up, down, F.silu)
        return copies.sums(wide.outputs(copies.taken(x.double()), copies.ends))

    def kernel(index: int, few: bool = False) -> Tensor:
        (x, copies), layer = inputs[index], layers[index % len(layers)]
        gate_up, down = (meant(matrix, x.dtype) for matrix in (layer.gate_up, layer.down))
        return (experts_of_few_rows if few else experts_of_many_rows)(x, gate_up, down, copies)

    matrices = 3 * sizes.hidden * sizes.neurons
    read, flop = sizes.slots * matrices * maker.dtype.itemsize, 2 * rows * sizes.chosen * matrices
    tried: list[Choice] = [{"few": True}] if few else []
    return Problem(name, read, SETS, kernel, today, exact, tried, flop=flop)


def products(maker: Maker, name: str, rows: int, sizes: Sizes) -> Problem:
    """Torch's grouped products of these experts alone, with nothing around them."""
    layers, copies = maker.layers_of(sizes), rows * sizes.chosen
    ends = (torch.arange(1, sizes.slots + 1, device=maker.device) * copies // sizes.slots).int()
    x, inner = maker.random(copies, sizes.hidden), maker.random(copies, sizes.neurons)

    def both(index: int) -> Tensor:
        layer = layers[index % len(layers)]
        gate_up, down = (meant(matrix, x.dtype) for matrix in (layer.gate_up, layer.down))
        F.grouped_mm(x, gate_up.mT, offs=ends)
        return F.grouped_mm(inner, down.mT, offs=ends)

    matrices = 3 * sizes.hidden * sizes.neurons
    read, flop = sizes.slots * matrices * maker.dtype.itemsize, 2 * copies * matrices
    return Problem(name, read, SETS, both, both, lambda: both(0).double(), flop=flop)


def served(maker: Maker, family: str) -> Iterator[Problem]:
    """With what is tried for them."""
    from benchmarks.kernel_choices import PROMPTS

    small = maker.divided
    if family == "prompts":
        whole, tried = max(1, 1024 // small), PROMPTS
        yield attention(maker, "32/8 heads of 128, 8 x 1,024", [(whole, whole)] * 8, QWEN3_8B, choices=tried)
        yield attention(maker, "the same, 2 x 4,096", [(4 * whole, 4 * whole)] * 2, QWEN3_8B, choices=tried)
        yield attention(maker, "the same, 16 x 512 at 4,096", [(whole // 2, 4 * whole)] * 16, QWEN3_8B)
        yield side_by_side(maker, 8, whole, QWEN3_8B)
        yield side_by_side(maker, 2, 4 * whole, QWEN3_8B)
        yield latent(maker, "latent, 16 heads of 192/128, 8 x 1,024", [(whole, whole)] * 8, choices=tried)
        yield latent(maker, "latent, 16 x 512 at 4,096", [(whole // 2, 4 * whole)] * 16)
        return
    for title, sizes in (("V2-Lite", Sizes(2048, 1408, 64, 6)), ("Qwen3-30B", Sizes(2048, 768, 128, 8))):
        neurons = max(8, sizes.neurons // small // 8 * 8)  # as wide as torch groups
        scaled = Sizes(sizes.hidden // small, neurons, sizes.slots, sizes.chosen)
        for rows in (512, 2048, 8192):
            fewer = max(1, rows // small)
            yield experts(maker, f"experts of {title}, {rows:,} rows", fewer, scaled, few=rows < 8192)
            yield products(maker, f"their products alone, {rows:,} rows", fewer, scaled)
        yield maker.sorting(
            f"choices 8,192 x {sizes.chosen} of {sizes.slots}", 8192 // small, sizes.chosen, sizes.slots
        )


def odd(maker: Maker, family: str) -> Iterator[Problem]:
    """To be checked alone."""
    chunks = [(1, 1), (17, 17), (300, 300), (1, 40), (64, 129), (100, 1025), (200, 200)]
    if family == "prompts":
        near, bent = AttentionRule(64, 0.1, None), AttentionRule(100, 0.1, 30.0)
        for heads, rule in (
            *((Heads(28, 4, 128, 128), rule) for rule in (PLAIN, near, bent)),
            *((heads, PLAIN) for heads in (Heads(12, 12, 64, 64), Heads(32, 1, 128, 128), Heads(28, 4, 80, 80))),
            *((heads, bent) for heads in (Heads(8, 4, 256, 256), Heads(12, 4, 96, 96), Heads(4, 2, 24, 24))),
        ):
            yield attention(maker, f"prompts, {heads} {rule}", chunks, heads, rule)
        yield latent(maker, "latent prompts of any length", chunks)
        return
    for sizes in (Sizes(200, 104, 7, 3), Sizes(256, 64, 1, 1), Sizes(64, 72, 30, 4)):
        for rows in (40, 1500):
            yield experts(maker, f"{sizes} {rows} rows", rows, sizes)
            yield experts(maker, f"{sizes} {rows} rows, some elsewhere", rows, sizes, elsewhere=5)
