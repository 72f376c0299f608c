"""Kernels on a CUDA device: each checked against float64, timed beside its floor and what it replaces, and cut anew.

    python -m benchmarks.kernels [--only linear fused heads latent experts rows prompts many_rows limits]
                                 [--seconds 480] [--output kernels.jsonl]
    TRITON_INTERPRET=1 python -m benchmarks.kernels --device cpu --dtype float16 --divided 64   # checks alone, small

A process for each family: first all checks, then times of what is served, then those of other tilings until the
family's share of the seconds is over. Times are of CUDA graphs, over inputs that no cache holds; the floor is what must
be read over the bandwidth, or the products over the rate of one of 8,192 x 8,192, which are measured first. Tables come
last; it ends with 1 if a check fails.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import decode_problems, kernel_layers, prompt_problems
from benchmarks.kernel_limits import Kept, big, kept
from benchmarks.kernel_problems import Choice, Maker, Problem

FAMILIES = ("linear", "fused", "heads", "latent", "experts", "rows", "prompts", "many_rows", "limits")
SHARES = {
    "linear": 0.2,
    "fused": 0.05,
    "heads": 0.15,
    "latent": 0.15,
    "experts": 0.2,
    "rows": 0.05,
    "prompts": 0.1,
    "many_rows": 0.1,
    "limits": 0.0,
}
PROBLEMS = {"linear": kernel_layers, "fused": kernel_layers, "prompts": prompt_problems, "many_rows": prompt_problems}
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
BANDWIDTH_BYTES = 8 << 30
WORST = 3  # times as much may a single row be wrong
LEAST_LOOPS, REPEATS = 8, 15


def error(found: Tensor, exact: Tensor) -> float:
    """Relative; what is not a number is as wrong as can be."""
    distance = float((found.double() - exact).norm() / exact.norm().clamp(min=1e-30))
    return distance if distance == distance else float("inf")


def worst(found: Tensor, exact: Tensor) -> float:
    """The greatest of the errors of rows: one in thousands hides in the error of all."""
    if exact.dim() < 2:
        return error(found, exact)
    distances = (found.double() - exact).norm(dim=-1) / exact.norm(dim=-1).clamp(min=1e-30)
    return float(distances.nan_to_num(torch.inf).max()) if len(distances) else 0.0


def bandwidth(device: torch.device) -> dict[str, float]:
    """Bytes a second: of reads, and of copies, which read and write."""
    source = torch.ones(BANDWIDTH_BYTES // 4, device=device)
    target = torch.empty_like(source)
    read_us = graph_us(lambda index: source.sum(), 1)
    copy_us = graph_us(lambda index: target.copy_(source), 1)
    return {"read": source.nbytes / read_us * 1e6, "copy": 2 * source.nbytes / copy_us * 1e6}


def product_rate(device: torch.device) -> float:
    """FLOP a second of a large product."""
    size = 8192
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / graph_us(lambda index: left @ right, 1) * 1e6


def graph_us(work: Callable[[int], object], sets: int) -> float:
    """Microseconds of one call, by set in turn, in a CUDA graph: the median of replays."""
    loops = max(sets, LEAST_LOOPS)
    for index in range(min(sets, 2)):
        work(index)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(loops):
            work(index % sets)
    times: list[float] = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / loops)
    graph.reset()
    return statistics.median(times[2:])


def eager_us(work: Callable[[int], object], sets: int) -> float:
    """Microseconds of one call, launched one after the other without a graph."""
    times = []
    for _ in range(5):
        begun_s = time.perf_counter()
        for index in range(LEAST_LOOPS):
            work(index % sets)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begun_s) * 1e6 / LEAST_LOOPS)
    return statistics.median(times)


class Report:
    """Lines for people, kept for a file too."""

    def __init__(self, output: Path | None) -> None:
        self._output = output
        self.failed = 0
        self.table: list[str] = []

    def line(self, **values: object) -> None:
        text = json.dumps(values)
        print(text, flush=True)
        if self._output is not None:
            with self._output.open("a") as file:
                file.write(text + "\n")

    def check(self, problem: Problem, dtype: torch.dtype, choice: Choice) -> float:
        """The error of one way to compute it."""
        exact = problem.exact()
        made = problem.kernel(0, **choice)
        found, of_a_row = error(made, exact), worst(made, exact)
        wrong = not (found <= TOLERANCE[dtype] and of_a_row <= WORST * TOLERANCE[dtype])
        self.failed += wrong
        today = error(problem.today(0), exact)
        said: dict[str, object] = {"check": problem.name, "error": found, "worst": of_a_row, "of_today": today}
        if choice:
            said["choice"] = str(choice)
        self.line(**said, **({"FAILED": True} if wrong else {}))
        return found

    def keep(self, kept: Kept) -> None:
        """One that is broken is told with what is wrong."""
        wrong = kept.wrong()
        self.failed += bool(wrong)
        self.line(check=kept.name, **({"FAILED": wrong} if wrong else {}))


def time_served(problem: Problem, report: Report, rate: float, flop_rate: float) -> None:
    """What is served, beside what it replaces and the floor."""
    floor = max(problem.reads_bytes / rate, problem.flop / flop_rate) * 1e6
    found, today = graph_us(problem.kernel, problem.sets), graph_us(problem.today, problem.sets)
    eager, eager_today = eager_us(problem.kernel, problem.sets), eager_us(problem.today, problem.sets)
    values = {"us": found, "floor_us": floor, "today_us": today, "eager_us": eager, "eager_today_us": eager_today}
    if problem.flop:
        values |= {"tflops": problem.flop / found / 1e6, "tflops_today": problem.flop / today / 1e6}
    report.line(case=problem.name, **{name: round(value, 1) for name, value in values.items()})
    ratios = f"{found / max(floor, 1e-9):7.2f} {today:9.1f} {today / found:7.2f}"
    report.table.append(f"{problem.name:42} {found:9.1f} {floor:9.1f} {ratios} {eager:9.1f} {eager_today:9.1f}")


def time_choices(problem: Problem, report: Report, dtype: torch.dtype, deadline_s: float) -> None:
    """Each choice, checked, and the best of them."""
    from triton import TritonError

    times: dict[str, float] = {}
    exact = problem.exact()
    for choice in problem.choices:
        if time.monotonic() > deadline_s:
            report.table.append(f"{problem.name:42} no time for all choices")
            break
        try:
            found = error(problem.kernel(0, **choice), exact)
            if found <= TOLERANCE[dtype]:
                times[str(choice)] = graph_us(functools.partial(problem.kernel, **choice), problem.sets)
            else:
                report.failed += 1
            report.line(case=problem.name, choice=str(choice), error=found, us=times.get(str(choice)))
        except (RuntimeError, TritonError) as failure:  # more shared memory than there is, for one
            report.line(case=problem.name, choice=str(choice), failed=str(failure).splitlines()[0])
    for choice_name, best in sorted(times.items(), key=lambda item: item[1])[:3]:
        report.table.append(f"{problem.name:42} {best:9.1f}   {choice_name}")


def run_limits(maker: Maker, report: Report) -> int:
    """Checks alone."""
    for problem in big(maker):
        report.check(problem, maker.dtype, {})
    for each in kept(maker):
        report.keep(each)
    print(f"limits: {report.failed} checks failed", flush=True)
    return report.failed


def run_family(family: str, arguments: argparse.Namespace) -> int:
    """In this process."""
    deadline_s = time.monotonic() + arguments.seconds
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    torch.manual_seed(1)
    report = Report(arguments.output)
    cuda = device.type == "cuda"
    processors = torch.cuda.get_device_properties(device).multi_processor_count if cuda else 4
    if family == "limits":
        return run_limits(Maker(device, dtype, arguments.divided, processors), report)
    problems = PROBLEMS.get(family, decode_problems)
    for few in (
        (processors, 1) if problems is not prompt_problems else (processors,)
    ):  # contexts in many pieces, and in one
        for problem in problems.odd(Maker(device, dtype, processors=few), family):
            report.check(problem, dtype, {})
    maker = Maker(device, dtype, arguments.divided, processors)
    if cuda:
        rates, flop_rate = bandwidth(device), product_rate(device)
        name = torch.cuda.get_device_name(device)
        report.line(device=name, torch=torch.__version__, bandwidth=rates, flop_rate=flop_rate)
    for problem in problems.served(maker, family):
        report.check(problem, dtype, {})
        if cuda:
            time_served(problem, report, rates["read"], flop_rate)
    if cuda:
        for problem in problems.served(maker, family):
            if problem.choices and time.monotonic() < deadline_s:
                time_choices(problem, report, dtype, deadline_s)
    head = f"{family:42} {'us':>9} {'floor':>9} {'ratio':>7} {'today':>9} {'times':>7} {'eager':>9} {'today':>9}"
    print("\n".join([head, *report.table, f"{report.failed} checks failed"]), flush=True)
    return report.failed


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--seconds", type=float, default=480, help="of all families together")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--divided", type=int, default=1, help="divides sizes")
    parser.add_argument("--output", type=Path, help="a file for JSON lines")
    arguments = parser.parse_args()
    if len(arguments.only) == 1:
        sys.exit(min(1, run_family(arguments.only[0], arguments)))
    options = ["--device", arguments.device, "--dtype", arguments.dtype, "--divided", str(arguments.divided)]
    if arguments.output is not None:
        options += ["--output", str(arguments.output)]
    whole, codes, tables = sum(SHARES[family] for family in arguments.only) or 1.0, {}, []
    for family in arguments.only:
        share = str(arguments.seconds * SHARES[family] / whole)
        command = [sys.executable, "-m", "benchmarks.kernels", "--only", family, "--seconds", share, *options]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        print(done.stdout, flush=True)
        codes[family] = done.returncode
        tables += [line for line in done.stdout.splitlines() if not line.startswith("{")]
    print("\n".join(tables), flush=True)
    print("exit codes:", codes)
    sys.exit(int(any(codes.values())))


if __name__ == "__main__":
    main()
