"""Kernels for CUDA in Triton, and where they may run. Each stands beside plain torch that computes the same."""

from __future__ import annotations

import functools
import importlib.util

import torch

DTYPES = (torch.bfloat16, torch.float16)


def can_run(device: torch.device) -> bool:
    """Whether there are kernels for the device. Their modules are imported where this holds: not all have Triton."""
    return device.type == "cuda" and _triton_is_installed()


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
