"""The least kernel that there can be: where it is not compiled and launched, none is.

In rank processes, once for a device. What can be missing is a C compiler, which Triton builds its launchers with, or a
folder that it may write what it compiled to.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def launch(device: torch.device) -> None:
    """Waits for it. Raises whatever stands in the way."""
    answer = torch.zeros(1, dtype=torch.int32, device=device)
    _answer[(1,)](answer)
    assert int(answer) == 42, f"a kernel has written {int(answer)}, not 42"


@triton.jit
def _answer(output):
    tl.store(output, 42)
