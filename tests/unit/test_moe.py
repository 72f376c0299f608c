"""Mixtures of experts on one rank: what a router chooses, what experts compute, and how rows are copied for them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.moe import Experts, MixtureOfExperts
from models.router import SoftmaxRouter
from parallel.comm import Group
from parallel.context import ParallelContext
from parallel.degrees import Degrees
from parallel.expert import PREFILL, Copies, SplitExperts
from parallel.float8 import meant
from tests.ranks import as_ranks


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def one_by_one(hidden: Tensor, expert_ids: Tensor, weights: Tensor, experts: Experts) -> Tensor:
    """Each row through each of its experts, as the formula says."""
    sums = torch.zeros_like(hidden)
    gate_up, down = (meant(matrix, hidden.dtype) for matrix in (experts.gate_up, experts.down))
    for row in range(len(hidden)):
        for expert, weight in zip(expert_ids[row].tolist(), weights[row].tolist(), strict=True):
            gate, up = (gate_up[expert] @ hidden[row]).chunk(2)
            sums[row] += weight * (down[expert] @ (F.silu(gate) * up))
    return sums


@pytest.mark.parametrize(("normalizes", "total"), [(True, 1.0), (False, 0.7)])
def test_a_router_shares_by_a_softmax_over_all(normalizes: bool, total: float) -> None:
    logits = torch.tensor([[0.1, 0.3, 0.2, 0.4]]).log().double()
    router = SoftmaxRouter(torch.eye(4, dtype=torch.float64), 2, normalizes, rounds=False)
    expert_ids, shares = router(logits)
    assert expert_ids.tolist() == [[3, 1]]
    assert shares.dtype == torch.float32
    torch.testing.assert_close(shares, torch.tensor([[0.4, 0.3]]) * total / 0.7)


def test_shares_are_rounded_if_asked() -> None:
    logits = torch.tensor([[0.1, 0.3, 0.2, 0.4]]).log().bfloat16()
    weight = torch.eye(4, dtype=torch.bfloat16)
    exact, rounded = (SoftmaxRouter(weight, 2, True, rounds)(logits)[1] for rounds in (False, True))
    assert not torch.equal(exact, rounded) and torch.equal(exact.bfloat16().float(), rounded)


@settings(max_examples=50)
@given(st.integers(0, 9), st.integers(1, 4), st.integers(0, 1000))
def test_experts_compute_the_formula(rows: int, chosen: int, seed: int) -> None:
    experts = Experts(random(5, 12, 8, seed=seed), random(5, 8, 6, seed=seed + 1), F.silu)
    router = SoftmaxRouter(random(5, 8, seed=seed + 2), chosen, normalizes=True, rounds=False)
    hidden = random(rows, 8, seed=seed + 3)
    found = MixtureOfExperts(router, experts, SplitExperts(Group(), 5))(hidden, PREFILL)
    torch.testing.assert_close(found, one_by_one(hidden, *router(hidden), experts))


def test_what_stands_beside_experts_is_added_once_by_ranks_that_split_it() -> None:
    hidden, gate_up, down = random(6, 8), random(3, 12, 8), random(3, 8, 6, seed=1)
    experts = Experts(gate_up, down, F.silu)
    router = SoftmaxRouter(random(3, 8, seed=2), 2, normalizes=True, rounds=False)
    routed = MixtureOfExperts(router, experts, SplitExperts(Group(), 3))(hidden, PREFILL)

    def as_rank(context: ParallelContext) -> Tensor:
        part = slice(3 * context.tensor.rank, 3 * context.tensor.rank + 3)
        mine = Experts(gate_up.view(3, 2, 6, 8)[:, :, part].flatten(1, 2), down[:, :, part], F.silu)
        share = torch.zeros(8).double().index_fill(0, torch.arange(4) + 4 * context.tensor.rank, 1.0)
        layer = MixtureOfExperts(router, mine, SplitExperts(context.tensor, 3), lambda rows, step: rows * share)
        return layer(hidden, PREFILL)

    for found in as_ranks(Degrees(tensor=2), as_rank):
        torch.testing.assert_close(found, routed + hidden)


def test_rows_that_all_choose_one_expert_are_all_computed() -> None:
    experts = Experts(random(3, 12, 8), random(3, 8, 6, seed=1), F.silu)
    hidden = random(40, 8, seed=2)
    expert_ids, weights = torch.full((40, 1), 1), torch.ones(40, 1)
    dispatched = SplitExperts(Group(), 3).dispatch(hidden, expert_ids, weights, PREFILL)
    assert dispatched.copies.ends.tolist() == [0, 40, 40]
    found = dispatched.combine(experts(dispatched.rows, dispatched.copies), None)
    torch.testing.assert_close(found, one_by_one(hidden, expert_ids, weights, experts))


@pytest.mark.parametrize("total", [None, 3])
def test_choices_of_other_ranks_add_nothing(total: int | None) -> None:
    """Whatever stands behind the last end."""
    slots = torch.tensor([[1, 2], [-1, 0], [1, 7]])  # 0 and 1 are here
    rows = torch.tensor([[1.0], [10.0], [100.0]])
    copies = Copies.of_own(slots, torch.tensor([[0.5, 9.0], [9.0, 0.25], [2.0, 9.0]]), held=2, total=total)
    assert copies.ends.tolist() == [1, 3]
    assert copies.taken(rows)[:3].flatten().tolist() == [10, 1, 100]
    assert len(copies.order) == (3 if total else 6)
    outputs = torch.cat((copies.taken(rows)[:3], torch.full((len(copies.order) - 3, 1), torch.nan)))
    assert copies.sums(outputs).flatten().tolist() == [0.5, 2.5, 200.0]


def test_a_row_that_is_not_finite_spoils_no_other() -> None:
    experts = Experts(random(2, 4, 4), random(2, 4, 2), F.silu)
    router = SoftmaxRouter(random(2, 4, seed=1), 2, normalizes=True, rounds=False)
    layer = MixtureOfExperts(router, experts, SplitExperts(Group(), 2))
    hidden = random(5, 4, seed=2)
    spoilt = hidden.clone()
    spoilt[2] = torch.nan
    others = [0, 1, 3, 4]
    assert torch.equal(layer(spoilt, PREFILL)[others], layer(hidden, PREFILL)[others])
    assert layer(spoilt, PREFILL)[2].isnan().all()
