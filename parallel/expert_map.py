"""ExpertMap: which physical slots hold each expert of a layer, and how often the experts were chosen.

In rank processes, on the device, and changed in place: kernels that were captured with it read what it says now.
A slot is numbered expert rank * slots_per_rank + place on the rank. It knows no weights and no process group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.balance import ExpertPlacement


@dataclass(slots=True)
class ExpertMap:
    """placement: the same on the host.  replicas: [experts] int64, in how many slots an expert lies.
    slots: [experts, expert ranks] int64, which ones; the first `replicas` of them count.
    loads: [experts] int64, rows that chose the expert here so far; balanced: what they were at the last balance."""

    placement: ExpertPlacement
    replicas: Tensor
    slots: Tensor
    loads: Tensor
    balanced: Tensor

    @classmethod
    def of(cls, placement: ExpertPlacement, experts: int, device: torch.device) -> ExpertMap:
        replicas, loads, balanced = torch.zeros(3, experts, dtype=torch.int64, device=device)
        slots = torch.zeros(experts, len(placement.slots), dtype=torch.int64, device=device)
        made = cls(placement, replicas, slots, loads, balanced)
        made.change(placement)
        return made

    @property
    def slots_per_rank(self) -> int:
        return len(self.placement.slots[0])

    def change(self, placement: ExpertPlacement) -> None:
        """From now on experts lie so; what is queued on the stream before still finds them where they were."""
        experts, width = self.slots.shape
        physical = placement.physical(experts)
        assert all(physical), f"{placement} leaves out experts"
        padded = [[*slots, *[slots[0]] * (width - len(slots))] for slots in physical]
        self.replicas.copy_(torch.tensor([len(slots) for slots in physical]))
        self.slots.copy_(torch.tensor(padded))
        self.placement = placement

    def slots_of(self, expert_ids: Tensor, padding: Tensor | None = None, counts: bool = True) -> Tensor:
        """[m, k] experts -> [m, k] slots; rows take the replicas of an expert in turn. They are counted, unless another
        rank counts the same rows. Rows that are padding [m] bool are not counted and get slot -1."""
        turn = torch.arange(expert_ids.shape[0], device=expert_ids.device).unsqueeze(-1)
        slots = self.slots[expert_ids, turn % self.replicas[expert_ids]]
        if padding is not None:
            slots.masked_fill_(padding.unsqueeze(-1), -1)
        if counts:
            self.loads.scatter_add_(0, expert_ids.flatten(), (slots >= 0).long().flatten())
        return slots
