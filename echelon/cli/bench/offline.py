"""`echelon bench offline`: cases of equal requests at once, through the engine alone or the whole system.

In the user's terminal. A JSON line a case: the times, the floor, and what they are of.
"""

from __future__ import annotations

from typing import Annotated

import typer

from echelon.bench.cases import Case
from echelon.bench.offline import case_row
from echelon.cli.bench import options
from echelon.cli.bench.engine import EngineRanks, engine_ranks
from echelon.cli.bench.grpc import Target, cluster
from echelon.cli.bench.options import machine_of, rates_of, tell
from echelon.cli.bench.setting import ALL_REDUCE_US, Experts, Setting, floor_row, settle


def offline(
    case: options.Cases,
    flags: options.Flags,
    grpc: Annotated[bool, typer.Option("--grpc", help="Through the whole system, not the engine alone.")] = False,
    target: options.Target = None,
    repeats: options.Repeats = 2,
    bandwidth: options.Bandwidth = "",
    flops: options.Flops = "",
    all_reduce_us: options.AllReduce = ALL_REDUCE_US,
    results: options.Output = None,
) -> None:
    """Time cases of equal requests at once: random prompts, greedy, end ids ignored, from submit to the last id.

    Example: echelon bench offline --model DIR --load-format random --tensor 2 --case 64x512x128 --grpc
    """
    cases, given = [Case.parse(text) for text in case], rates_of(bandwidth, flops, all_reduce_us)
    setting = settle(flags)
    for each in cases:
        each.check_fits(setting.max_context)
    machine = machine_of(setting, given, target)
    vocabulary, through = setting.model.vocab_size, "grpc" if grpc or target is not None else "engine"
    with cluster(setting, target) if through == "grpc" else engine_ranks(setting) as serving:
        setting = serving.setting
        about = setting.about(machine, target)
        for each in cases:
            warm_up, *seeds = range(repeats + 1)
            serving.run(each, vocabulary, [warm_up])
            runs, cached_tokens = serving.run(each, vocabulary, seeds)
            row = case_row(each, runs) | {"cached_tokens": cached_tokens}
            if machine is not None:
                experts = _experts(setting, serving, each, repeats + 1)
                row |= floor_row(setting, machine.rates, each, min(run.total_s for run in runs), experts)
            tell({"through": through, **row, "start_s": serving.start_s, **about}, results)


def _experts(setting: Setting, serving: Target | EngineRanks, case: Case, seed: int) -> Experts | None:
    """Those that a layer's rows have chosen in a step: by the engine in one more run, else by shares in all of them."""
    if setting.census.routing is None:
        return None
    if isinstance(serving, Target):
        return serving.distinct_experts(case)
    return serving.distinct_experts(case, setting.model.vocab_size, seed)
