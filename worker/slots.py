"""SlotState: by slot, what a step leaves for later ones.

In each rank's runner. On the device lies what kernels read, and the host never reads it back; the host notes what
shapes their work. Nothing is cleared when a slot is taken again: only positions that its new owner wrote are read.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from worker import slot_rules
from worker.plan import PlanTables, Records
from worker.sampler import Path, SamplingRows
from worker.slot_rules import SlotRules

_SAMPLING_COLUMNS = 5  # choice, seed, temperature and top_p as float64 bits, top_k
_SMALLEST_TEMPERATURE = float(np.finfo(np.float32).tiny)  # below it logits could overflow: greedy


class SlotState:
    """max_running slots of at most max_context tokens, which lie in blocks of block_tokens.

    history [slots, positions] int32: every id that is given, told or sampled. A decode row's own id stands here, and
    whatever looks back (penalties, bad words) is computed from it, hence right after any replay.
    """

    def __init__(self, max_running: int, max_context: int, block_tokens: int, device: torch.device) -> None:
        self.block_tokens = block_tokens
        self.history = torch.zeros(max_running, max_context, dtype=torch.int32, device=device)
        self.block_tables = torch.zeros(max_running, -(-max_context // block_tokens), dtype=torch.int64, device=device)
        self.sampling = torch.zeros(max_running, _SAMPLING_COLUMNS, dtype=torch.int64, device=device)
        self.paths = np.full(max_running, Path.GREEDY, dtype=np.int8)
        self.rules: dict[int, SlotRules] = {}

    @property
    def padding_slot(self) -> int:
        """The last slot, which is kept from requests where steps are padded."""
        return len(self.history) - 1

    def admit(self, tables: PlanTables) -> npt.NDArray[np.int64]:
        """Notes a plan's admits on the host, and returns what belongs into their rows of `sampling`."""
        admits = tables.admits
        slots = admits["slot"]
        assert len(np.unique(slots)) == len(slots), "a slot is admitted twice in one plan"
        if len(slots):
            self.paths[slots] = _paths(admits)
            for slot in slots.tolist():
                self.rules.pop(slot, None)
            self.rules |= slot_rules.admitted(admits, tables.rules)
        columns = np.empty((len(admits), _SAMPLING_COLUMNS), dtype=np.int64)
        columns[:, 0], columns[:, 1], columns[:, 4] = admits["choice"], admits["seed"], admits["top_k"]
        columns[:, 2:4].view(np.float64)[:] = np.stack([admits["temperature"], admits["top_p"]], axis=1)
        return columns

    def write(self, slots: Tensor, positions: Tensor, ids: Tensor) -> None:
        """Ids into the history, each argument [ids]. Where none was drawn any will do: nobody wants what follows."""
        self.history[slots, positions] = ids.clamp(min=0).to(torch.int32)

    def sampling_rows(self, slots: Tensor, positions: Tensor) -> SamplingRows:
        """The sampling of these slots, for the ids at these positions."""
        choice, seed, temperature, top_p, top_k = self.sampling[slots].unbind(dim=1)
        return SamplingRows(
            temperature=temperature.view(torch.float64),
            top_p=top_p.view(torch.float64),
            top_k=top_k,
            seed=seed,
            choice=choice,
            position=positions,
        )


def _paths(admits: Records) -> npt.NDArray[np.int8]:
    """Which path each admit asks for."""
    truncated = (admits["top_p"] < 1) | (admits["top_k"] > 0)
    drawn = np.where(truncated, Path.TRUNCATED, Path.PLAIN)
    return np.where(admits["temperature"] < _SMALLEST_TEMPERATURE, Path.GREEDY, drawn).astype(np.int8)
