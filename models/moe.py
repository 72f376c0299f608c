"""The mixture of experts that stands in place of a layer's MLP: the experts, and what joins them with their router.

In rank processes. Experts compute the rows that a dispatcher brings to the slots this rank holds: on CUDA a kernel
those of decode steps, and else what `models/expert_products.py` has. It knows no batch, no checkpoint's names, no rank,
and not how experts are chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from models.expert_products import can_group, grouped, one_by_one, tiled
from models.router import Router
from parallel import kernels
from parallel.expert import Copies, Dispatcher, ExpertStep
from parallel.side_stream import IN_TURN, SideStream

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
        if self._are_fused(rows):
            from models.kernels.many_rows import experts_of_many_rows

            return experts_of_many_rows(rows, self.gate_up, self.down, copies)
        return copies.sums(self.outputs(copies.taken(rows), copies.ends))

    def try_kernels(self, rows: Tensor, copies: Copies) -> None:
        """Compiles what later rows may need, however many they are: nobody's step is to wait for it."""
        if self._are_few(rows, copies):
            from models.kernels.few_rows import try_row_tiles

            try_row_tiles(rows, self.gate_up, self.down, copies)
        if self._are_fused(rows):
            from models.kernels.many_rows import try_steps

            try_steps(rows, self.gate_up, copies)

    def outputs(self, rows: Tensor, ends: Tensor) -> Tensor:
        """rows [copies, hidden] sorted by slot, ends [slots] int32 behind each slot's last -> outputs [copies, hidden];
        of no use behind the last end. Waits for no device."""
        if not len(rows):
            return torch.empty_like(rows)
        elsewhere = tiled if rows.is_cuda else one_by_one
        product = grouped if can_group(rows, self.down) else elsewhere
        return product(rows, ends, self.gate_up, self.down, self.activation)

    def _are_few(self, rows: Tensor, copies: Copies) -> bool:
        """Whether the kernel for few rows takes these: more, too, where torch has no grouped product for them."""
        few = len(copies.order) <= _FEW_COPIES_PER_SLOT * len(self.down) or not can_group(rows, self.down)
        return few and self._are_fused(rows)

    def _are_fused(self, rows: Tensor) -> bool:
        """Whether there are kernels for what stands between the products."""
        return self.activation is F.silu and rows.dtype in kernels.DTYPES and kernels.can_run(rows.device)


@dataclass(frozen=True, slots=True)
class MixtureOfExperts:
    """Each row's sum over its chosen experts, weighted by its shares of them, and of the MLP that all rows pass.

    shared: without collectives; where no row travels, this rank's part of it, and else all of it. It begins first, and
    runs beside all that is for experts alone.
    """

    router: Router
    experts: Experts
    dispatcher: Dispatcher
    shared: Callable[[Tensor, ExpertStep], Tensor] | None = None
    side: SideStream = IN_TURN

    def __call__(self, hidden: Tensor, step: ExpertStep) -> Tensor:
        """hidden [T, hidden], equal on all tensor ranks -> the same shape, equal again."""
        rows = self.dispatcher.share(hidden, step)
        beside = self.side.begin(partial(self.shared, rows, step)) if self.shared is not None else None
        expert_ids, shares = self.router(rows)
        dispatched = self.dispatcher.dispatch(rows, expert_ids, shares, step)
        sums = self.experts(dispatched.rows, dispatched.copies)
        return self.dispatcher.restore(dispatched.combine(sums, beside), hidden.shape[0], step)

    def try_kernels(self) -> None:
        """Those of its experts and of what sorts rows for them, on a row of zeros that goes nowhere."""
        slots, width, _ = self.experts.down.shape
        row = self.experts.down.new_zeros(1, width)
        ids, shares = self.router(row)
        self.experts.try_kernels(row, Copies.of_own(ids, shares, slots, None))
        if kernels.can_run(row.device):
            from parallel.kernels.by_slot import try_parts

            try_parts(slots, row.device)
