"""Whether matrices that a checkpoint has in 8 bit floats stay what they are, where that is left to the cluster.

In the supervisor, which imports no torch: it asks the driver what the devices are. They stay where products with them
were measured to be faster, and where every one of them can.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from coordinator.placement import degrees_of
from echelon.config import Device, Dtype, Float8Storage, ServeConfig
from echelon.errors import ConfigError
from models.config import read_model_config
from models.cutting import check_degrees
from models.files import check_model_directory
from models.quantization import KEPT_BLOCK, KEPT_DTYPE

MEASURED = "9.0"  # Hopper: docs/adr/0016-matrices-may-stay-8-bit-floats.md
_QUERY = ("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
_LIMIT_S = 10.0


def settled_float8(config: ServeConfig, directory: Path, device: Device, dtype: Dtype) -> Float8Storage:
    """What is asked for; or by device, dtype, layout and checkpoint, none of which is refused for it.

    Raises ConfigError where what is asked for is not to be had."""
    if config.load_format == "random":
        if config.float8 == "kept":
            raise ConfigError(
                "float8=kept is for matrices that a checkpoint has in 8 bit floats, and load-format=random makes "
                "none; leave one of both out",
                field="float8",
            )
        return "dequantised"  # what is made has no scales
    if config.float8 != "auto":
        return config.float8
    possible = device == "cuda" and dtype == KEPT_DTYPE and _all_can_stay(config, directory)
    return "kept" if possible and set(compute_capabilities()) == {MEASURED} else "dequantised"


def compute_capabilities() -> list[str]:
    """Of this machine's devices, as in 9.0; none where the driver does not say."""
    try:
        told = subprocess.run(_QUERY, capture_output=True, text=True, timeout=_LIMIT_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return told.split()


def _all_can_stay(config: ServeConfig, directory: Path) -> bool:
    """Whether each matrix has scales of such blocks as kernels are for, and no rank begins within one."""
    try:
        model = read_model_config(directory, keep_float8=True)
        check_model_directory(directory, predicts=config.speculation == "mtp", keep_float8=True)
        check_degrees(model, degrees_of(config))
    except ConfigError:
        return False
    return model.quantization is not None and model.quantization.held == KEPT_BLOCK
