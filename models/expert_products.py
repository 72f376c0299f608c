"""The products of experts with rows that are sorted by slot, in each way that some device and dtype has.

In rank processes. All compute down(activation(gate(x)) * up(x)); they differ in what they wait for and what they cost.
Rows behind the last end belong to nobody, and what they become is of no use. They know no router and no rank.

    grouped     torch's grouped product: in bfloat16 on Hopper and Blackwell one kernel for all slots; on a CPU a loop
                inside torch, over all slots, for what is no wider than float32
    tiled       anywhere without waiting for the device: tiles of rows, each with a copy of its slot's weights
    one_by_one  slot by slot, as the formula says: the reference, which reads the ends on the host
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.float8 import Matrix

Activation = Callable[[Tensor], Tensor]

_GROUPED_MM_BYTES = 16  # strides must be multiples of it
_GROUPED_MM_MAJORS = (9, 10)  # of compute capabilities; others loop over slots, and wait for the ends
_TILE_ROWS = (16, 128)  # least and most: fewer rows cost as much, more are padding where slots have a few
_WEIGHT_BYTES = 1 << 28  # that are copied at once, if a tile needs no more


def can_group(rows: Tensor, down: Matrix) -> bool:
    """Whether torch's grouped product is for these: it waits for no device, and on a CPU most of its turns have rows.

    rows: [copies, hidden], down: [slots, hidden, neurons].
    """
    aligned = all(width * rows.element_size() % _GROUPED_MM_BYTES == 0 for width in down.shape[1:])
    if not rows.is_cuda:
        return aligned and rows.dtype in (torch.float32, torch.bfloat16, torch.float16) and len(rows) >= down.shape[0]
    major, _ = torch.cuda.get_device_capability(rows.device)
    return aligned and rows.dtype == torch.bfloat16 and major in _GROUPED_MM_MAJORS


def grouped(rows: Tensor, ends: Tensor, gate_up: Tensor, down: Tensor, activation: Activation) -> Tensor:
    """rows [copies, hidden], ends [slots] int32 -> [copies, hidden], where `can_group`."""
    gate, up = F.grouped_mm(rows, gate_up.mT, offs=ends).chunk(2, dim=-1)
    return F.grouped_mm(activation(gate) * up, down.mT, offs=ends)


def tiled(rows: Tensor, ends: Tensor, gate_up: Tensor, down: Tensor, activation: Activation) -> Tensor:
    """The same, by products of a batch of tiles.

    1. A slot's rows are cut into tiles, of which the last may be cut short: so many, at most, follow from shapes.
    2. Each tile finds its slot and its rows on the device. What is not a row of its slot's is computed for nothing,
       and put behind the outputs.
    3. Some tiles at a time, so that copies of their weights stay small.
    """
    copies, slots = len(rows), len(down)
    least, most = _TILE_ROWS
    height = min(most, max(least, 2 * copies // slots))
    tile = torch.arange((copies + min(copies, slots) * (height - 1)) // height, device=rows.device)
    starts = F.pad(ends[:-1], (1, 0))
    tile_ends = ((ends - starts + height - 1) // height).cumsum(0)
    slot = torch.searchsorted(tile_ends, tile, right=True).clamp_(max=slots - 1)
    # Tiles of a slot are numbered from the last of the slot before.
    before = F.pad(tile_ends[:-1], (1, 0))[slot]
    row = (starts[slot] + (tile - before) * height).unsqueeze(-1) + torch.arange(height, device=rows.device)
    own = row < ends[slot].unsqueeze(-1)  # [tiles, height]
    outputs = rows.new_empty(copies + 1, rows.shape[1])
    at_once = max(1, _WEIGHT_BYTES // (3 * down[0].numel() * down.element_size()))
    source, target = row.clamp(max=copies - 1), row.where(own, copies)
    for slot_of, taken, put in zip(slot.split(at_once), source.split(at_once), target.split(at_once), strict=True):
        gate, up = torch.bmm(rows[taken], gate_up[slot_of].mT).chunk(2, dim=-1)
        made = torch.bmm(activation(gate) * up, down[slot_of].mT)
        outputs.index_put_((put,), made)
    return outputs[:copies]


def one_by_one(rows: Tensor, ends: Tensor, gate_up: Tensor, down: Tensor, activation: Activation) -> Tensor:
    """The same, slot by slot."""
    outputs, start = torch.empty_like(rows), 0
    for slot, end in enumerate(ends.tolist()):
        if end > start:
            gate, up = F.linear(rows[start:end], gate_up[slot]).chunk(2, dim=-1)
            outputs[start:end] = F.linear(activation(gate) * up, down[slot])
        start = end
    return outputs
