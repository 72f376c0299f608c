"""What a spare does before it is told which rank it is: everything that takes long and is the same for all.

In a rank process that waits in a slot, in a thread of its own: imports, the device's context, and the libraries that a
first step would load. Knows no model and no epoch.
"""

from __future__ import annotations

import torch

import worker.rank  # noqa: F401 - all that a rank imports


def warm(device: str) -> None:
    """device: cpu, or cuda, of which Ray shows this process one."""
    torch.set_num_threads(1)  # a pool of threads made here would stay as nice as this one
    with torch.no_grad():
        square = torch.ones(64, 64, device=device, dtype=torch.float32 if device == "cpu" else torch.bfloat16)
        _ = (square @ square).softmax(-1).sort(-1).values.cumsum(-1).cpu()
