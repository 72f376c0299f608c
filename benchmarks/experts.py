"""One layer of experts on GPUs: time of a step and error in bfloat16, alone, split, or with rows exchanged.

    python -m benchmarks.experts [--data 2] [--tensor 1] [--expert 2] [--hidden 2048] [--neurons 768] [--experts 128]

One process a GPU, over NCCL. Every data rank has `rows` random rows; sizes are Qwen3-30B-A3B's. For each number of
rows and each way to travel, prints one JSON line: microseconds of a layer (median of the slowest rank), of the same in
a CUDA graph if the way allows one, and the greatest difference from float64 on the CPU over the mean size of an output.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from models.mlp import experts_dispatcher
from models.moe import Experts, MixtureOfExperts
from models.router import SoftmaxRouter
from models.routing import Routing
from parallel.context import ParallelContext
from parallel.degrees import Degrees
from parallel.expert import ExpertStep
from parallel.mesh import close, form_context, open_store

ROWS = (1, 16, 128, 1024, 8192)
CHECKED_ROWS = 16  # of those of a data rank
REPEATS = 30
TIMEOUT_S = 120.0


def random_layer(arguments: argparse.Namespace, context: ParallelContext) -> tuple[MixtureOfExperts, MixtureOfExperts]:
    """This rank's part of the layer, and the whole one in float64 on the CPU."""
    random = torch.Generator().manual_seed(7)
    hidden, neurons, experts = arguments.hidden, arguments.neurons, arguments.experts

    def weight(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).mul_(float(shape[-1]) ** -0.5).to(torch.bfloat16)

    gate_up, down = weight(experts, 2, neurons, hidden), weight(experts, hidden, neurons)
    router = weight(experts, hidden) * 2
    place, degrees = context.place, context.place.degrees
    held = experts // degrees.expert
    own = slice(place.expert_rank * held, (place.expert_rank + 1) * held)
    split = neurons // degrees.expert_tensor
    part = slice(place.expert_tensor_rank * split, (place.expert_tensor_rank + 1) * split)
    device, routing = context.device, Routing(experts, arguments.chosen, neurons, normalizes=True)
    mine = Experts(
        gate_up[own, :, part].flatten(1, 2).contiguous().to(device), down[own, :, part].contiguous().to(device), F.silu
    )
    layer = MixtureOfExperts(
        SoftmaxRouter(router.to(device), arguments.chosen, True, True), mine, experts_dispatcher(context, routing)
    )
    alone = ParallelContext(epoch=1, device=torch.device("cpu"), dtype=torch.float64)
    whole = Experts(gate_up.flatten(1, 2).double(), down.double(), F.silu)
    # The router in bfloat16 as on the device: a choice that another rounding changes is not an error of the experts.
    reference = MixtureOfExperts(
        SoftmaxRouter(router.double(), arguments.chosen, True, False), whole, experts_dispatcher(alone, routing)
    )
    return layer, reference


def error(layer: MixtureOfExperts, reference: MixtureOfExperts, rows: Tensor, found: Tensor) -> float:
    """Of the first rows, with the choices that were made on the device."""
    checked = rows[:CHECKED_ROWS]
    expert_ids, weights = layer.router(checked)
    dispatched = reference.dispatcher.dispatch(checked.cpu().double(), expert_ids.cpu(), weights.cpu(), ExpertStep())
    exact = dispatched.combine(reference.experts(dispatched.rows, dispatched.copies), None)
    return float((found[:CHECKED_ROWS].cpu().double() - exact).abs().max() / exact.abs().mean())


def microseconds(work: Callable[[], object], context: ParallelContext) -> float:
    """Median of many runs, each from a common start to the end on the device; the slowest rank's."""
    times = []
    for _ in range(REPEATS):
        context.stage.all_reduce(torch.zeros(1, device=context.device))
        torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) * 1e6)
    median = torch.tensor([statistics.median(times)], device=context.device)
    return float(context.stage.all_gather(median).max())


def captured(work: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of the work and the tensor it fills."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    return graph, result


@torch.inference_mode()
def measure(arguments: argparse.Namespace, address: str, rank: int) -> None:
    """One rank."""
    degrees = Degrees(data=arguments.data, tensor=arguments.tensor, expert=arguments.expert)
    place, device = degrees.place(rank), torch.device("cuda", rank)
    torch.cuda.set_device(device)
    context = form_context(address, "experts", 1, place, device, torch.bfloat16, TIMEOUT_S)
    layer, reference = random_layer(arguments, context)
    for count in ROWS:
        random = torch.Generator(device).manual_seed(place.data_rank)
        rows = torch.randn(count, arguments.hidden, generator=random, device=device, dtype=torch.bfloat16)
        for decode in (False, True):
            if decode and count > 1024:
                continue
            step = ExpertStep(decode, (count,) * degrees.data)

            def work(rows: Tensor = rows, step: ExpertStep = step) -> Tensor:
                return layer(rows, step)

            figures = {"error": error(layer, reference, rows, work()), "layer_us": microseconds(work, context)}
            if decode:
                graph, found = captured(work)
                graph.replay()
                figures["graph_error"] = error(layer, reference, rows, found)
                figures["graph_us"] = microseconds(graph.replay, context)
                graph.reset()
            if rank == 0:
                way = "decode" if decode else "prefill"
                rounded = {name: round(value, 4 if "error" in name else 1) for name, value in figures.items()}
                print(
                    json.dumps({"degrees": str(degrees), "expert": degrees.expert, "rows": count, "way": way} | rounded)
                )
    close(context)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    sizes = {"data": 1, "tensor": 1, "expert": 1, "hidden": 2048, "neurons": 768, "experts": 128, "chosen": 8}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.address is not None:
        measure(arguments, arguments.address, arguments.rank)
        return
    store, address = open_store("127.0.0.1")
    ranks = range(1, arguments.data * arguments.tensor)
    command = [sys.executable, "-m", "benchmarks.experts", *sys.argv[1:], "--address", address]
    others = [subprocess.Popen([*command, "--rank", str(rank)]) for rank in ranks]
    try:
        measure(arguments, address, 0)
        codes = [rank.wait(timeout=TIMEOUT_S) for rank in others]
    finally:
        for rank in others:
            rank.kill()
        del store
    assert not any(codes), f"ranks exited with {codes}"


if __name__ == "__main__":
    main()
