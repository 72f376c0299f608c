"""Rows that travel to experts: each rank gets those it is asked for, once, and each row gets its weighted sum back."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from parallel.balance import ExpertPlacement
from parallel.comm import Group
from parallel.context import ParallelContext
from parallel.degrees import Degrees
from parallel.expert import PREFILL, ExchangedExperts, ExpertStep
from parallel.expert_map import ExpertMap
from parallel.expert_moves import move_experts
from tests.ranks import as_ranks
from tests.reading_back import ForbidReadingBack

EXPERTS, WIDTH, CHOSEN = 4, 3, 2
PLAIN = {
    1: ExpertPlacement(((0, 1, 2, 3),)),
    2: ExpertPlacement(((0, 1), (2, 3))),
    4: ExpertPlacement(((0,), (1,), (2,), (3,))),
}
REPLICATED = {
    1: PLAIN[1],
    2: ExpertPlacement(((3, 1, 0), (2, 3, 0))),
    4: ExpertPlacement(((0, 3), (1, 3), (2, 3), (3, 0))),
}
DEGREES = [
    *(Degrees(data=2, expert=expert) for expert in (1, 2)),
    *(Degrees(data=2, tensor=2, expert=expert) for expert in (1, 2, 4)),
    *(Degrees(tensor=4, expert=expert) for expert in (2, 4)),
]


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one data rank, with what was chosen for them."""

    rows: Tensor
    expert_ids: Tensor
    weights: Tensor

    @classmethod
    def random(cls, seed: int, count: int) -> Rows:
        generator = torch.Generator().manual_seed(seed)
        shuffled = torch.rand(count, EXPERTS, generator=generator).argsort(-1)
        weights = torch.rand(count, CHOSEN, generator=generator)
        return cls(torch.randn(count, WIDTH, generator=generator).double(), shuffled[:, :CHOSEN], weights)

    def sums(self) -> Tensor:
        """What all must get: expert e multiplies a row by 10^e."""
        return self.rows * (self.weights * 10.0**self.expert_ids).sum(-1, keepdim=True)


def exchange(context: ParallelContext, placement: ExpertPlacement) -> ExchangedExperts:
    expert_map = ExpertMap.of(placement, EXPERTS, context.device)
    return ExchangedExperts(context.stage, context.tensor, context.place.degrees.expert_tensor, expert_map)


def outputs(context: ParallelContext, placement: ExpertPlacement, rows: Tensor, ends: Tensor) -> Tensor:
    """This rank's part of what its slots' experts make: an equal part for each of the ranks that split them."""
    found, start = torch.zeros_like(rows), 0
    for expert, end in zip(placement.slots[context.place.expert_rank], ends.tolist(), strict=True):
        found[start:end] = rows[start:end] * 10.0**expert / context.place.degrees.expert_tensor
        start = end
    return found


@pytest.mark.parametrize("placements", [PLAIN, REPLICATED], ids=["plain", "replicated"])
@pytest.mark.parametrize("decode", [False, True], ids=["prefill", "decode"])
@pytest.mark.parametrize("degrees", DEGREES, ids=lambda d: f"data{d.data}-tensor{d.tensor}-expert{d.expert}")
def test_every_row_gets_its_sum(degrees: Degrees, decode: bool, placements: dict[int, ExpertPlacement]) -> None:
    """And what stands beside the experts, once, whoever computes it: here seven times the row."""
    placement = placements[degrees.expert]
    counts = [(5, 3), (1, 0), (4, 4)]
    steps = [[Rows.random(2 * i + rank, n) for rank, n in enumerate(rows)] for i, rows in enumerate(counts)]

    def as_rank(context: ParallelContext) -> tuple[list[Tensor], list[int], int]:
        dispatcher, found, computed = exchange(context, placement), [], []
        for rows, step in zip(counts, steps, strict=True):
            mine = step[context.place.data_rank]
            how = ExpertStep(decode, rows[: degrees.data])
            own, ids, weights = (dispatcher.share(part, how) for part in (mine.rows, mine.expert_ids, mine.weights))
            dispatched = dispatcher.dispatch(own, ids, weights, how)
            copies = dispatched.copies
            made = copies.sums(outputs(context, placement, copies.taken(dispatched.rows), copies.ends))
            found.append(dispatcher.restore(dispatched.combine(made, partial(torch.mul, own, 7)), len(mine.rows), how))
            computed.append(int(copies.ends[-1]))
        return found, computed, sum(dispatcher.map.loads.tolist())

    ranks = as_ranks(degrees, as_rank)
    for rank, (found, _, _) in enumerate(ranks):
        for step, sums in zip(steps, found, strict=True):
            mine = step[degrees.place(rank).data_rank]
            torch.testing.assert_close(sums, mine.sums() + 7 * mine.rows)
    choices = [CHOSEN * sum(rows[: degrees.data]) for rows in counts]
    computed = np.sum([computed for _, computed, _ in ranks], axis=0)
    assert computed.tolist() == [count * degrees.expert_tensor for count in choices]  # no padding, and nothing twice
    assert sum(loads for _, _, loads in ranks) == sum(choices)


def test_a_row_travels_once_to_a_rank_with_both_of_its_experts() -> None:
    """And in a fixed shape, to every rank, padded to the longest."""

    def as_rank(context: ParallelContext) -> list[tuple[int, int]]:
        sent = []
        for step in (PREFILL, ExpertStep(decode=True, rows_per_rank=(3, 1))):
            dispatcher = exchange(context, PLAIN[2])
            count = 3 if context.place.data_rank == 0 else 1
            chosen = torch.tensor([[2, 3], [0, 1], [1, 2]])[:count]
            dispatched = dispatcher.dispatch(torch.ones(count, WIDTH), chosen, torch.ones(count, CHOSEN), step)
            dispatched.combine(dispatched.rows, None)
            sent.append((dispatcher.traffic.rows_sent, dispatcher.traffic.rows_received))
        return sent

    # Rank 0 keeps its second row; the first and third go to rank 1. Rank 1 keeps its only one.
    assert as_ranks(Degrees(data=2, expert=2), as_rank, torch.float32) == [[(2, 0), (3, 3)], [(0, 2), (3, 3)]]


@pytest.mark.parametrize("decode", [True, False])
def test_decode_never_waits_for_the_device(decode: bool) -> None:
    """Prefill does, for counts."""

    def as_rank(context: ParallelContext) -> bool:
        dispatcher, mine = exchange(context, REPLICATED[2]), Rows.random(1, 3)
        step = ExpertStep(decode, (3, 3))
        with contextlib.suppress(AssertionError), ForbidReadingBack():
            dispatched = dispatcher.dispatch(mine.rows, mine.expert_ids, mine.weights, step)
            dispatched.combine(torch.zeros_like(dispatched.rows), None)
            return True
        return False

    assert as_ranks(Degrees(data=2, expert=2), as_rank) == [decode, decode]


@settings(max_examples=50)
@given(st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=40))
def test_replicas_take_turns(chosen: list[int]) -> None:
    expert_map = ExpertMap.of(REPLICATED[2], EXPERTS, torch.device("cpu"))
    slots = expert_map.slots_of(torch.tensor(chosen)[:, None]).flatten().tolist()
    of_slots = [expert for rank in REPLICATED[2].slots for expert in rank]
    assert [of_slots[slot] for slot in slots] == chosen
    assert expert_map.loads.tolist() == np.bincount(chosen, minlength=EXPERTS).tolist()
    if set(chosen) == {3} and len(chosen) > 1:
        assert set(slots) == {0, 4}


def test_a_map_changes_in_place() -> None:
    expert_map = ExpertMap.of(PLAIN[2], EXPERTS, torch.device("cpu"))
    pointers = [tensor.data_ptr() for tensor in (expert_map.replicas, expert_map.slots)]
    expert_map.change(ExpertPlacement(((3, 2), (1, 0))))
    assert expert_map.slots_of(torch.tensor([[0, 1, 2, 3]])).tolist() == [[3, 2, 1, 0]]
    assert [tensor.data_ptr() for tensor in (expert_map.replicas, expert_map.slots)] == pointers


@pytest.mark.parametrize("expert", [2, 4])
def test_moved_experts_lie_where_the_map_says(expert: int) -> None:
    """A slot's weights are (expert, part); there and back, by replicas and without."""
    degrees = Degrees(data=2, tensor=2, expert=expert)
    path = [REPLICATED[expert], _turned(REPLICATED[expert]), REPLICATED[expert]]

    def as_rank(context: ParallelContext) -> tuple[list[list[list[int]]], list[int], list[int]]:
        place, tensors = context.place, []
        for factor in (1, 100):
            held = [[e * factor, place.expert_tensor_rank] for e in path[0].slots[place.expert_rank]]
            tensors.append(torch.tensor(held))
        expert_map = ExpertMap.of(path[0], EXPERTS, context.device)
        received = [move_experts(tensors, expert_map, to, context.stage, degrees.expert_tensor) for to in path[1:2]]
        found = [tensor.tolist() for tensor in tensors]
        slots = expert_map.slots_of(torch.arange(EXPERTS)[:, None]).flatten().tolist()
        move_experts(tensors, expert_map, path[2], context.stage, degrees.expert_tensor)
        back = [e for e, _ in tensors[0].tolist()]
        assert back == list(path[0].slots[place.expert_rank])
        return found, received, slots

    flat = [e for rank in path[1].slots for e in rank]
    for rank, (found, received, slots) in enumerate(as_ranks(degrees, as_rank)):
        place = degrees.place(rank)
        own, before = path[1].slots[place.expert_rank], path[0].slots[place.expert_rank]
        assert found == [[[e * factor, place.expert_tensor_rank] for e in own] for factor in (1, 100)]
        assert received == [sum(e not in before for e in own)]
        assert [flat[slot] for slot in slots] == list(range(EXPERTS))


def _turned(placement: ExpertPlacement) -> ExpertPlacement:
    """Each rank's experts on the next rank, in another order."""
    return ExpertPlacement(tuple(placement.slots[rank - 1][::-1] for rank in range(len(placement.slots))))


def test_a_group_of_one_exchanges_with_itself() -> None:
    tensor = torch.arange(6).view(3, 2)
    assert Group().all_to_all_rows(tensor, [3], [3]) is tensor and Group().reduce_scatter(tensor) is tensor
