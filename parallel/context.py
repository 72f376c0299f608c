"""ParallelContext: what a rank is, as a frozen value that layers receive instead of asking for a rank.

Made once per epoch by `mesh.form_context`, or by `solo_context` for one rank alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from parallel.comm import Group


@dataclass(frozen=True, slots=True)
class ParallelContext:
    """The groups of one rank in one epoch, with the device and the dtype it computes in."""

    epoch: int
    tensor: Group
    device: torch.device
    dtype: torch.dtype


def solo_context(device: torch.device, dtype: torch.dtype, epoch: int = 0) -> ParallelContext:
    """The context of a rank that shares nothing."""
    return ParallelContext(epoch=epoch, tensor=Group(), device=device, dtype=dtype)
