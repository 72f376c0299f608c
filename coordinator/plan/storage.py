"""Whether a planned model's matrices stay 8 bit floats, where `echelon serve` is left to settle it.

Pure but for config.json, for the planner's command line; what a cluster does is in coordinator/supervisor/float8.py.
"""

from __future__ import annotations

from pathlib import Path

from coordinator.plan.hardware import Gpu
from echelon.errors import ConfigError
from models.config import read_model_config
from models.cutting import check_degrees
from models.quantization import KEPT_BLOCK, KEPT_DTYPE
from parallel.degrees import Degrees


def keeps_float8(model: Path, gpu: Gpu, dtype: str, given: Degrees) -> bool:
    """As a cluster would settle it, if the degrees that are not given cut no matrix within a block either. dtype: what
    was asked for, empty if nothing was."""
    if not gpu.float8_blocks or dtype not in ("", KEPT_DTYPE):
        return False
    try:
        config = read_model_config(model, planning=True, keep_float8=True)
        check_degrees(config, given)
    except ConfigError:
        return False
    return config.quantization is not None and config.quantization.held == KEPT_BLOCK
