"""What benchmarks/kernels.py measures of dense layers: products of few rows, and what stands between products.

    python -m benchmarks.kernels --only linear fused --seconds 85

`linear`: a product beside torch's, of matrices of published models. `fused`: one launch beside those that it replaces.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernel_problems import Maker, Problem, sets_of
from models.layers import RMSNorm, gated

GATED, PLAIN = True, False
# Neurons and inputs, and whether the first half of the neurons gates the second.
TUNED = {
    "Qwen3-8B gate and up": (24576, 4096, GATED),
    "Qwen3-8B down": (4096, 12288, PLAIN),
    "Qwen3-8B qkv": (6144, 4096, PLAIN),
    "Qwen3-8B o": (4096, 4096, PLAIN),
    "Qwen3-8B head": (151936, 4096, PLAIN),
}
SERVED_ALONE = {
    "V2-Lite q": (3072, 2048, PLAIN),
    "V2-Lite kv_a": (576, 2048, PLAIN),
    "V2-Lite o, Qwen3-8B o of tensor 2": (2048, 2048, PLAIN),
    "V2-Lite gate and up": (21888, 2048, GATED),
    "V2-Lite shared gate and up": (5632, 2048, GATED),
    "V2-Lite shared down": (2048, 2816, PLAIN),
    "Qwen3-8B gate and up of tensor 2": (12288, 4096, GATED),
}
ROWS = (1, 2, 4, 8, 16, 32)


def products(
    maker: Maker, name: str, shape: tuple[int, int, bool], rows: Sequence[int], tried: bool = False
) -> Iterator[Problem]:
    """One matrix, multiplied by so many rows each. tried: with other tilings."""
    from benchmarks.kernel_choices import linear_choices
    from parallel.kernels.linear import gated_of_few_rows, linear_of_few_rows

    neurons, inputs, is_gated = shape
    read = neurons * inputs * maker.dtype.itemsize
    sets = sets_of(read)
    weights = [maker.random(neurons, inputs).mul_(inputs**-0.5) for _ in range(sets)]

    def problem(count: int) -> Problem:
        x = maker.random(count, inputs)

        def torchs(weight: Tensor, given: Tensor) -> Tensor:
            made = F.linear(given, weight)
            if not is_gated:
                return made
            gate, up = made.chunk(2, dim=-1)
            return F.silu(gate) * up

        def kernel(index: int, **choice: Any) -> Tensor:
            if is_gated:
                return gated_of_few_rows(x, weights[index], **choice)
            return linear_of_few_rows(x, weights[index], None, **choice)

        choices = linear_choices(count, is_gated) if tried else ()
        named = f"{name}, {count} rows"
        return Problem(
            *(named, read, sets, kernel, lambda index: torchs(weights[index], x)),
            *(lambda: torchs(weights[0].double(), x.double()), choices),
        )

    yield from map(problem, rows)


def sums(maker: Maker, rows: int, hidden: int) -> Problem:
    """What is added and normalized; of both outputs the norm alone is looked at, which follows from the other."""
    x, added, layer = maker.random(rows, hidden), maker.random(rows, hidden), RMSNorm(maker.random(hidden), 1e-6, False)
    wide = RMSNorm(layer.weight.double(), 1e-6, False)
    return Problem(
        *(f"sum and norm, {rows} x {hidden}", 4 * x.nbytes, 1),
        kernel=lambda index: layer.of_sum(x, added)[1],
        today=lambda index: layer(x + added),
        exact=lambda: wide.of_sum(x.double(), added.double())[1],
    )


def gates(maker: Maker, rows: int, neurons: int) -> Problem:
    """The end of a gated MLP's first product, where rows are many."""
    gate_up = maker.random(rows, 2 * neurons)

    def today(index: int) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    return Problem(
        *(f"gate, {rows} x {neurons}", 3 * gate_up.nbytes // 2, 1),
        kernel=lambda index: gated(gate_up, F.silu),
        today=today,
        exact=lambda: gated(gate_up.double(), F.silu),
    )


def served_layers(maker: Maker, family: str) -> Iterator[Problem]:
    """As kernel_problems.served has them."""
    small = maker.divided
    if family == "linear":
        for matrices, tried in ((TUNED, True), (SERVED_ALONE, False)):
            for name, (neurons, inputs, is_gated) in matrices.items():
                yield from products(maker, name, (neurons // small, inputs // small, is_gated), ROWS, tried)
    else:
        for rows in (1, 64, 256, 8192 // small):
            yield sums(maker, rows, 4096 // small)
            yield gates(maker, rows, 12288 // small)


def odd_layers(maker: Maker, family: str) -> Iterator[Problem]:
    """As kernel_problems.odd has them."""
    if family == "linear":
        for is_gated in (False, True):
            yield from products(maker, f"odd, gated {is_gated}", (1046, 1000, is_gated), (1, 3, 16, 21))
    else:
        yield sums(maker, 7, 1000)
        yield gates(maker, 7, 1046)
