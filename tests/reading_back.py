"""A check that code which launches work on a device never waits for it.

On the CPU too: what would wait on CUDA is told by the operation, whatever the device is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class ForbidReadingBack(TorchDispatchMode):
    """Raises where an operation has the host wait for the device: a value read, or a shape that depends on one."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: torch._ops.OpOverload, types: object, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        names = (
            "_local_scalar_dense",
            "nonzero",
            "masked_select",
            "unique",
            "equal",
            "is_nonzero",
            "repeat_interleave",
        )
        assert not any(name in func.name() for name in names), f"{func.name()} waits for the device"
        return func(*args, **(kwargs or {}))
