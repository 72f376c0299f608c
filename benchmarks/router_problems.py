"""Routers of published models, for benchmarks/kernels.py: the kernel beside the plain ones, on random rows and weights.

Shares alone are compared, the greatest first: a tie of two experts may fall either way.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.kernel_problems import Maker, Problem
from models.router import GroupedSoftmaxRouter, Router, SigmoidRouter, SoftmaxRouter
from models.routing import Groups

SIZES = {"V2-Lite": (64, 2048), "Qwen3-30B": (128, 2048), "V3": (256, 7168)}  # experts and hidden numbers


def routers(maker: Maker, rows: int) -> Iterator[Problem]:
    """Of so many rows."""
    for model, (experts, hidden) in SIZES.items():
        yield _problem(maker, f"router of {model}, {rows} rows", model, rows, experts, hidden // maker.divided)


def _router(model: str, weight: Tensor) -> Router:
    if model == "V2-Lite":
        return GroupedSoftmaxRouter(weight, 6, None, 1.0)
    if model == "Qwen3-30B":
        return SoftmaxRouter(weight, 8, normalizes=True, rounds=True)
    correction = torch.zeros(len(weight), device=weight.device)
    return SigmoidRouter(weight, correction, 8, Groups(8, 4), normalizes=True, scale=2.5)


def _problem(maker: Maker, name: str, model: str, rows: int, experts: int, hidden: int) -> Problem:
    x, weight = maker.random(rows, hidden), maker.random(experts, hidden).mul_(hidden**-0.5)
    layer, wide = _router(model, weight), _router(model, weight.double())

    def kernel(index: int) -> Tensor:
        shares = layer(x)[1]
        return shares if x.is_cuda else shares.sort(descending=True)[0]  # without a device it is the plain one

    def exact() -> Tensor:
        return wide.plain(x.double())[1].sort(descending=True)[0]

    return Problem(name, weight.nbytes + x.nbytes, 1, kernel, lambda index: layer.plain(x)[1], exact)
