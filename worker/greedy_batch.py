"""The batch of a step that a graph computes to its end: decode rows that are all greedy, which is most of them.

In each rank's runner, on the last stage. What `worker/batch.py` makes of any plan, here made of two columns of one: at
a few rows a step the host would else take longer than the device.
"""

from __future__ import annotations

import numpy as np
import torch

from worker.batch import DecodeRows, StepBatch
from worker.plan import NO_LOGPROBS, PlanTables
from worker.slot_rules import ruled_rows
from worker.slots import SlotState
from worker.upload import staged, upload_one


def greedy_batch(tables: PlanTables, state: SlotState, graph_rows: int) -> StepBatch | None:
    """As `apply_and_build`, of a plan whose rows a graph of so many rows computes, if it begins nothing and all ids are
    greedy ones; else None. Its tensors stay on the host, where the graph takes its inputs from."""
    rows = tables.rows
    if not graph_rows or len(tables.admits) or len(tables.told):
        return None
    slots, drawn_at = rows[:, 0].astype(np.int64), rows[:, 1].astype(np.int64) + 1
    if state.paths[slots].any() or (rows[:, 4] != NO_LOGPROBS).any() or ruled_rows(state.rules, slots, drawn_at):
        return None
    inputs = np.zeros((2, graph_rows), dtype=np.int64)
    inputs[0] = state.padding_slot
    inputs[:, : len(rows)] = slots, drawn_at - 1
    if len(tables.blocks):
        slot, index, block = upload_one(tables.blocks.T.astype(np.int64), state.history.device)
        state.block_tables[slot, index] = block
    device = state.history.device
    on_host = torch.from_numpy(slots)
    return StepBatch(
        forward=DecodeRows(len(rows), staged(inputs, device)),
        token_slots=on_host,
        slots=on_host,
        positions=torch.from_numpy(drawn_at),
        sampled_slots=slots,
        greedy=True,
        logprobs=(None,) * len(rows),
        lanes=tables.lanes,
    )
