"""Products with 8 bit floats on a Hopper device: each way checked against float64, and timed beside bfloat16's.

    python -m benchmarks.float8 [--only dense experts] [--seconds 60] [--output float8.jsonl]
    TRITON_INTERPRET=1 python -m benchmarks.float8 --device cpu --divided 16     # the checks of Triton's ways, small

Matrices of published models with scales of blocks of 128 x 128. Times are of CUDA graphs, over inputs that no cache
holds. Ways: bfloat16 as it is served without 8 bit floats; 8 bit floats that become bfloat16 in registers, cut in
several ways; dequantised before each product; torch's scaled_mm and a kernel that quantise rows too. A way that fails
is said and loses no other.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from triton import TritonError

from benchmarks.float8_trial import linear_of_quantised
from benchmarks.kernel_problems import MOST_SETS, Sizes, sets_of
from benchmarks.kernels import Report, bandwidth, error, graph_us
from examples.quantize_fp8 import quantise
from models.kernels.float8 import experts_of_few_rows
from models.moe import Experts
from parallel.expert import Copies
from parallel.float8 import Float8
from parallel.kernels.float8 import Tiling, dequantised, linear_of_few_rows
from parallel.kernels.float8_rows import linear_of_quantised as scaled

BLOCK = (128, 128)
ROWS = (1, 16, 64, 256, 2048)
DENSE = {
    "V3 q_a and kv_a": (2112, 7168),
    "V3 q_b": (24576, 1536),
    "V3 o": (7168, 16384),
    "V3 shared gate and up": (4096, 7168),
    "V2-Lite q": (3072, 2048),
    "V2-Lite o": (2048, 2048),
    "Qwen3-8B qkv": (6144, 4096),
    "Qwen3-8B gate and up": (24576, 4096),
    "Qwen3-8B down": (4096, 12288),
}
EXPERTS = {  # and how many are held by other ranks
    "V3, an eighth": (Sizes(7168, 2048, 32, 8), 224),
    "V2-Lite": (Sizes(2048, 1408, 64, 6), 0),
    "Qwen3-30B": (Sizes(2048, 768, 128, 8), 0),
}
FEW = [Tiling(64, 16, 128, 4, 4), Tiling(64, 16, 128, 4, 6, 3), Tiling(128, 16, 128, 4, 4), Tiling(128, 16, 128, 8, 3)]
SOME = [Tiling(64, 64, 128, 4, 4), Tiling(128, 64, 128, 8, 3), Tiling(128, 64, 128, 4, 3)]
MANY = [Tiling(128, 128, 64, 8, 4, 1), Tiling(128, 64, 128, 8, 4, 1), Tiling(128, 128, 128, 8, 3, 1)]
OF_QUANTISED = {16: [Tiling(64, 16, 128, 4, 5)], 64: [Tiling(64, 64, 128, 4, 5)], 2048: [Tiling(128, 128, 128, 8, 4)]}
FEW_EXPERTS = [(64, 128, 4, 4), (64, 64, 4, 6), (128, 128, 8, 3), (128, 64, 8, 5)]
TOLERANCE = {"weights alone": 1e-2, "rows too": 1e-1}
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, TritonError)

Way = Callable[[int], Tensor]


class Case(NamedTuple):
    """ways: by name, of the number of a set; those that quantise rows begin with an asterisk."""

    name: str
    float8_bytes: int
    sets: int
    ways: Mapping[str, Way]
    exact: Callable[[], Tensor]


class Matrices(NamedTuple):
    """The same in 8 bit floats with scales, and in bfloat16."""

    values: Tensor
    scales: Tensor
    plain: Tensor

    @property
    def float8(self) -> Float8:
        return Float8(self.values, self.scales, BLOCK)


class Maker:
    """Cases on a device. divided: sizes are, for a machine that tries the script alone."""

    def __init__(self, device: torch.device, divided: int) -> None:
        self._device, self._divided = device, divided
        self._cuda = device.type == "cuda"
        self._dtype = torch.bfloat16 if self._cuda else torch.float16
        self._processors = torch.cuda.get_device_properties(device).multi_processor_count if self._cuda else 4

    def dense(self) -> Iterator[Case]:
        """Each matrix for each number of rows."""
        for name, (neurons, inputs) in DENSE.items():
            shape = neurons // self._divided, -(-inputs // self._divided // 128) * 128
            numbers = shape[0] * shape[1]
            sets = [self._matrices(*shape) for _ in range(sets_of(numbers) if self._cuda else 1)]
            for rows in ROWS if self._cuda else (1, 16, 40):
                yield self._dense(f"{name}, {rows} rows", rows, sets)

    def experts(self) -> Iterator[Case]:
        """Each mixture for each number of rows."""
        for name, (sizes, elsewhere) in EXPERTS.items():
            hidden, neurons = (max(128, n // self._divided // 128 * 128) for n in (sizes.hidden, sizes.neurons))
            slots, others = max(2, sizes.slots // self._divided), elsewhere // self._divided
            first = self._matrices(2 * neurons, hidden, slots)
            second = self._matrices(hidden, neurons, slots)
            for rows in ROWS if self._cuda else (1, 5):
                chosen = min(sizes.chosen, slots)
                yield self._experts(f"experts of {name}, {rows} rows", rows, chosen, others, (first, second))

    def _dense(self, name: str, rows: int, sets: list[Matrices]) -> Case:
        x = [self._random(rows, sets[0].values.shape[1]) for _ in sets]

        def plain(index: int) -> Tensor:
            return F.linear(x[index], sets[index].plain)

        def scaled_mm(index: int) -> Tensor:
            return scaled(x[index], sets[index].float8)

        def ours(index: int, tiling: Tiling) -> Tensor:
            return linear_of_few_rows(x[index], sets[index].float8, tiling, self._processors)

        def of_quantised(index: int, tiling: Tiling) -> Tensor:
            return linear_of_quantised(x[index], sets[index].values, sets[index].scales, tiling)

        def before(index: int) -> Tensor:
            return F.linear(x[index], dequantised(sets[index].float8, x[index].dtype))

        tilings = FEW if rows <= 16 else SOME if rows <= 64 else MANY
        fitting = next(tiled for most, tiled in OF_QUANTISED.items() if rows <= most or most == max(OF_QUANTISED))
        ways: dict[str, Way] = {"bfloat16": plain}
        ways |= {_name(tiling): functools.partial(ours, tiling=tiling) for tiling in tilings}
        if rows > 16:
            ways["dequantised before"] = before
        if self._cuda:
            ways["*scaled_mm"] = scaled_mm
        ways |= {f"*{_name(tiling)}": functools.partial(of_quantised, tiling=tiling) for tiling in fitting}

        def exact() -> Tensor:
            return F.linear(x[0].double(), _wide(sets[0]))

        return Case(name, sets[0].values.nbytes + sets[0].scales.nbytes, len(sets), ways, exact)

    def _experts(self, name: str, rows: int, chosen: int, elsewhere: int, matrices: tuple[Matrices, Matrices]) -> Case:
        (first, second), slots = matrices, len(matrices[0].values)
        layer = Experts(first.plain, second.plain, F.silu)
        inputs = [(self._random(rows, first.plain.shape[-1]), self._copies(rows, chosen, slots, elsewhere))
                  for _ in range(2 * MOST_SETS if rows == 1 else 4)]  # fmt: skip
        touched = sum(int((copies.ends.diff(prepend=copies.ends.new_zeros(1)) > 0).sum()) for _, copies in inputs)
        few = max(16, min(64, 1 << (3 * rows * chosen // (2 * (slots + elsewhere)) - 1).bit_length()))

        def plain(index: int) -> Tensor:
            return layer(*inputs[index])

        def ours(index: int, cut: Tiling) -> Tensor:
            x, copies = inputs[index]
            return experts_of_few_rows(x, first.float8, second.float8, copies, cut, cut)

        def before(index: int) -> Tensor:
            x, copies = inputs[index]
            gate_up, down = (dequantised(matrix.float8, x.dtype) for matrix in matrices)
            return Experts(gate_up, down, F.silu)(x, copies)

        ways: dict[str, Way] = {"bfloat16": plain}
        for neurons, wide, warps, stages in FEW_EXPERTS:
            cut = Tiling(neurons, few, wide, warps, stages)
            ways[_name(cut)] = functools.partial(ours, cut=cut)
        if rows >= 256 and self._cuda:
            ways["dequantised before"] = before

        def exact() -> Tensor:
            x, copies = inputs[0]
            wide = Experts(_wide(first), _wide(second), F.silu)
            return copies.sums(wide.outputs(copies.taken(x.double()), copies.ends))

        read = touched * sum(m.values[0].nbytes for m in matrices) // len(inputs)
        return Case(name, read, len(inputs), ways, exact)

    def _copies(self, rows: int, chosen: int, slots: int, elsewhere: int) -> Copies:
        scores = torch.rand(rows, slots + elsewhere, device=self._device)
        shares, ids = scores.softmax(-1).topk(chosen, dim=-1)
        return Copies.of_own(ids, shares, slots, None) if elsewhere else Copies.of(ids, shares, slots)

    def _matrices(self, neurons: int, inputs: int, count: int | None = None) -> Matrices:
        """One, or so many, stacked."""
        parts = []
        for _ in range(count or 1):
            values, scales = quantise(self._random(neurons, inputs) * inputs**-0.5, BLOCK)
            made = Matrices(values.contiguous(), scales.contiguous(), values)
            parts.append(made._replace(plain=_wide(made).to(self._dtype)))
        if count is None:
            return parts[0]
        return Matrices(*(torch.stack(kind) for kind in zip(*parts, strict=True)))

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self._device).to(self._dtype)


def _wide(matrices: Matrices) -> Tensor:
    """What the 8 bit floats stand for, in float64."""
    rows, columns = matrices.values.shape[-2:]
    by_row = matrices.scales.repeat_interleave(BLOCK[0], -2)[..., :rows, :]
    return matrices.values.double().mul_(by_row.repeat_interleave(BLOCK[1], -1)[..., :columns])


def _name(tiling: Tiling) -> str:
    cut = (tiling.neurons, tiling.rows, tiling.inputs, tiling.warps, tiling.stages, tiling.programs)
    return "kernel " + "/".join(map(str, cut))


def compile_at_once(ways: Iterable[Way]) -> None:
    """Runs each once, in threads, as compiling takes most of the time; what fails fails again later."""

    def attempt(way: Way) -> None:
        with contextlib.suppress(*FAILURES):
            way(0)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(attempt, ways))


def run(case: Case, report: Report, rate: float | None) -> None:
    """Checks and times each way. rate: bytes a second that are read; None: checks alone."""
    times: dict[str, float] = {}
    if rate is not None:
        compile_at_once(case.ways.values())
    exact = case.exact()
    for name, way in case.ways.items():
        try:
            found = error(way(0), exact)
            wrong = not found <= TOLERANCE["rows too" if name.startswith("*") else "weights alone"]
            if rate is not None and not wrong:
                times[name] = graph_us(way, case.sets)
        except FAILURES as failure:
            report.line(case=case.name, way=name, failed=str(failure).splitlines()[0][:200])
            continue
        report.failed += wrong
        said = {"us": round(times[name], 2)} if name in times else {}
        report.line(case=case.name, way=name, error=found, **said, **({"FAILED": True} if wrong else {}))
    if rate is None or "bfloat16" not in times:
        return
    plain, floor = times["bfloat16"], case.float8_bytes / rate * 1e6
    report.table.append(f"{case.name:40} floor {floor:8.1f}   bfloat16 {plain:8.1f}")
    kinds = {"kernel": "kernel", "dequantised before": "dequan", "*scaled_mm": "*scale", "*kernel": "*kerne"}
    for kind, prefix in kinds.items():
        best = min(
            (item for item in times.items() if item[0].startswith(prefix)), key=lambda item: item[1], default=None
        )
        if best is not None:
            report.table.append(f"{'':40} {kind:20} {best[1]:8.1f}   {plain / best[1]:5.2f} times   {best[0]}")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=("dense", "experts"), default=["dense", "experts"])
    parser.add_argument("--seconds", type=float, default=60, help="of all together; no case begins later")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--divided", type=int, default=1, help="divides sizes")
    parser.add_argument("--output", type=Path, help="a file for JSON lines")
    arguments = parser.parse_args()
    begun_s, report = time.monotonic(), Report(arguments.output)
    torch.manual_seed(1)
    device, rate = torch.device(arguments.device), None
    if device.type == "cuda":
        rates = bandwidth(device)
        rate = rates["read"]
        report.line(device=torch.cuda.get_device_name(device), torch=torch.__version__, bandwidth=rates)
    maker = Maker(device, arguments.divided)
    for number, family in enumerate(arguments.only, 1):
        deadline_s = begun_s + arguments.seconds * number / len(arguments.only)
        for case in maker.dense() if family == "dense" else maker.experts():
            if time.monotonic() > deadline_s:
                report.table.append(f"{case.name:40} no time for it")
                continue
            run(case, report, rate)
    print("\n".join([*report.table, f"{report.failed} checks failed"]), flush=True)
    sys.exit(min(1, report.failed))


if __name__ == "__main__":
    main()
