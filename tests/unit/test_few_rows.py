"""The kernels of experts for few rows: what they make is what plain torch makes, whoever chose what."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernel_device import DEVICE

# isort: split
# Not without Triton: this file is skipped before.
from models.kernels.few_rows import DOWN, GATE_UP, experts_of_few_rows
from models.moe import Experts
from parallel.expert import Copies
from parallel.kernels.by_slot import by_slot

SLOTS, HIDDEN, NEURONS = 5, 24, 20
SMALL = replace(GATE_UP, neurons=16, inputs=16, rows=4), replace(DOWN, neurons=16, inputs=16, rows=4)


def random(*shape: int, seed: int = 0) -> Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return made.mul_(float(shape[-1]) ** -0.5).half().to(DEVICE)


def check(slots: Tensor, own: bool, total: int | None = None) -> None:
    """slots [r, k]; own: only those from 0 to SLOTS - 1 are here."""
    weights = torch.rand(slots.shape, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    chosen = slots.to(DEVICE)
    copies = Copies.of_own(chosen, weights, SLOTS, total) if own else Copies.of(chosen, weights, SLOTS)
    rows = random(len(slots), HIDDEN, seed=1) * HIDDEN**0.5
    gate_up, down = random(SLOTS, 2 * NEURONS, HIDDEN), random(SLOTS, HIDDEN, NEURONS, seed=2)
    found = experts_of_few_rows(rows, gate_up, down, copies, *SMALL)
    wide = Experts(gate_up.double(), down.double(), F.silu)
    expected = copies.sums(wide.outputs(copies.taken(rows.double()), copies.ends))
    assert found.dtype == torch.float16 and found.shape == rows.shape
    # Every product with a weight is rounded, and what lies between the matrices too.
    assert (found.double() - expected).norm() <= 2e-3 * expected.norm()


@pytest.mark.parametrize(
    "slots",
    [
        [[2]],
        [[0, 4]],
        [[4, 0], [4, 1], [0, 4]],
        [[3]] * 11,  # more than a tile, and all others are empty
        [[row % 5, (row + 1) % 5, (row + 3) % 5] for row in range(7)],
    ],
    ids=str,
)
def test_rows_get_their_weighted_sums(slots: list[list[int]]) -> None:
    check(torch.tensor(slots), own=False)


@pytest.mark.parametrize("total", [None, 3])
def test_choices_that_are_computed_elsewhere_add_nothing(total: int | None) -> None:
    check(torch.tensor([[1, 7], [-1, 0], [4, 9], [-2, 5]]), own=True, total=total)


def test_where_nothing_is_chosen_here_sums_are_zeros() -> None:
    check(torch.tensor([[5, 7], [-1, 6]]), own=True, total=None)
    check(torch.tensor([[5, 7], [-1, 6]]), own=True, total=0)


def test_no_rows_make_nothing() -> None:
    check(torch.zeros(0, 2, dtype=torch.int64), own=False)


@settings(max_examples=10)
@given(st.integers(1, 12), st.integers(1, 4), st.integers(0, 1000), st.booleans())
def test_any_choices(rows: int, chosen: int, seed: int, own: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    spare = 2 if own else 0
    check(torch.rand(rows, SLOTS + spare, generator=generator).argsort(-1)[:, :chosen], own)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's, of what is not a number
def test_a_row_that_is_not_finite_spoils_no_other() -> None:
    rows, weights = random(3, HIDDEN), torch.ones(3, 2, device=DEVICE)
    copies = Copies.of(torch.tensor([[0, 1], [1, 0], [1, 2]], device=DEVICE), weights, SLOTS)
    tensors = random(SLOTS, 2 * NEURONS, HIDDEN), random(SLOTS, HIDDEN, NEURONS, seed=2)
    plain = experts_of_few_rows(rows, *tensors, copies, *SMALL)
    rows[1] = torch.nan
    spoilt = experts_of_few_rows(rows, *tensors, copies, *SMALL)
    assert spoilt[1].isnan().all() and torch.equal(spoilt[[0, 2]], plain[[0, 2]])


@pytest.mark.parametrize("most", [1 << 14, 0], ids=["few", "many"])
@pytest.mark.parametrize(("choices", "held"), [(1, 1), (7, 3), (256, 5), (1024, 4), (1500, 9)])
def test_choices_are_sorted_as_torch_sorts_them(
    choices: int, held: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parallel.kernels.by_slot.MOST_CHOICES", most)
    slots = torch.randint(0, held + 1, (choices, 1), generator=torch.Generator().manual_seed(choices)).to(DEVICE)
    found, expected = slots.flatten().sort(stable=True)
    order, ends = by_slot(slots, held)
    assert torch.equal(order, expected) and order.dtype == torch.int64
    assert ends.tolist() == [int((found <= slot).sum()) for slot in range(held)] and ends.dtype == torch.int32
