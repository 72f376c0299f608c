"""A check that code which launches work on a device never waits for it.

On the CPU too: what would wait on CUDA is told by the operation, whatever the device is.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch.overrides import TorchFunctionMode
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

    def __enter__(self) -> Self:
        self._lists = _ForbidLists()
        self._lists.__enter__()  # type: ignore[no-untyped-call]
        return super().__enter__()  # type: ignore[no-any-return, no-untyped-call]

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)  # type: ignore[no-untyped-call]
        self._lists.__exit__(*raised)  # type: ignore[no-untyped-call]


class _ForbidLists(TorchFunctionMode):
    """A list is made without an operation that is dispatched, on a CPU."""

    def __torch_function__(
        self, func: Any, types: object, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        assert func is not torch.Tensor.tolist, "a list of a tensor's values waits for the device"
        return func(*args, **(kwargs or {}))
