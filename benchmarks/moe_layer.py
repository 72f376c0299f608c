"""One mixture-of-experts layer on one device beside its floor: what bytes and FLOP alone would take.

    python -m benchmarks.moe_layer [--shapes deepseek-v2-lite qwen3-30b-a3b] [--rows 1 64 256 8192]
    python -m benchmarks.moe_layer --device cpu --scale 16 --rows 1 8

Random weights and rows. A pass goes through --layers layers with weights and rows of their own, so that no cache holds
what a layer reads, and times are of a layer: the median of passes. One JSON line for each shape and number of rows:

    layer_us, graph_us   as the server launches it, and the same in a CUDA graph
    *_us                 its parts, each launched and waited for by itself
    floor_us             the larger of bytes (weights of the experts that were chosen, once) over --bandwidth and FLOP
                         over --rate; floor: which of them it is; over_floor: graph_us over it, layer_us without a graph
    loop_us, tiled_us    an expert after the other, and tiles with copies of weights, in place of what is served
    syncs                where the host waits for the device in a layer, by torch.cuda.set_sync_debug_mode
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from models.expert_products import one_by_one, tiled
from models.layers import GatedMlp
from models.moe import Experts, MixtureOfExperts
from models.router import GroupedSoftmaxRouter, Router, SoftmaxRouter
from parallel.comm import Group
from parallel.expert import PREFILL, Copies, SplitExperts
from parallel.float8 import meant
from parallel.side_stream import IN_TURN, SideStream
from parallel.tensor import ColumnLinear, RowLinear

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
REPEATS, WARMUP = 30, 3
MOST_LOOPED_ROWS = 256  # beyond, the loop is known to lose


@dataclass(frozen=True, slots=True)
class Shape:
    """hidden numbers of a row; experts of `neurons`, of which `chosen` for each row; shared neurons beside them."""

    hidden: int
    experts: int
    neurons: int
    chosen: int
    shared: int = 0

    def scaled(self, by: int) -> Shape:
        """A smaller one, for a machine that is to try the script alone."""
        return Shape(self.hidden // by, self.experts, self.neurons // by, self.chosen, self.shared // by)

    def floor_bytes(self, touched: int, number_bytes: int = 2) -> int:
        """Weights that a layer reads for rows which choose `touched` different experts."""
        matrices = 3 * (touched * self.neurons + self.shared) + self.experts
        return number_bytes * self.hidden * matrices

    def flop(self, rows: int) -> int:
        return 2 * rows * self.hidden * (3 * (self.chosen * self.neurons + self.shared) + self.experts)


SHAPES = {
    "deepseek-v2-lite": Shape(2048, 64, 1408, 6, shared=2 * 1408),
    "qwen3-30b-a3b": Shape(2048, 128, 768, 8),
}


class OtherExperts(Experts):
    """Without the kernel and torch's grouped product."""

    def _are_few(self, rows: Tensor, copies: Copies) -> bool:
        return False


class LoopedExperts(OtherExperts):
    """An expert after the other."""

    def outputs(self, rows: Tensor, ends: Tensor) -> Tensor:
        return one_by_one(rows, ends, meant(self.gate_up, rows.dtype), meant(self.down, rows.dtype), self.activation)


class TiledExperts(OtherExperts):
    """Tiles with copies of weights, as where neither takes such tensors."""

    def outputs(self, rows: Tensor, ends: Tensor) -> Tensor:
        return tiled(rows, ends, meant(self.gate_up, rows.dtype), meant(self.down, rows.dtype), self.activation)


def random_layer(
    shape: Shape, device: torch.device, dtype: torch.dtype, side: SideStream, seed: int
) -> MixtureOfExperts:
    """With weights of a model's size."""
    random = torch.Generator(device).manual_seed(seed)

    def weight(*sizes: int) -> Tensor:
        scale = sizes[-1] ** -0.5
        return torch.randn(*sizes, generator=random, device=device, dtype=dtype).mul_(scale)

    gate = weight(shape.experts, shape.hidden)
    router: Router = SoftmaxRouter(gate, shape.chosen, normalizes=True, rounds=True)
    shared = None
    if shape.shared:
        router = GroupedSoftmaxRouter(gate, shape.chosen, None, 1.0)
        gate_up = ColumnLinear(weight(2 * shape.shared, shape.hidden))
        shared = GatedMlp(gate_up, F.silu, RowLinear(weight(shape.hidden, shape.shared), None, Group()))
    experts = Experts(
        weight(shape.experts, 2 * shape.neurons, shape.hidden),
        weight(shape.experts, shape.hidden, shape.neurons),
        F.silu,
    )
    counted = torch.zeros(shape.experts, dtype=torch.int64, device=device)
    return MixtureOfExperts(router, experts, SplitExperts(Group(), shape.experts, counted), shared, side)


class Bench:
    """Layers of a shape with their rows, and a clock for what is done with each of them."""

    def __init__(
        self, shape: Shape, rows: int, layers: int, device: torch.device, dtype: torch.dtype, side: SideStream
    ) -> None:
        self.shape, self.device = shape, device
        self.layers = [random_layer(shape, device, dtype, side, seed) for seed in range(layers)]
        random = torch.Generator(device).manual_seed(layers)
        sizes = (layers, rows, shape.hidden)
        self.rows = list(torch.randn(*sizes, generator=random, device=device, dtype=dtype).unbind())

    def each(self, work: Callable[[MixtureOfExperts, Tensor], object]) -> Callable[[], None]:
        """A pass through all layers."""

        def run() -> None:
            for layer, rows in zip(self.layers, self.rows, strict=True):
                work(layer, rows)

        return run

    def microseconds(self, work: Callable[[], None]) -> float:
        """Of a layer: the median of passes."""
        times = []
        for repeat in range(WARMUP + REPEATS):
            self.wait()
            begin = time.perf_counter()
            work()
            self.wait()
            if repeat >= WARMUP:
                times.append((time.perf_counter() - begin) * 1e6 / len(self.layers))
        return statistics.median(times)

    def graph_microseconds(self) -> float:
        """In a CUDA graph of the pass."""
        work = self.each(lambda layer, rows: layer(rows, PREFILL))
        work()
        self.wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return self.microseconds(graph.replay)

    def parts(self) -> dict[str, float]:
        """Each part of a layer by itself, on what the part before has made."""
        chosen = [layer.router(rows) for layer, rows in zip(self.layers, self.rows, strict=True)]
        dispatched = [
            layer.dispatcher.dispatch(rows, *choice, PREFILL)
            for layer, rows, choice in zip(self.layers, self.rows, chosen, strict=True)
        ]
        made = [layer.experts(each.rows, each.copies) for layer, each in zip(self.layers, dispatched, strict=True)]

        def dispatch() -> None:
            for layer, rows, choice in zip(self.layers, self.rows, chosen, strict=True):
                layer.dispatcher.dispatch(rows, *choice, PREFILL)

        def experts() -> None:
            for layer, each in zip(self.layers, dispatched, strict=True):
                layer.experts(each.rows, each.copies)

        def combine() -> None:
            for each, outputs in zip(dispatched, made, strict=True):
                each.combine(outputs, None)

        works = {
            "router": self.each(lambda layer, rows: layer.router(rows)),
            "dispatch": dispatch,
            "experts": experts,
            "combine": combine,
        }
        if self.shape.shared:
            works["shared"] = self.each(lambda layer, rows: layer.shared and layer.shared(rows, PREFILL))
        return {f"{name}_us": self.microseconds(work) for name, work in works.items()}

    def microseconds_with(self, kind: type[Experts]) -> float:
        """With the experts' products in another way."""
        others = [
            replace(layer, experts=kind(layer.experts.gate_up, layer.experts.down, layer.experts.activation))
            for layer in self.layers
        ]

        def work() -> None:
            for layer, rows in zip(others, self.rows, strict=True):
                layer(rows, PREFILL)

        return self.microseconds(work)

    def touched(self) -> float:
        """Different experts that a layer's rows choose, on average."""
        chosen = [layer.router(rows)[0] for layer, rows in zip(self.layers, self.rows, strict=True)]
        return statistics.mean(len(ids.unique()) for ids in chosen)

    def syncs(self) -> list[str]:
        """Where the host waits for the device in one layer."""
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                self.layers[0](self.rows[0], PREFILL)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sorted({f"{found.filename}:{found.lineno}" for found in caught if "synchroniz" in str(found.message)})

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@torch.inference_mode()
def measure(name: str, rows: int, options: argparse.Namespace) -> dict[str, object]:
    """A line of the output."""
    device, shape = torch.device(options.device), SHAPES[name].scaled(options.scale)
    dtype = DTYPES[options.dtype]
    side = SideStream.of(device) if options.shared == "beside" else IN_TURN
    bench = Bench(shape, rows, options.layers, device, dtype, side)
    touched = bench.touched()
    floors = {
        "bytes": shape.floor_bytes(round(touched), dtype.itemsize) / options.bandwidth * 1e6,
        "flop": shape.flop(rows) / options.rate * 1e6,
    }
    bound = max(floors, key=lambda floor: floors[floor])
    figures: dict[str, float] = {"layer_us": bench.microseconds(bench.each(lambda layer, rows: layer(rows, PREFILL)))}
    if device.type == "cuda":
        figures["graph_us"] = bench.graph_microseconds()
    figures |= bench.parts()
    if rows <= MOST_LOOPED_ROWS:
        figures["loop_us"] = bench.microseconds_with(LoopedExperts)
        figures["tiled_us"] = bench.microseconds_with(TiledExperts)
    figures["floor_us"] = floors[bound]
    figures["over_floor"] = figures.get("graph_us", figures["layer_us"]) / floors[bound]
    rounded = {key: round(value, 2) for key, value in figures.items()}
    syncs = bench.syncs() if device.type == "cuda" else None
    asked = {"shape": name, "dtype": options.dtype, "shared": options.shared, "rows": rows}
    return asked | {"touched": touched, "floor": bound} | rounded | {"syncs": syncs}


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 64, 256, 8192])
    parser.add_argument("--layers", type=int, default=4, help="with weights of their own, one after the other")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    ways = ("beside", "in-turn")
    parser.add_argument(
        "--shared", choices=ways, default=ways[0], help="shared experts: on a stream of their own, or not"
    )
    parser.add_argument("--scale", type=int, default=1, help="divides the sizes of matrices")
    parser.add_argument("--bandwidth", type=float, default=4.8e12, help="bytes a second")
    parser.add_argument("--rate", type=float, default=989e12, help="FLOP a second")
    options = parser.parse_args()
    for name in cast(Sequence[str], options.shapes):
        for rows in options.rows:
            print(json.dumps(measure(name, rows, options)), flush=True)


if __name__ == "__main__":
    main()
