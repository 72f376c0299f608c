"""ParallelContext: what a rank is, as a frozen value that layers receive instead of asking for a rank.

Made once per epoch by `mesh.form_context`, or by `solo_context` for one rank alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from parallel.comm import Channel, Group
from parallel.degrees import Degrees, Place
from parallel.side_stream import IN_TURN, SideStream

ALONE = Group()


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelContext:
    """The place of one rank in one epoch and what it shares with others, with the device and dtype it computes in.

    tensor: the ranks that split each matrix. data: ranks with the same part of it, and requests of their own.
    stage: both together, which exchange rows for their experts. replica: all ranks, over gloo, to agree on numbers in
    host memory. received, sent: hidden states from the stage before and to the one behind. returned: what was sampled,
    from the last stage to the first; None where a rank has no part in it. beside: for what a layer computes meanwhile.
    """

    epoch: int
    device: torch.device
    dtype: torch.dtype
    place: Place = field(default_factory=lambda: Degrees().place(0))
    tensor: Group = ALONE
    data: Group = ALONE
    stage: Group = ALONE
    replica: Group = ALONE
    received: Channel | None = None
    sent: Channel | None = None
    returned: Channel | None = None
    beside: SideStream = IN_TURN


def solo_context(device: torch.device, dtype: torch.dtype, epoch: int = 0) -> ParallelContext:
    """The context of a rank that shares nothing."""
    return ParallelContext(epoch=epoch, device=device, dtype=dtype, beside=SideStream.of(device))
