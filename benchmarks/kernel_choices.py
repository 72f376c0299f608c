"""What benchmarks/kernels.py tries for each kernel: how it is cut. It needs Triton."""

from __future__ import annotations

from benchmarks.kernel_problems import Choice
from models.kernels import few_rows, prefill
from models.kernels.paged_decode import Tiling
from parallel.kernels import linear

HEADS = [
    {"tiling": Tiling(tokens, heads, warps, stages, resident)}
    for tokens, heads, warps, stages, resident in (
        (64, 16, 4, 3, 3),
        (64, 16, 4, 5, 2),
        (64, 8, 4, 4, 4),
        (32, 16, 4, 4, 5),
        (32, 16, 4, 5, 4),
        (128, 16, 4, 4, 1),
        (128, 16, 8, 4, 1),
    )
]
LATENT = [
    {"tiling": Tiling(tokens, 16, warps, stages, resident)}
    for tokens, warps, stages, resident in (
        (32, 4, 4, 2),
        (32, 4, 4, 4),
        (32, 8, 5, 2),
        (32, 8, 4, 2),
        (32, 4, 7, 1),
        (64, 4, 4, 1),
        (64, 8, 4, 1),
        (16, 4, 5, 3),
    )
]
MANY_HEADS = [
    {"tiling": Tiling(tokens, heads, 8, stages, resident)}
    for tokens, heads, stages, resident in ((64, 32, 4, 1), (32, 32, 5, 2), (32, 64, 3, 1), (32, 16, 5, 2))
]
GATE_UPS = [
    few_rows.Tiling(neurons, inputs, warps, stages)
    for neurons, inputs, warps, stages in (
        (64, 64, 4, 3),
        (64, 64, 4, 5),
        (64, 128, 4, 3),
        (64, 128, 4, 4),
        (128, 64, 4, 3),
        (128, 64, 8, 4),
        (32, 128, 4, 4),
        (32, 256, 4, 3),
    )
]
DOWNS = [
    few_rows.Tiling(neurons, inputs, warps, stages)
    for neurons, inputs, warps, stages in (
        (64, 64, 4, 4),
        (64, 64, 4, 6),
        (64, 128, 4, 3),
        (128, 64, 4, 4),
        (128, 128, 4, 3),
        (128, 64, 8, 4),
        (32, 128, 4, 5),
    )
]
# Neurons, inputs, warps and stages.
ONE_ROW = (
    (8, 512, 4, 3),
    (8, 512, 4, 6),
    (4, 1024, 4, 3),
    (4, 512, 4, 5),
    (16, 256, 4, 4),
    (8, 512, 2, 4),
)
FEW_ROWS = (
    (16, 256, 4, 6),
    (32, 256, 4, 3),
    (32, 256, 4, 5),
    (16, 512, 4, 3),
    (16, 512, 8, 4),
    (32, 128, 4, 6),
    (64, 128, 4, 4),
)


def linear_choices(rows: int, is_gated: bool) -> list[Choice]:
    """Of products: for one row also those of few, which use tensor cores."""
    if rows == 1:
        few = [linear.Tiling(16, *cut) for cut in FEW_ROWS[:3]]
        return [{"tiling": tiling} for tiling in (*(linear.Tiling(1, *cut) for cut in ONE_ROW), *few)]
    if rows != 16:
        return []
    return [{"tiling": linear.Tiling(rows, *cut)} for cut in FEW_ROWS if not (is_gated and cut[0] == 64)]


PROMPTS = [
    {"tiling": prefill.Tiling(rows, keys, warps, stages)}
    for rows, keys, warps, stages in (
        (128, 64, 8, 2),
        (128, 128, 8, 2),
        (128, 128, 8, 3),
        (128, 32, 8, 4),
        (64, 64, 4, 3),
        (64, 64, 4, 2),
        (64, 128, 4, 2),
    )
]
