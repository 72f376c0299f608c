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
from parallel.expert import PREFILL, Copies, Dispatcher, ExpertStep
from parallel.float8 import SOME_ROWS, Float8, Matrix, meant, stored
from parallel.linear import LEAST_ROWS
from parallel.side_stream import IN_TURN, SideStream

# On average: beyond, arithmetic takes longer than reading weights; or for 8 bit floats than that and dequantising them.
_FEW_COPIES_PER_SLOT, _FEW_COPIES_PER_FLOAT8_SLOT = 64, 256

BESIDE_ROWS = 16  # more rows, where none travels, leave a device no room beside their experts, as measured


@dataclass(frozen=True, slots=True)
class Experts:
    """down(activation(gate(x)) * up(x)) by slot. gate_up: [slots, 2 * neurons held, hidden], gate rows first;
    down: [slots, hidden, neurons held]."""

    gate_up: Matrix
    down: Matrix
    activation: Callable[[Tensor], Tensor]

    def __call__(self, rows: Tensor, copies: Copies) -> Tensor:
        """rows [r, hidden] -> [r, hidden], the sum of each row's outputs, weighted, of the slots that want it."""
        if self._are_few(rows, copies):
            return self._of_few_rows(rows, copies)
        if self._are_fused(rows) and can_group(rows, self.down):
            from models.kernels.many_rows import experts_of_many_rows

            gate_up, down = meant(self.gate_up, rows.dtype), meant(self.down, rows.dtype)
            return experts_of_many_rows(rows, gate_up, down, copies)
        return copies.sums(self.outputs(copies.taken(rows), copies.ends))

    def try_kernels(self, rows: Tensor, copies: Copies) -> None:
        """Compiles what later rows may need, however many they are: nobody's step is to wait for it."""
        if self._are_few(rows, copies):
            from models.kernels import few_rows, float8

            match self.gate_up, self.down:
                case Float8() as gate_up, Float8() as down:
                    float8.try_row_tiles(rows, gate_up, down, copies)
                case Tensor() as gate_up, Tensor() as down:
                    few_rows.try_row_tiles(rows, gate_up, down, copies)
        if self._are_fused(rows):
            from models.kernels.many_rows import try_steps

            try_steps(rows, self.gate_up.shape[1], copies)

    def outputs(self, rows: Tensor, ends: Tensor) -> Tensor:
        """rows [copies, hidden] sorted by slot, ends [slots] int32 behind each slot's last -> outputs [copies, hidden];
        of no use behind the last end. Waits for no device."""
        if not len(rows):
            return torch.empty_like(rows)
        elsewhere = tiled if rows.is_cuda else one_by_one
        product = grouped if can_group(rows, self.down) else elsewhere
        return product(rows, ends, meant(self.gate_up, rows.dtype), meant(self.down, rows.dtype), self.activation)

    def parts(self) -> tuple[Tensor, ...]:
        """All that an expert is made of, each [slots, ...], to be moved with it."""
        return tuple(part for matrix in (self.gate_up, self.down) for part in stored(matrix))

    def _of_few_rows(self, rows: Tensor, copies: Copies) -> Tensor:
        from models.kernels import few_rows, float8

        if isinstance(self.gate_up, Float8) and isinstance(self.down, Float8):
            return float8.experts_of_few_rows(rows, self.gate_up, self.down, copies)
        gate_up, down = meant(self.gate_up, rows.dtype), meant(self.down, rows.dtype)
        return few_rows.experts_of_few_rows(rows, gate_up, down, copies)

    def _are_few(self, rows: Tensor, copies: Copies) -> bool:
        """Whether a kernel for few rows takes these: more, too, where torch has no grouped product for them."""
        kept = isinstance(self.down, Float8)
        most = (_FEW_COPIES_PER_FLOAT8_SLOT if kept else _FEW_COPIES_PER_SLOT) * self.down.shape[0]
        few = len(copies.order) <= most or not can_group(rows, self.down)
        known = not isinstance(self.down, Float8) or self.down.has_kernels(rows.dtype)
        return few and known and self._are_fused(rows)

    def _are_fused(self, rows: Tensor) -> bool:
        """Whether there are kernels for what stands between the products."""
        return self.activation is F.silu and rows.dtype in kernels.DTYPES and kernels.can_run(rows.device)


@dataclass(frozen=True, slots=True)
class MixtureOfExperts:
    """Each row's sum over its chosen experts, weighted by its shares of them, and of the MLP that all rows pass.

    shared: without collectives; where no row travels, this rank's part of it, and else all of it. It begins first, and
    runs on the side stream beside all that is for experts alone, if there are no more rows than beside_rows.
    """

    router: Router
    experts: Experts
    dispatcher: Dispatcher
    shared: Callable[[Tensor, ExpertStep], Tensor] | None = None
    side: SideStream = IN_TURN
    beside_rows: int | None = None

    def __call__(self, hidden: Tensor, step: ExpertStep) -> Tensor:
        """hidden [T, hidden], equal on all tensor ranks -> the same shape, equal again."""
        rows = self.dispatcher.share(hidden, step)
        side = self.side if self.beside_rows is None or len(rows) <= self.beside_rows else IN_TURN
        beside = side.begin(partial(self.shared, rows, step)) if self.shared is not None else None
        expert_ids, shares = self.router(rows)
        dispatched = self.dispatcher.dispatch(rows, expert_ids, shares, step)
        sums = self.experts(dispatched.rows, dispatched.copies)
        return self.dispatcher.restore(dispatched.combine(sums, beside), hidden.shape[0], step)

    def try_kernels(self, row: Tensor) -> None:
        """All of them; where rows travel, ranks have a part of a step's, of a number that no step tried may have.

        row: [1, hidden], goes nowhere.
        """
        for rows in (*LEAST_ROWS, SOME_ROWS):
            if self.shared is not None:
                self.shared(row.repeat(rows, 1), PREFILL)
        slots = self.experts.down.shape[0]
        ids, shares = self.router(row)
        self.experts.try_kernels(row, Copies.of_own(ids, shares, slots, None))
        if kernels.can_run(row.device):
            from models.kernels.routing import FEW_ROWS
            from parallel.kernels.by_slot import try_parts

            self.router(row.repeat(FEW_ROWS + 1, 1))
            try_parts(slots, row.device)
