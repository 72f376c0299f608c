"""One cluster under layouts.py: a layout, what is asked of it, and the pipeline's operations drawn.

Talks to the cluster as a client; starts and ends nothing.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
import sys
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from benchmarks.layouts_figures import Answer, Executed, between, executed, forwards, rounds_from
from echelon import AsyncClient
from echelon.bench.cases import Case
from echelon.bench.offline import Outcome, run_case
from echelon.cli.trace.drawing import to_png, to_svg
from echelon.cli.trace.figures import figures
from echelon.cli.trace.picture import Panel, draw
from echelon.errors import ConfigError
from echelon.testing import LocalCluster
from parallel.timeline import OpRecord
from parallel.trace import merged, parse_records

DEGREES = ("replicas", "pipeline", "data", "tensor", "expert", "pipeline_depth")
RANK = ("replica", "pipeline", "data", "tensor", "expert", "device")
RANK_BYTES = ("parameter_bytes", "planned_parameter_bytes", "kv_bytes", "planned_kv_bytes")
REQUESTS, PROMPT_TOKENS, OUTPUT_TOKENS = 32, (16, 256), 64
WARM_UP_REQUESTS, WARM_UP_TOKENS = 16, 4
DRAWN_MICROBATCHES = 16
LOGGED_AFTER_S = 1.0  # ranks write operations when they take results
T = TypeVar("T")
Emit = Callable[[Mapping[str, object]], None]


@dataclass(frozen=True, slots=True)
class Layout:
    """Degrees as serve takes them; none of them is one device."""

    flags: Mapping[str, int]

    @classmethod
    def parse(cls, text: str) -> Layout:
        """Of "tensor=2,expert=2"."""
        pairs = [part.partition("=") for part in text.split(",")]
        if unknown := [name for name, _, _ in pairs if name not in DEGREES]:
            raise SystemExit(f"--layouts: {unknown[0]!r} is none of {', '.join(DEGREES)}")
        return cls({name: int(value) for name, _, value in pairs})

    def __str__(self) -> str:
        return ",".join(f"{name}={value}" for name, value in self.flags.items()) or "one device"

    @property
    def stages(self) -> int:
        return self.flags.get("pipeline", 1)

    @property
    def cohorts(self) -> int:
        """That take turns."""
        return self.flags.get("pipeline_depth", self.stages)


@dataclass(frozen=True, slots=True)
class Settings:
    """Of a whole run."""

    model: Path
    device: str
    cases: tuple[Case, ...]
    out: Path
    case_limit_s: float
    serve_flags: Mapping[str, object]
    vocabulary: int
    emit: Emit


async def ask(target: str, vocabulary: int, at_once: int) -> list[Answer]:
    """The same requests whenever it is asked."""
    draw = random.Random("agreement")
    prompts = [[draw.randrange(vocabulary) for _ in range(draw.randint(*PROMPT_TOKENS))] for _ in range(REQUESTS)]
    places = asyncio.Semaphore(at_once)
    async with AsyncClient(target) as client:

        async def one(prompt: list[int]) -> Answer:
            async with places:
                told = await client.generate(
                    token_ids=prompt, max_tokens=OUTPUT_TOKENS, temperature=0.0, ignore_eos=True, logprobs=0
                )
            return Answer(told.token_ids, tuple(logprob.logprob for logprob in told.logprobs))

        return await asyncio.gather(*map(one, prompts))


@dataclass(frozen=True, slots=True)
class Session:
    """One cluster that serves a layout in a dtype."""

    settings: Settings
    layout: Layout
    dtype: str
    cluster: LocalCluster
    trace_dir: Path

    def emit(self, what: str, found: Mapping[str, object]) -> None:
        self.settings.emit({"what": what, "layout": str(self.layout), "dtype": self.dtype, **found})

    def answers(self, at_once: int = REQUESTS) -> list[Answer]:
        return self._limited(ask(self.cluster.target, self.settings.vocabulary, at_once))

    def run(self, case: Case, seed: int) -> Outcome:
        return self._limited(run_case(self.cluster.target, case, self.settings.vocabulary, seed))

    def _limited(self, work: Coroutine[None, None, T]) -> T:
        async def limited() -> T:
            async with asyncio.timeout(self.settings.case_limit_s):
                return await work

        return asyncio.run(limited())

    def records(self, since_s: float, until_s: float) -> list[OpRecord]:
        """What all ranks began in the window."""
        time.sleep(LOGGED_AFTER_S)
        lines = {path: path.read_text().splitlines() for path in self.trace_dir.glob("replica-0-*.jsonl")}
        found = [record for path, text in lines.items() for record in parse_records(text, path.name)]
        return merged(between(found, since_s, until_s))


def rank_rows(cluster: LocalCluster) -> list[dict[str, object]]:
    """Where each rank stands, and what is resident there."""
    ranks = [dataclasses.asdict(rank) for rank in cluster.ranks()]
    return [{name: rank[name] for name in RANK + RANK_BYTES} for rank in ranks]


def timeline(session: Session, case: Case, outcome: Outcome) -> Executed | None:
    """The figures of the case as a whole and from the last first id on, and a picture; those of the latter."""
    layout, until_s = session.layout, outcome.begun_s + outcome.total_s
    decoding_s = outcome.begun_s + max(outcome.time_to_first_s)
    records = session.records(outcome.begun_s, until_s)
    spans = {"whole": records, "all decode": between(records, decoding_s, until_s)}
    found = {name: executed(part, layout.stages, layout.cohorts) for name, part in spans.items()}
    for name, part in found.items():
        shown = {"case": str(case), "part": name, **(dataclasses.asdict(part) if part else {"error": "not logged"})}
        session.emit("executed", shown)
    panels = []
    for name, since_s in (("with prompts", outcome.begun_s), ("all decode", decoding_s)):
        drawn = rounds_from(records, layout.stages, since_s, DRAWN_MICROBATCHES)
        if drawn.records:
            title = f"{layout}, {case}, {name}: {DRAWN_MICROBATCHES} micro-batches as executed"
            panels.append(Panel(figures(title, forwards(drawn.records, layout.stages)), drawn, layout.cohorts))
    if panels:
        stem = session.settings.out / f"{session.settings.model.name}-{layout}".replace("=", "").replace(",", "-")
        stem.with_suffix(".svg").write_text(to_svg(draw(panels)))
        try:
            stem.with_suffix(".png").write_bytes(to_png(draw(panels)))
        except ConfigError as error:
            print(f"{stem.name}: {error}", file=sys.stderr)
    return found["all decode"]
