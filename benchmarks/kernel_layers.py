"""What benchmarks/kernels.py measures of dense layers: products of few rows, and what stands between products.

    python -m benchmarks.kernels --only linear fused --seconds 85

`linear`: a product beside torch's, of matrices of published models. `fused`: one launch beside those that it replaces.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernel_problems import Maker, Problem, sets_of
from models.attention import Places
from models.layers import RMSNorm, Rotation, gated

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
ROWS = (1, 2, 4, 8, 16)


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


def placed(maker: Maker, rows: int, shape: tuple[int, int, int], interleaved: bool, stored: bool = False) -> Problem:
    """Norms and rotations of heads, and the store of keys and values: the queries; or, to be checked, what is stored.

    shape: query heads, key/value heads, head_dim.
    """
    from models.kernels.heads import place_heads

    heads, kv_heads, dim = shape
    given, slots = maker.random(rows, heads + 2 * kv_heads, dim), torch.randperm(rows, device=maker.device)
    norms = RMSNorm(maker.random(dim), 1e-6, False), RMSNorm(maker.random(dim), 1e-6, False)
    angles = 6 * torch.rand(rows, 1, dim, device=maker.device)
    rotation = Rotation(angles.cos().to(maker.dtype), angles.sin().to(maker.dtype), interleaved)
    keys, values = maker.random(rows, 1, kv_heads, dim), maker.random(rows, 1, kv_heads, dim)
    places = Places(keys, values, slots)

    def of(query: Tensor, places: Places) -> Tensor:
        held = [part.flatten(1) for part in (places.keys, places.values) if part is not None]
        return torch.cat(held, 1) if stored else query

    def today(index: int) -> Tensor:
        query = by_layers(given, norms, rotation, places)
        return of(query, places)

    def kernel(index: int) -> Tensor:
        query = place_heads(given, *norms, rotation, places)
        return of(query, places)

    def exact() -> Tensor:
        wide = Places(keys.double(), values.double(), slots)
        turn = Rotation(rotation.cos.double(), rotation.sin.double(), interleaved)
        wide_norms = [RMSNorm(norm.weight.double(), 1e-6, False) for norm in norms]
        query = by_layers(given.double(), wide_norms, turn, wide)
        return of(query, wide)

    name = f"{'stored' if stored else 'placed'}, {rows} x {heads}/{kv_heads} x {dim}{', neighbours' * interleaved}"
    return Problem(name, 2 * given.nbytes, 1, kernel, today, exact)


def by_layers(given: Tensor, norms: Sequence[RMSNorm], rotation: Rotation, places: Places) -> Tensor:
    """What models/layers.py launches without a kernel for all of it."""
    kv_heads = places.keys.shape[2]
    query, key, value = given.split([given.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    places.put(rotation(norms[1](key)), value)
    return rotation(norms[0](query))


def latent(maker: Maker, rows: int, heads: int, shape: tuple[int, int, int], stored: bool = False) -> Problem:
    """The same of a latent: what turns of the queries; or, to be checked, what is stored.

    shape: rank, plain and turning numbers.
    """
    from models.kernels.heads import place_latent

    rank, plain, turning = shape
    query, made = maker.random(rows, heads, plain + turning), maker.random(rows, rank + turning)
    norm, angles = RMSNorm(maker.random(rank), 1e-6, False), 6 * torch.rand(rows, 1, turning, device=maker.device)
    rotation = Rotation(angles.cos().to(maker.dtype), angles.sin().to(maker.dtype), True)
    kept, slots = maker.random(rows, 1, 1, rank + turning), torch.randperm(rows, device=maker.device)

    def layers(query: Tensor, made: Tensor, norm: RMSNorm, rotation: Rotation, keys: Tensor) -> Tensor:
        compressed, key = made.unsqueeze(1).split([rank, turning], dim=-1)
        Places(keys, None, slots).put(torch.cat((norm(compressed), rotation(key)), dim=-1))
        turned = rotation(query[..., plain:])
        return keys.flatten(1) if stored else turned

    def kernel(index: int) -> Tensor:
        turned = place_latent(query, made, norm, rotation, Places(kept, None, slots))
        return kept.flatten(1) if stored else turned

    def exact() -> Tensor:
        turn = Rotation(rotation.cos.double(), rotation.sin.double(), True)
        return layers(query.double(), made.double(), RMSNorm(norm.weight.double(), 1e-6, False), turn, kept.double())

    read = 2 * made.nbytes + 2 * rows * heads * turning * maker.dtype.itemsize
    name = f"latent {'stored' if stored else 'placed'}, {rows} x {heads} heads, {rank} + {turning}"
    return Problem(name, read, 1, kernel, lambda index: layers(query, made, norm, rotation, kept), exact)


def served(maker: Maker, family: str) -> Iterator[Problem]:
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
            yield placed(maker, max(1, rows // small), (32, 8, 128), interleaved=False)
            yield latent(maker, max(1, rows // small), 16, (512, 128, 64))


def odd(maker: Maker, family: str) -> Iterator[Problem]:
    """As kernel_problems.odd has them."""
    if family == "linear":
        for is_gated in (False, True):
            yield from products(maker, f"odd, gated {is_gated}", (1046, 1000, is_gated), (1, 3, 16, 21))
    else:
        yield sums(maker, 7, 1000)
        yield gates(maker, 7, 1046)
        for stored in (False, True):
            for rows, heads in ((1, (32, 8, 128)), (30, (32, 8, 128)), (7, (5, 1, 66))):
                yield placed(maker, rows, heads, interleaved=rows == 7, stored=stored)
            yield latent(maker, 30, 16, (512, 128, 64), stored)
            yield latent(maker, 3, 5, (40, 24, 16), stored)
