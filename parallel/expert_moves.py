"""Moves experts between the ranks of a stage: the weights first, then the map by which rows find them.

In rank processes, between two steps, called by every rank of the stage with the same placement; what each must send
follows from the placements alone, so nothing is asked. It knows no model: an expert is what lies in a slot's place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from parallel.balance import ExpertPlacement, transfers
from parallel.comm import Group
from parallel.expert_map import ExpertMap


def move_experts(
    weights: Sequence[Tensor], expert_map: ExpertMap, placement: ExpertPlacement, stage: Group, expert_tensor: int
) -> int:
    """weights: tensors [slots of this rank, ...], overwritten in place. Returns how many slots came from other ranks.

    1. Each moved slot gets its source: its own rank, or one of the ranks with the expert, those with least to send.
    2. Ranks that hold the same part of their experts exchange slots, all tensors one after the other: memory for the
       slots a rank sends and gets is needed, of one tensor at a time.
    3. The map is changed in place, after the weights on the same stream.
    """
    moves = transfers(expert_map.placement, placement)
    held = expert_map.slots_per_rank
    own, part = divmod(stage.rank, expert_tensor)
    sources = [(target // held, source % held) for source, target in moves if source // held == own]
    targets = [(source // held, target % held) for source, target in moves if target // held == own]
    sources.sort(key=lambda move: move[0])  # by rank, and otherwise as in moves, here as there
    targets.sort(key=lambda move: move[0])
    sent, received = [0] * stage.size, [0] * stage.size
    for rank, _ in sources:
        sent[rank * expert_tensor + part] += 1
    for rank, _ in targets:
        received[rank * expert_tensor + part] += 1
    for tensor in weights:
        assert tensor.shape[0] == held, f"{tuple(tensor.shape)} for {held} slots"
        leaving = tensor[torch.tensor([place for _, place in sources], dtype=torch.int64, device=tensor.device)]
        arrived = stage.all_to_all_rows(leaving, sent, received)
        tensor[torch.tensor([place for _, place in targets], dtype=torch.int64, device=tensor.device)] = arrived
    expert_map.change(placement)
    return sum(rank != own for rank, _ in targets)
