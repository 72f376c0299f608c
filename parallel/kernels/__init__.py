"""Kernels for CUDA in Triton, and where they may run. Each stands beside plain torch that computes the same."""

from __future__ import annotations

import functools
import importlib.util

import structlog
import torch

DTYPES = (torch.bfloat16, torch.float16)
LEAST_CAPABILITY = (8, 0)  # before it, bfloat16 is multiplied nowhere
HOPPER = (9, 0)
FLOAT8_COLUMNS = 128  # of a block of 8 bit floats, or a multiple: what a kernel multiplies at once has one scale

log = structlog.get_logger("kernels")


def can_run(device: torch.device) -> bool:
    """Whether there are kernels for the device. Their modules are imported where this holds: not all have Triton."""
    return device.type == "cuda" and _work_on(device)


@functools.cache
def _work_on(device: torch.device) -> bool:
    """Found out once. Without them a rank computes the same, only slower, so it goes on, and its log says why."""
    if importlib.util.find_spec("triton") is None or torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        return False
    from parallel.kernels.trial import launch

    try:
        launch(device)
    except Exception as error:  # noqa: BLE001 - a missing compiler, a folder, a driver: each says it in its own way
        log.warning("no kernel can be compiled, torch stands in", device=str(device), reason=repr(error))
        return False
    return True


@functools.cache
def has_float8(device: torch.device) -> bool:
    """Whether a CUDA device converts 8 bit floats itself."""
    return torch.cuda.get_device_capability(device) >= (8, 9)


@functools.cache
def multiplies_float8(device: torch.device) -> bool:
    """Whether torch multiplies 8 bit floats with scales of blocks there: cuBLAS does for Hopper, since 12.9. Found out
    once, where kernels can run; without it matrices are dequantised for many rows."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != HOPPER:
        return False
    from parallel.kernels.float8_rows import attempt

    try:
        attempt(device)
    except (AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
        log.warning("torch multiplies no 8 bit floats by blocks", device=str(device), reason=repr(error))
        return False
    return True
