"""Kernels for CUDA, written in Triton. Each stands beside plain torch, which computes the same on every device."""

from __future__ import annotations

import functools
import importlib.util

import torch

DTYPES = (torch.bfloat16, torch.float16)


def can_run(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether kernels here serve such tensors. Their modules are imported where this holds, for not all have Triton."""
    return device.type == "cuda" and dtype in DTYPES and _triton_is_installed()


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
