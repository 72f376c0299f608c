"""`echelon plan`: what a layout of a model over devices holds and how fast it can be, or the best layout for a load.

Runs in the user's terminal: needs a directory with a config.json, and no GPU, no Ray, no weights and no cluster.
Reads the flags; what is planned is the business of coordinator/plan.
"""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from coordinator.plan.census import take_census
from coordinator.plan.hardware import GPUS, Gpu, Machines, nearest_gpu
from coordinator.plan.memory import Limits
from coordinator.plan.search import Planner
from coordinator.plan.storage import keeps_float8
from echelon.bench.cases import Case
from echelon.cli import output
from echelon.cli.plan.report import as_json as report_json
from echelon.cli.plan.report import print_plan
from echelon.cli.plan.units import byte_count, flop_rate
from echelon.errors import ConfigError
from models.config import DTYPE_BYTES, ModelConfig, read_model_config, with_prediction
from parallel.degrees import Degrees

FLOAT8 = "float8"  # of weights alone: keys, values and activations stay in 16 bit
DTYPES = {FLOAT8: 1} | {name: size for name, size in DTYPE_BYTES.items() if name != "float64"}


class Speculation(StrEnum):
    """As of `echelon serve`; n-grams need nothing of a GPU."""

    OFF = "off"
    NGRAM = "ngram"
    MTP = "mtp"


class Stored(StrEnum):
    """What becomes of matrices that a checkpoint has in 8 bit floats, as of `echelon serve`."""

    AUTO = "auto"
    DEQUANTISED = "dequantised"
    KEPT = "kept"


class Goal(StrEnum):
    """What the best layout is best for."""

    THROUGHPUT = "throughput"
    LATENCY = "latency"


def plan(
    model: Annotated[Path, typer.Option(help="Directory with a config.json, in Hugging Face format.")],
    gpus: Annotated[int, typer.Option(min=1, help="How many GPUs there are.")],
    gpu: Annotated[str, typer.Option(help=f"One of {', '.join(GPUS)}; default: by --gpu-memory.")] = "",
    gpu_memory: Annotated[str, typer.Option(metavar="BYTES", help="Of each GPU, as in 141GB.")] = "",
    gpu_bandwidth: Annotated[str, typer.Option(metavar="BYTES", help="Of its memory a second, as in 4.8TB.")] = "",
    gpu_flops: Annotated[str, typer.Option(metavar="FLOPS", help="Dense, in 16 bit, a second, as in 989T.")] = "",
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of a machine, joined by NVLink.")] = 8,
    network_bandwidth: Annotated[str, typer.Option(metavar="BYTES", help="Of a GPU's network card a second.")] = "50GB",
    tensor: Annotated[int | None, typer.Option(min=1, help="Ranks that split every layer.")] = None,
    pipeline: Annotated[int | None, typer.Option(min=1, help="Pipeline stages.")] = None,
    data: Annotated[int | None, typer.Option(min=1, help="Attention data-parallel ranks of a replica.")] = None,
    expert: Annotated[int | None, typer.Option(min=1, help="Groups of a stage's ranks with different experts.")] = None,
    replicas: Annotated[int | None, typer.Option(min=1, help="Copies of the model.")] = None,
    auto: Annotated[bool, typer.Option("--auto", help="Choose the degrees that are not given.")] = False,
    goal: Annotated[Goal, typer.Option("--for", help="What --auto chooses for.")] = Goal.THROUGHPUT,
    case: Annotated[str, typer.Option(metavar="NxIxO", help="Requests at once, tokens of prompt, of answer.")] = "",
    max_context: Annotated[int | None, typer.Option(min=1, help="Tokens of prompt and answer.")] = None,
    max_step_tokens: Annotated[int, typer.Option(min=16, help="Tokens of one step of a data rank.")] = 2048,
    gpu_memory_fraction: Annotated[float, typer.Option(min=0.1, max=1, help="Share for weights and KV cache.")] = 0.9,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}; default: the model's.")] = "",
    speculation: Annotated[Speculation, typer.Option(help="As of serve: mtp holds one layer more.")] = Speculation.OFF,
    float8: Annotated[Stored, typer.Option(help="As of serve: whether matrices of 8 bit floats stay.")] = Stored.AUTO,
    as_json: output.AsJson = False,
) -> None:
    """Plan a model over GPUs from its config.json alone: bytes, KV cache and lower bounds of time for each stage.

    Example: echelon plan --model DIR --gpus 16 --gpu-memory 141GB --auto --for throughput
    """
    degrees = {"replicas": replicas, "pipeline": pipeline, "data": data, "tensor": tensor, "expert": expert}
    fixed = {name: degree for name, degree in degrees.items() if degree is not None}
    device = _gpu(gpu, gpu_memory, gpu_bandwidth, gpu_flops)
    stays = float8 is Stored.KEPT or (float8 is Stored.AUTO and keeps_float8(model, device, dtype, Degrees(**fixed)))
    config = _config(model, max_context, speculation, stays)
    machines = Machines(
        gpu=device,
        gpus=gpus,
        gpus_per_node=gpus_per_node,
        network_bytes_s=byte_count(network_bandwidth, "--network-bandwidth"),
        memory_fraction=gpu_memory_fraction,
    )
    load = _case(case, gpus if goal is Goal.THROUGHPUT else 0, context := _context(config, max_context))
    limits = Limits(max_context=context, step_tokens=max_step_tokens, requests=load.requests)
    weight_bytes = DTYPES[dtype := _dtype(dtype, config)]
    planner = Planner(take_census(config, weight_bytes, max(weight_bytes, 2)), machines, limits, load)
    notes = _notes(planner, dtype, speculation, named=bool(gpu))
    ranking = planner.rank(fixed, goal is Goal.LATENCY) if auto or not fixed else None
    chosen = ranking.plans[0] if ranking else planner.plan(Degrees(**fixed))
    said = planner, chosen, ranking, goal is Goal.LATENCY, notes
    output.json_line(report_json(*said)) if as_json else print_plan(*said)


def _config(model: Path, max_context: int | None, speculation: Speculation, keep_float8: bool) -> ModelConfig:
    config = read_model_config(model, max_context, planning=True, keep_float8=keep_float8)
    return with_prediction(config) if speculation is Speculation.MTP else config


def _gpu(name: str, memory: str, bandwidth: str, flops: str) -> Gpu:
    """A known device, with the numbers that flags give instead of its own."""
    known = GPUS.get(name.lower())
    if name and known is None:
        raise ConfigError(f"--gpu {name} is not known; known: {', '.join(GPUS)}; or give --gpu-memory", field="gpu")
    given_bytes = byte_count(memory, "--gpu-memory") if memory else None
    if known is None:
        known = nearest_gpu(given_bytes) if given_bytes is not None else GPUS["h200"]
    return replace(
        known,
        memory_bytes=known.memory_bytes if given_bytes is None else given_bytes,
        read_bytes_s=byte_count(bandwidth, "--gpu-bandwidth") if bandwidth else known.read_bytes_s,
        flops=flop_rate(flops) if flops else known.flops,
    )


def _context(config: ModelConfig, max_context: int | None) -> int:
    most = config.max_position_embeddings
    if max_context is not None and max_context > most:
        raise ConfigError(
            f"--max-context {max_context} is more than max_position_embeddings={most} of the model", field="max_context"
        )
    return max_context or most


def _case(text: str, gpus: int, max_context: int) -> Case:
    """What was asked for, or 64 requests a GPU; one for latency."""
    if text:
        case = Case.parse(text)
        case.check_fits(max_context)
        return case
    output_tokens = max(1, min(256, max_context // 4))
    return Case(max(64 * gpus, 1), max(1, min(1024, max_context - output_tokens)), output_tokens)


def _dtype(name: str, config: ModelConfig) -> str:
    chosen = name or (config.dtype if config.dtype in DTYPES else "bfloat16")
    if chosen not in DTYPES:
        raise ConfigError(f"--dtype {name} is not one of {', '.join(DTYPES)}", field="dtype")
    return chosen


def _notes(planner: Planner, dtype: str, speculation: Speculation, named: bool) -> list[str]:
    """What the numbers leave out, and what was assumed."""
    machines = planner.machines
    notes = ["times are lower bounds: bytes over bandwidth, FLOP over rate, exchange; no launches, no idle hosts"]
    if not named:
        notes.append(f"rates are those of {machines.gpu.name}, whose memory is nearest; --gpu names another device")
    if machines.gpus > machines.gpus_per_node:
        notes.append(f"between nodes: {machines.network_bytes_s / 1e9:g} GB/s a GPU, by data sheet and not measured")
    if dtype == FLOAT8:
        notes.append("float8 is planned for all weights alike; --float8 kept plans what is served of such a checkpoint")
    if speculation is not Speculation.OFF:
        counted = ": what it needs is counted" if speculation is Speculation.MTP else ""
        notes.append(f"speculation={speculation}{counted}, and no guess that comes true")
    return notes
