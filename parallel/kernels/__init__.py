"""Kernels for CUDA in Triton, and where they may run. Each stands beside plain torch that computes the same."""

from __future__ import annotations

import functools
import importlib.util

import structlog
import torch

DTYPES = (torch.bfloat16, torch.float16)
LEAST_CAPABILITY = (8, 0)  # before it, bfloat16 is multiplied nowhere

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
