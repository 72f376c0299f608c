"""The mixture of experts that stands in place of a layer's MLP: the experts, and what joins them with their router.

In rank processes. Experts compute the rows that a dispatcher brings to the slots this rank holds: a kernel those of
decode steps on CUDA, torch's grouped product others. It knows no batch, no
checkpoint's names, no rank, and not how experts are chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.router import Router
from parallel import kernels
from parallel.expert import Copies, Dispatcher, ExpertStep

_GROUPED_MM_BYTES = 16  # strides must be multiples of it
_FEW_COPIES_PER_SLOT = 32  # on average; beyond, arithmetic takes longer than reading weights


@dataclass(frozen=True, slots=True)
class Experts:
    """down(activation(gate(x)) * up(x)) by slot. gate_up: [slots, 2 * neurons held, hidden], gate rows first;
    down: [slots, hidden, neurons held]."""

    gate_up: Tensor
    down: Tensor
    activation: Callable[[Tensor], Tensor]

    def __call__(self, rows: Tensor, copies: Copies) -> Tensor:
        """rows [r, hidden] -> [r, hidden], the sum of each row's outputs, weighted, of the slots that want it."""
        if self._are_few(rows, copies):
            from models.kernels.few_rows import experts_of_few_rows

            return experts_of_few_rows(rows, self.gate_up, self.down, copies)
        return copies.sums(self.outputs(copies.taken(rows), copies.ends))

    def outputs(self, rows: Tensor, ends: Tensor) -> Tensor:
        """rows [copies, hidden] sorted by slot, ends [slots] int32 behind each slot's last -> outputs [copies, hidden];
        of no use behind the last end."""
        outputs = torch.empty_like(rows)
        if rows.shape[0] and self._groups(rows):
            gate, up = F.grouped_mm(rows, self.gate_up.mT, offs=ends).chunk(2, dim=-1)
            return F.grouped_mm(self.activation(gate) * up, self.down.mT, offs=ends)
        start = 0
        for slot, end in enumerate(ends.tolist()):
            if end > start:
                gate, up = F.linear(rows[start:end], self.gate_up[slot]).chunk(2, dim=-1)
                outputs[start:end] = F.linear(self.activation(gate) * up, self.down[slot])
            start = end
        return outputs

    def _are_few(self, rows: Tensor, copies: Copies) -> bool:
        """Whether the kernel for few rows takes these."""
        few = len(copies.order) <= _FEW_COPIES_PER_SLOT * len(self.down)
        fits = self.activation is F.silu and rows.dtype in kernels.DTYPES
        return few and fits and kernels.can_run(rows.device)

    def _groups(self, rows: Tensor) -> bool:
        """Whether torch's grouped product takes these; it never waits for the device, as the loop does."""
        widths = (self.down.shape[1], self.down.shape[2])
        aligned = all(width * rows.element_size() % _GROUPED_MM_BYTES == 0 for width in widths)
        return rows.is_cuda and rows.dtype == torch.bfloat16 and aligned


@dataclass(frozen=True, slots=True)
class MixtureOfExperts:
    """Each row's sum over its chosen experts, weighted by its shares of them, and of the MLP that all rows pass.

    shared: without collectives; where no row travels, this rank's part of it, and else all of it.
    """

    router: Router
    experts: Experts
    dispatcher: Dispatcher
    shared: Callable[[Tensor, ExpertStep], Tensor] | None = None

    def __call__(self, hidden: Tensor, step: ExpertStep) -> Tensor:
        """hidden [T, hidden], equal on all tensor ranks -> the same shape, equal again."""
        rows = self.dispatcher.share(hidden)
        expert_ids, shares = self.router(rows)
        dispatched = self.dispatcher.dispatch(rows, expert_ids, shares, step)
        sums = self.experts(dispatched.rows, dispatched.copies)
        beside = None if self.shared is None else self.shared(rows, step)
        return self.dispatcher.restore(dispatched.combine(sums, beside), hidden.shape[0])
