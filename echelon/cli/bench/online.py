"""`echelon bench online`: requests that arrive at a rate, and how long their users wait.

In the user's terminal. A JSON line a rate, through the whole system.
"""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from echelon.bench.online import Load, figures, run_load, schedule
from echelon.cli.bench import options
from echelon.cli.bench.grpc import cluster
from echelon.cli.bench.options import tell
from echelon.cli.bench.setting import settle
from echelon.errors import ConfigError

WARM_UP_REQUESTS = 4


def online(
    rate: Annotated[list[float], typer.Option(help="Requests a second; may be repeated, for a line each.")],
    flags: options.Flags,
    duration: Annotated[float, typer.Option(help="Seconds in which requests arrive.")] = 30.0,
    prompt_tokens: Annotated[int, typer.Option(help="Of a request, on average.")] = 512,
    output_tokens: Annotated[int, typer.Option(help="Of an answer, on average.")] = 128,
    spread: Annotated[float, typer.Option(help="Lengths are within this share of their mean.")] = 0.0,
    seed: Annotated[int, typer.Option(help="The same seed has the same arrivals and prompts.")] = 0,
    ttft_slo_s: Annotated[
        float | None, typer.Option("--ttft-slo-s", min=0, help="Most until the first id, of what counts as goodput.")
    ] = None,
    itl_slo_s: Annotated[
        float | None, typer.Option("--itl-slo-s", min=0, help="Most for each id behind it, on average.")
    ] = None,
    target: options.Target = None,
    results: options.Output = None,
) -> None:
    """Send requests at Poisson arrivals: time to the first token, between tokens, to the end, and goodput.

    Example: echelon bench online --model DIR --rate 4 --rate 8 --duration 60 --ttft-slo-s 0.5 --itl-slo-s 0.03
    """
    lengths = {"prompt_tokens": prompt_tokens, "output_tokens": output_tokens}
    loads = [Load(rate=each, duration_s=duration, **lengths, spread=spread, seed=seed) for each in rate]
    setting = settle(flags)
    loads[0].check_fits(setting.max_context)
    schedules = [schedule(load, setting.model.vocab_size) for load in loads]
    for load, arrivals in zip(loads, schedules, strict=True):
        if not arrivals:
            raise ConfigError(
                f"--rate {load.rate:g} for {load.duration_s:g} s: no request arrives; raise --rate or --duration",
                field="rate",
            )
    with cluster(setting, target) as serving:
        about = serving.setting.about(None, target)
        warm_up = Load(rate=1e3, duration_s=WARM_UP_REQUESTS / 1e3, **lengths, seed=seed + 1)
        asyncio.run(run_load(serving.address, schedule(warm_up, setting.model.vocab_size)))
        for load, arrivals in zip(loads, schedules, strict=True):
            answers, total_s = asyncio.run(run_load(serving.address, arrivals))
            asked = {"rate": load.rate, "duration_s": load.duration_s, **lengths, "spread": spread, "seed": seed}
            row = figures(answers, total_s, ttft_slo_s, itl_slo_s)
            tell({"through": "grpc", **asked, **row, "start_s": serving.start_s, **about}, results)
