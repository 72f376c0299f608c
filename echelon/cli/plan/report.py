"""A plan on a terminal: the model, a line for each stage, what the ranks hold and do, what limits it, and why it.

In the user's terminal. Says what the planner found, and decides nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict

import typer

from coordinator.plan.explain import WORDS, decode_shares, meshes, rivals, what_limits, why
from coordinator.plan.search import Plan, Planner, Ranking, as_flags, gigabytes
from echelon.cli import output
from parallel.degrees import NAMES, Degrees

SHOWN = 5  # layouts in the table of a ranking


def print_plan(planner: Planner, plan: Plan, ranking: Ranking | None, latency: bool, notes: Sequence[str]) -> None:
    """Everything, for people."""
    for line in _head(planner, plan.degrees):
        typer.echo(line)
    output.table("", STAGE_COLUMNS, _stage_rows(planner, plan))
    typer.echo("")
    for line in _body(planner, plan):
        typer.echo(line)
    typer.echo("\nwhat limits it")
    for line in what_limits(plan, planner.limits):
        typer.echo(f"  {line}")
    if ranking is not None:
        typer.echo(f"\nwhy this layout, for {'latency' if latency else 'throughput'}")
        for line in why(ranking, latency):
            typer.echo(f"  {line}")
        typer.echo("")
        output.table("", RANKING_COLUMNS, _ranking_rows(ranking))
    typer.echo("")
    for note in notes:
        typer.echo(f"note: {note}")


HELD_COLUMNS = ("ranks", "layers", "heads", "KV heads", "experts", "weights", "step", "KV cache", "tokens")
STAGE_COLUMNS = ("stage", *HELD_COLUMNS, "decode", "prefill")
RANKING_COLUMNS = ("layout", "running", "round", "prefill tokens/s", "first token", "whole case", "output tokens/s")


def _head(planner: Planner, degrees: Degrees) -> Iterator[str]:
    census, machines = planner.census, planner.machines
    gpu, size = machines.gpu, census.weight_bytes
    quantization = census.config.quantization
    kept = ", 1 where it stays an 8 bit float" if quantization is not None and quantization.kept else ""
    yield (
        f"{census.config.architecture}: {billions(census.parameters)} parameters, "
        f"{billions(census.parameters_per_token)} for each token; {gigabytes(census.total_bytes)} at {size} "
        f"byte{'s' if size > 1 else ''} a weight{kept}"
    )
    nodes = -(-machines.gpus // machines.gpus_per_node)
    yield (
        f"{machines.gpus} * {gpu.name}, {nodes} node{'s' if nodes > 1 else ''}: {gigabytes(gpu.memory_bytes)}, "
        f"{machines.memory_fraction:g} of it for weights and KV cache; {machines.read_bytes_s / 1e12:.2f} TB/s, "
        f"{machines.flops(size) / 1e12:,.0f} TFLOP/s"
    )
    idle = machines.gpus - degrees.ranks
    yield f"{degrees}, expert {degrees.expert}" + (f"; {idle} of {machines.gpus} GPUs are not used" if idle else "")
    yield "each rank holds"


def _stage_rows(planner: Planner, plan: Plan) -> Iterator[tuple[object, ...]]:
    """Numbers of one rank of the stage; its times are of one micro-batch."""
    found = plan.forecast
    for stage, decode, prefill in zip(plan.load.stages, found.slots, found.prefill_slots, strict=True):
        yield (
            stage.stage,
            plan.degrees.stage_ranks,
            f"{stage.layers.start}-{stage.layers.stop - 1} ({_count(planner, stage.layers)})",
            stage.heads,
            stage.key_value_heads,
            stage.experts or "-",
            gigabytes(stage.weight_bytes),
            gigabytes(stage.step_bytes),
            gigabytes(stage.kv_tokens * stage.kv_bytes_per_token),
            f"{stage.kv_tokens:,}",
            _time(decode.total),
            _time(prefill.total),
        )


def _count(planner: Planner, layers: range) -> str:
    """How many; the layer of prediction apart."""
    more = len(planner.census.computed(layers)) - len(layers)
    return f"{len(layers)} + {more}" if more else str(len(layers))


def _body(planner: Planner, plan: Plan) -> Iterator[str]:
    held, found, limits = plan.load, plan.forecast, planner.limits
    yield (
        f"KV cache   {held.pool_tokens:,} tokens on each of {held.pools} data rank{'s' if held.pools > 1 else ''}: "
        f"{held.requests(limits.max_context):,} requests of max-context {limits.max_context:,}"
    )
    cohorts = f", {found.cohorts} cohorts of {found.cohort_rows} in turn" if found.cohorts > 1 else ""
    yield (
        f"decoding   {found.running:,} request{'s' if found.running > 1 else ''} at once{cohorts}: a token each in "
        f"{_time(found.round_s)}, "
        f"{found.running / found.round_s:,.0f} tokens/s; bubble {found.bubble:.1%}"
    )
    shares = asdict(decode_shares(found))
    parts = sorted(((share, name) for name, share in shares.items() if share >= 0.005), reverse=True)
    yield f"           of that {', '.join(f'{WORDS[name]} {share:.0%}' for share, name in parts)}"
    yield (
        f"prefill    {found.prefill_tokens_s:,.0f} tokens/s; a prompt of {found.case.prompt_tokens:,} alone has its "
        f"first token after {_time(found.first_token_s)}"
    )
    yield f"{found.case!s:<10} {found.total_s:,.2f} s in all, {found.output_tokens_s:,.0f} output tokens/s"


def _ranking_rows(ranking: Ranking) -> Iterator[tuple[object, ...]]:
    """The best few, and the best of each other kind behind them."""
    shown = meshes(ranking.plans)[:SHOWN]
    for plan in [*shown, *(rival for rival in rivals(ranking.plans) if rival not in shown)]:
        found = plan.forecast
        yield (
            as_flags(plan.degrees),
            f"{found.running:,}",
            _time(found.round_s),
            f"{found.prefill_tokens_s:,.0f}",
            _time(found.first_token_s),
            f"{found.total_s:,.2f} s",
            f"{found.output_tokens_s:,.0f}",
        )


def as_json(planner: Planner, plan: Plan, ranking: Ranking | None, latency: bool, notes: Sequence[str]) -> object:
    """Everything, for programs; bytes and seconds."""
    census = planner.census
    return {
        "architecture": census.config.architecture,
        "parameters": census.parameters,
        "parameters_per_token": census.parameters_per_token,
        "weight_bytes": census.total_bytes,
        "machines": asdict(planner.machines),
        "limits": asdict(planner.limits),
        **_plan_json(plan),
        "limited_by": what_limits(plan, planner.limits),
        "why": why(ranking, latency) if ranking else [],
        "ranking": [_plan_json(other) for other in ranking.plans] if ranking else [],
        "notes": list(notes),
    }


def _plan_json(plan: Plan) -> Mapping[str, object]:
    found = asdict(plan.forecast)
    stages = [
        asdict(stage)
        | {
            "layers": [stage.layers.start, stage.layers.stop],
            "ranks": plan.degrees.stage_ranks,
            "kv_tokens": stage.kv_tokens,
            "room_bytes": stage.room_bytes,
        }
        for stage in plan.load.stages
    ]
    return {
        "degrees": {name: getattr(plan.degrees, name) for name in NAMES},
        "ranks": plan.degrees.ranks,
        "stages": stages,
        "kv_tokens": plan.load.pool_tokens * plan.load.pools,
        "forecast": found | {"decode_shares": asdict(decode_shares(plan.forecast))},
    }


def billions(count: int) -> str:
    """Numbers of a model, as models are named."""
    return f"{count / 1e9:,.2f} B" if count >= 1e7 else f"{count:,}"


def _time(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{seconds * 1e3:,.2f} ms"
