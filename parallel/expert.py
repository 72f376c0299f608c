"""Expert parallelism: rows go to the ranks that hold the experts they are routed to, and weighted sums come back.

In rank processes. A stage's data * tensor ranks hold its experts in physical slots; `expert_tensor` neighbours split
each expert. No row is ever dropped. A dispatcher knows groups and slots, no weights of experts and no layer.
Shapes: m rows here of h numbers, k choices each; r rows of the stage that this rank gets; P expert ranks of `slots`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel import kernels
from parallel.comm import Group
from parallel.expert_map import ExpertMap
from parallel.travel import returned_sums, travelling


@dataclass(frozen=True, slots=True)
class ExpertStep:
    """How the rows of a step travel, the same on every rank of a stage.

    decode: in a fixed shape, which the host knows before and a CUDA graph can hold. rows_per_rank: by data rank, the
    rows it has in this step, padding included; needed for decode alone. padding [T] bool: the rows here that only fill
    a graph, which want no expert and are not counted; None where there are none.
    """

    decode: bool = False
    rows_per_rank: tuple[int, ...] = ()
    padding: Tensor | None = field(default=None, compare=False)


PREFILL = ExpertStep()

Beside = Callable[[], Tensor]  # takes what was begun before


@dataclass(frozen=True, slots=True)
class Dispatched:
    """What the experts of this rank must compute.

    rows: [r, h], those that it got; copies: which of its slots want each, and with what weight.
    combine: their weighted sums over the slots here, [r, h] -> [m, h], the sums of the rows that were dispatched, and
    what stands beside them, [m, h], if anything: all of it, but where partial sums are added this rank's part. That is
    taken when it is added. The sums that it is given may be written.
    """

    rows: Tensor
    copies: Copies
    combine: Callable[[Tensor, Beside | None], Tensor]


class Dispatcher(Protocol):
    """Brings rows to experts. Between share and restore, a rank minds m rows of the T that its data rank has."""

    def share(self, hidden: Tensor, step: ExpertStep) -> Tensor:
        """[T, h], equal on all tensor ranks -> the [m, h] of them that this rank dispatches."""

    def dispatch(self, rows: Tensor, expert_ids: Tensor, weights: Tensor, step: ExpertStep) -> Dispatched:
        """rows [m, h], to be summed over their choices: expert_ids [m, k] int64 times weights [m, k] float32."""

    def restore(self, rows: Tensor, total: int, step: ExpertStep) -> Tensor:
        """The opposite of share: [m, h] -> [T, h], T = total."""


@dataclass(slots=True)
class Traffic:
    """What a rank has sent to other ranks and got from them, counted on the host as steps are launched; what a CUDA
    graph does again is not."""

    dispatches: int = 0
    rows_sent: int = 0
    rows_received: int = 0

    def add(self, sent: int, received: int) -> None:
        self.dispatches += 1
        self.rows_sent += sent
        self.rows_received += received


@dataclass(frozen=True, slots=True)
class SplitExperts:
    """Every rank of the group holds its slice of every expert: no row travels, and partial sums are added.

    1. Each rank computes its slice of every chosen expert for all rows, which all ranks have.
    2. One all-reduce adds the slices.

    counted: [experts] int64, rows that chose the expert or one before it so far; not counted if None. It grows by what
    is known anyway, in one launch.
    """

    group: Group
    experts: int
    counted: Tensor | None = None

    def share(self, hidden: Tensor, step: ExpertStep) -> Tensor:
        return hidden

    def dispatch(self, rows: Tensor, expert_ids: Tensor, weights: Tensor, step: ExpertStep) -> Dispatched:
        if step.padding is not None:
            expert_ids = expert_ids.masked_fill(step.padding.unsqueeze(-1), self.experts)
        copies = Copies.of(expert_ids, weights, self.experts, surplus=step.padding is not None)
        if self.counted is not None:
            self.counted.add_(copies.ends)

        def combine(sums: Tensor, beside: Beside | None) -> Tensor:
            return self.group.all_reduce(_added(sums, beside))

        return Dispatched(rows, copies, combine)

    def restore(self, rows: Tensor, total: int, step: ExpertStep) -> Tensor:
        return rows


@dataclass(frozen=True, slots=True)
class ExchangedExperts:
    """Rows travel over the stage. Each tensor rank dispatches its own share of the rows of its data rank.

    expert_tensor: neighbours in the stage that split each expert; each of them gets the row, and their partial sums
    are added like those of different experts. Where one data rank decodes no row travels: all ranks have all of them.
    """

    stage: Group
    tensor: Group
    expert_tensor: int
    map: ExpertMap
    traffic: Traffic = field(default_factory=Traffic)

    def _everywhere(self, step: ExpertStep) -> bool:
        """Whether each rank dispatches all rows of the step, to its own slots."""
        return step.decode and self.stage.size == self.tensor.size

    def share(self, hidden: Tensor, step: ExpertStep) -> Tensor:
        if self._everywhere(step):
            return hidden
        rows = -(-hidden.shape[0] // self.tensor.size)
        return hidden[self.tensor.rank * rows : (self.tensor.rank + 1) * rows]

    def restore(self, rows: Tensor, total: int, step: ExpertStep) -> Tensor:
        if self._everywhere(step):
            return rows
        return self.tensor.all_gather(_pad_rows(rows, -(-total // self.tensor.size)))[:total]

    def dispatch(self, rows: Tensor, expert_ids: Tensor, weights: Tensor, step: ExpertStep) -> Dispatched:
        padding = None if step.padding is None else self.share(step.padding, step)
        if self._everywhere(step):
            counts = self.stage.rank == 0  # all ranks choose alike
            return self._add(rows, self.map.slots_of(expert_ids, padding, counts), weights)
        slots = self.map.slots_of(expert_ids, padding)
        if step.decode:
            return self._gather(rows, slots, weights, -(-max(step.rows_per_rank) // self.tensor.size))
        return self._send(rows, slots, weights)

    def _add(self, rows: Tensor, slots: Tensor, weights: Tensor) -> Dispatched:
        """Fixed shape, for rows that all ranks have: one all-reduce adds what each computes for its own slots. What
        stands beside them is whole on every rank, so it is added behind."""
        self.traffic.add(0, 0)

        def combine(sums: Tensor, beside: Beside | None) -> Tensor:
            return _added(self.stage.all_reduce(sums), beside)

        return Dispatched(rows, self._copies(slots, weights, None), combine)

    def _send(self, rows: Tensor, slots: Tensor, weights: Tensor) -> Dispatched:
        """Variable sizes, for prefill: every row goes once to each rank that holds a slot it wants.

        1. asked [ranks, m]: whether a row wants a slot of a rank.
        2. Counts of rows and of copies, [ranks, 2], go to every rank, then to the host, which waits for them.
        3. Rows [r, h] and their routing (slots and weights, [r, 2k] int32) go where they are asked.
        4. Each rank copies rows for its own slots, sorted by slot.
        5. combine: the weighted sum of a row's copies, [r, h], goes back the way the row came, and is added there to
           what other ranks return for the row, in the order of ranks.
        """
        owners = slots // self.map.slots_per_rank
        ranks = torch.arange(self.stage.size, device=slots.device)[:, None, None] // self.expert_tensor
        wanted = owners == ranks  # [ranks, m, k]
        asked = wanted.any(-1)
        going, places = travelling(asked)
        counts = torch.stack((asked.sum(-1), wanted.sum((-1, -2))), dim=-1)
        sent, received, copied = torch.cat((counts[:, :1], self.stage.all_to_all(counts)), dim=-1).t().tolist()
        tokens = going[: sum(sent)]
        got = self.stage.all_to_all_rows(rows[tokens], sent, received)
        routing = self.stage.all_to_all_rows(_packed(slots, weights)[tokens], sent, received)
        others = [rank for rank in range(self.stage.size) if rank != self.stage.rank]
        self.traffic.add(sum(sent[rank] for rank in others), sum(received[rank] for rank in others))
        copies = self._copies(*_unpacked(routing), sum(copied))

        def combine(sums: Tensor, beside: Beside | None) -> Tensor:
            back = self.stage.all_to_all_rows(sums, received, sent)
            return _added(returned_sums(back, tokens, sent, places), beside)

        return Dispatched(got, copies, combine)

    def _gather(self, rows: Tensor, slots: Tensor, weights: Tensor, padded: int) -> Dispatched:
        """Fixed shape, for decode: every row goes to every rank, which computes what its slots are asked.

        1. Rows are padded to `padded` on every rank, the padding wanting no slot.
        2. One all-gather of rows and, behind each, its routing (slots and weights): [ranks * padded, .. + 2k] int32.
        3. Each rank copies rows for its own slots, sorted by slot; the shape allows for every choice of every row.
        4. combine: reduce-scatter adds the ranks' weighted sums, and each rank gets those of its own rows.
        """
        words = _pad_rows(rows, padded).view(torch.int32)
        routing = _packed(_pad_rows(slots, padded, -1), _pad_rows(weights, padded))
        together = self.stage.all_gather(torch.cat((words, routing), dim=-1))
        words, routing = together.split((words.shape[-1], routing.shape[-1]), dim=-1)
        got, copies = words.contiguous().view(rows.dtype), self._copies(*_unpacked(routing), None)
        elsewhere = padded * (self.stage.size - 1)
        self.traffic.add(elsewhere, elsewhere)

        def combine(sums: Tensor, beside: Beside | None) -> Tensor:
            return _added(self.stage.reduce_scatter(sums)[: rows.shape[0]], beside)

        return Dispatched(got, copies, combine)

    def _copies(self, slots: Tensor, weights: Tensor, total: int | None) -> Copies:
        first_slot = self.stage.rank // self.expert_tensor * self.map.slots_per_rank
        return Copies.of_own(slots - first_slot, weights, self.map.slots_per_rank, total)


@dataclass(frozen=True, slots=True)
class Copies:
    """Which rows are copied for which slot: a copy for each slot that a row is wanted in, sorted by slot.

    weights [r, k] float32: of choices. order [copies] int64: the choices, row * k + choice, that copies serve.
    ends [slots] int32: behind the last copy of each slot. surplus: order goes on behind the last end, with choices that
    are computed elsewhere.
    """

    weights: Tensor
    order: Tensor
    ends: Tensor
    surplus: bool

    @classmethod
    def of(cls, slots: Tensor, weights: Tensor, held: int, *, surplus: bool = False) -> Copies:
        """slots [r, k]: 0 to held - 1, and with surplus `held`, where a choice is not to be computed."""
        return cls(weights, *_by_slot(slots, held), surplus)

    @classmethod
    def of_own(cls, slots: Tensor, weights: Tensor, held: int, total: int | None) -> Copies:
        """slots [r, k]: numbered so that 0 to held - 1 are this rank's. total: how many choices those are, if the host
        knows it; else the shape allows for all."""
        order, ends = _by_slot(slots.masked_fill((slots < 0) | (slots >= held), held), held)
        return cls(weights, order if total is None else order[:total], ends, surplus=total is None)

    def taken(self, rows: Tensor) -> Tensor:
        """rows [r, h] -> [copies, h]; of no use behind the last end."""
        return rows[self.order // self.weights.shape[1]]

    def sums(self, outputs: Tensor) -> Tensor:
        """outputs [copies, h], overwritten -> the weighted sum of each row's, [r, h]; each product is rounded to the
        dtype, as in transformers, and the sum once."""
        outputs.mul_(self.weights.flatten()[self.order].unsqueeze(-1))
        if self.surplus:
            behind = torch.arange(len(outputs), device=outputs.device).unsqueeze(-1) >= self.ends[-1]
            outputs.masked_fill_(behind, 0)
        spread = self.spread(outputs.dtype, outputs.shape[-1])
        spread.flatten(0, 1).index_copy_(0, self.order, outputs)
        return spread.sum(1)

    def spread(self, dtype: torch.dtype, width: int) -> Tensor:
        """[r, k, width], where each choice's output goes: zeros where one is computed elsewhere."""
        whole = not self.surplus and len(self.order) == self.weights.numel()
        make = torch.empty if whole else torch.zeros
        return make((*self.weights.shape, width), dtype=dtype, device=self.weights.device)


def _by_slot(slots: Tensor, held: int) -> tuple[Tensor, Tensor]:
    """The choices sorted by slot, and where each of the held slots ends among them."""
    if kernels.can_run(slots.device):
        from parallel.kernels.by_slot import by_slot

        return by_slot(slots, held)
    found, order = slots.flatten().sort(stable=True)
    return order, torch.searchsorted(found, torch.arange(held, device=slots.device), right=True, out_int32=True)


def _packed(slots: Tensor, weights: Tensor) -> Tensor:
    """[m, k] slots and [m, k] float32 weights -> [m, 2k] int32."""
    return torch.cat((slots.int(), weights.view(torch.int32)), dim=-1)


def _unpacked(routing: Tensor) -> tuple[Tensor, Tensor]:
    slots, weights = routing.chunk(2, dim=-1)
    return slots.long(), weights.contiguous().view(torch.float32)


def _added(total: Tensor, beside: Beside | None) -> Tensor:
    return total if beside is None else total.add_(beside())


def _pad_rows(tensor: Tensor, rows: int, value: int = 0) -> Tensor:
    return F.pad(tensor, (0, 0, 0, rows - len(tensor)), value=value) if rows > len(tensor) else tensor
