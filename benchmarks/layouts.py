"""Layouts of one model beside one device: how far the answers agree, how fast they come, how full a pipeline is.

    python benchmarks/layouts.py --model DIR --device cuda --dtypes bfloat16 --layouts "tensor=2 pipeline=2 \
        pipeline=2,pipeline_depth=1" --cases 64x512x128,256x1024x128 --out FOLDER

Each layout, one device first: 32 greedy requests with logprobs, compared with one device's, then cases N x I x O
(in the last dtype; warmed up by a few requests). A pipeline's operations are logged: the figures of the last case,
whole and while all decode, and a picture of both. One device also answers once more, fewer requests at once:
what differs then is rounding. A layout that fails is named with its error, and the next one goes on. One JSON line a
result in FOLDER, one table at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the modules beside this one, by the names tests import

from benchmarks.layouts_figures import Agreement, Answer, Executed, agreement
from benchmarks.layouts_session import (
    REQUESTS,
    WARM_UP_REQUESTS,
    WARM_UP_TOKENS,
    Layout,
    Session,
    Settings,
    rank_rows,
    timeline,
)
from echelon.bench.about import commit, versions
from echelon.bench.cases import Case
from echelon.bench.offline import case_row
from echelon.errors import EchelonError
from echelon.testing import LocalCluster
from models.config import read_model_config

FEW = 8
FAILURES = (EchelonError, RuntimeError, TimeoutError, AssertionError, OSError)


@dataclass(slots=True)
class Row:
    """What the table shows of a layout in a dtype."""

    layout: str
    dtype: str
    agreement: Agreement | None = None
    tokens_per_s: dict[str, float] = dataclasses.field(default_factory=dict)
    decode: Executed | None = None
    error: str = ""

    def cells(self, cases: Sequence[Case]) -> list[str]:
        found = self.agreement
        speeds = [f"{self.tokens_per_s[str(case)]:.0f}" if str(case) in self.tokens_per_s else "-" for case in cases]
        cells = [self.layout, self.dtype]
        cells += ["-"] * 3 if found is None else [f"{found.equal:.1%}", *map(_short, _differences(found))]
        cells += speeds
        if self.decode is None:
            return [*cells, *["-"] * 3, self.error]
        slots = "/".join(f"{slot:.1f}" for slot in self.decode.median_slot_ms)
        bubbles = "/".join(f"{bubble:.0%}" for bubble in self.decode.bubble)
        return [*cells, bubbles, slots, _short(self.decode.median_round_ms or 0.0), self.error]


def measure(session: Session, row: Row, reference: list[Answer] | None, timed: bool) -> list[Answer]:
    """Fills the row and emits a line for everything found; the answers."""
    answers = session.answers()
    if not session.layout.flags:
        row.agreement = agreement(session.answers(at_once=FEW), answers)
        session.emit(f"agreement of {FEW} requests at once with {REQUESTS}", dataclasses.asdict(row.agreement))
    elif reference is not None:
        row.agreement = agreement(answers, reference)
        session.emit("agreement with one device", dataclasses.asdict(row.agreement))
    for case in session.settings.cases if timed else ():
        session.run(case.smaller(WARM_UP_REQUESTS, WARM_UP_TOKENS), 0)
        outcome = session.run(case, 1)
        found = case_row(case, [outcome])
        session.emit("case", found)
        row.tokens_per_s[str(case)] = case.requests * case.output_tokens / outcome.total_s
        if session.layout.stages > 1 and case == session.settings.cases[-1]:
            row.decode = timeline(session, case, outcome)
    return answers


class Clusters:
    """One cluster at a time: a new one for each layout, or with walk the same processes as long as they can change."""

    def __init__(self, settings: Settings, walk: bool) -> None:
        self._settings, self._walk = settings, walk
        self._cluster: LocalCluster | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="echelon-trace-")
        self._unused: dict[str, object] = {"tensor": 1}  # flags of earlier layouts go back to their defaults

    def serve(self, layout: Layout, dtype: str) -> Session:
        """Returns when it serves; the session's first line says after how long."""
        started_s = time.perf_counter()
        flags = {**self._unused, **layout.flags, "dtype": dtype}
        self._unused |= dict.fromkeys(layout.flags.keys() - {"tensor"})
        walked = self._cluster is not None and self._walk and self._changed(flags)
        if not walked:
            self.close()
            fixed: dict[str, Any] = {
                "device": self._settings.device,
                "trace_dir": self._folder.name,
                **self._settings.serve_flags,
            }
            self._cluster = LocalCluster(self._settings.model, **(fixed | flags))
        assert self._cluster is not None
        session = Session(self._settings, layout, dtype, self._cluster, Path(self._folder.name))
        seconds = round(time.perf_counter() - started_s, 2)
        session.emit("start", {"start_s": seconds, "same_processes": walked, "ranks": rank_rows(self._cluster)})
        return session

    def _changed(self, flags: Mapping[str, object]) -> bool:
        assert self._cluster is not None
        try:
            self._cluster.reconfigure(**flags)
        except FAILURES as error:
            print(f"--- not changed to {flags}: {error}", file=sys.stderr, flush=True)
            self.broke()
            return False
        return True

    def broke(self) -> None:
        """Ranks that hang would make a gentle end long."""
        if self._cluster is not None:
            print(self._cluster.log_tail(), file=sys.stderr, flush=True)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._cluster.pid, signal.SIGKILL)
        self.close()

    def close(self) -> None:
        if self._cluster is not None:
            self._cluster.close()
        self._cluster = None


def measure_all(settings: Settings, layouts: Sequence[Layout], dtypes: Sequence[str], walk: bool) -> Iterator[Row]:
    """The rows, each before it is filled. One that fails says so, and the next goes on."""
    clusters = Clusters(settings, walk)
    try:
        for dtype in dtypes:
            reference = None
            for layout in layouts:
                row = Row(str(layout), dtype)
                yield row
                try:
                    answers = measure(clusters.serve(layout, dtype), row, reference, timed=dtype == dtypes[-1])
                    reference = reference if layout.flags else answers
                except FAILURES as error:
                    row.error = reason(f"{type(error).__name__}: {error}")
                    print(f"--- {layout}, {dtype}\n{str(error)[-4000:]}", file=sys.stderr, flush=True)
                    settings.emit({"what": "failure", "layout": str(layout), "dtype": dtype, "error": row.error})
                    clusters.broke()
        clusters.close()
    except BaseException:
        clusters.broke()
        raise


def reason(text: str) -> str:
    """What the server said last, or the exception's first line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("echelon: error:")]
    return (told[-1].removeprefix("echelon: error:").strip() if told else lines[0])[:300]


def table(rows: Sequence[Row], cases: Sequence[Case]) -> str:
    """Everything in columns; bubble, slot and round of pipelines while all requests decode."""
    head = ["layout", "dtype", "equal ids", "max dlogprob", "mean dlogprob", *(f"{case} tok/s" for case in cases)]
    lines = [[*head, "bubble by stage", "slot ms", "round ms", "error"], *(row.cells(cases) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _differences(found: Agreement) -> tuple[float, float]:
    return found.greatest_difference, found.mean_difference


def _short(value: float) -> str:
    return f"{value:.3g}"


def ended(number: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM: end the cluster, print what there is."""
    raise SystemExit(128 + number)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--layouts", default="tensor=2 pipeline=2", help="divided by spaces; one device comes first")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", default="float32", help="divided by commas; cases run in the last")
    parser.add_argument("--cases", default="", help="none: answers are compared, and that is all")
    parser.add_argument("--out", type=Path, required=True, help="folder for JSON lines and pictures")
    parser.add_argument("--walk", action="store_true", help="change a cluster's layout instead of starting another")
    parser.add_argument("--commit", help="default: what git says")
    parser.add_argument("--case-limit-s", type=float, default=120.0)
    parser.add_argument("--start-limit-s", type=float, default=120.0)
    parser.add_argument("--max-running", type=int, default=256)
    parser.add_argument("--max-context", type=int, default=2048)
    parser.add_argument("--max-step-tokens", type=int, default=8192)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, ended)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (arguments.out / f"layouts-{arguments.model.name}.jsonl").open("w", buffering=1) as file:

        def emit(found: Mapping[str, object]) -> None:
            file.write(json.dumps(found) + "\n")

        settings = Settings(
            model=arguments.model,
            device=arguments.device,
            cases=tuple(map(Case.parse, filter(None, arguments.cases.split(",")))),
            out=arguments.out,
            case_limit_s=arguments.case_limit_s,
            serve_flags={
                "max_running": arguments.max_running,
                "max_context": arguments.max_context,
                "max_step_tokens": arguments.max_step_tokens,
                "start_timeout_s": arguments.start_limit_s,
                "drain_timeout_s": 2,
            },
            vocabulary=read_model_config(arguments.model).vocab_size,
            emit=emit,
        )
        about = {"model": arguments.model.name, "commit": arguments.commit or commit(), "versions": versions()}
        about |= {"device": arguments.device, "machine": platform.processor() or platform.machine()}
        config = json.loads((arguments.model / "config.json").read_text())
        emit({"what": "run", "date": time.strftime("%Y-%m-%d"), **about, "config": config})
        rows: list[Row] = []
        layouts = [Layout({}), *map(Layout.parse, arguments.layouts.split())]
        try:
            for row in measure_all(settings, layouts, arguments.dtypes.split(","), arguments.walk):
                print(f"{row.layout}, {row.dtype} ...", file=sys.stderr, flush=True)
                rows.append(row)
        finally:
            print(f"{about}\n{table(rows, settings.cases)}", flush=True)


if __name__ == "__main__":
    main()
