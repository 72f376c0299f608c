"""The kernels of experts for many rows: what they make is what plain torch makes, whoever chose what."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernel_device import DEVICE

# isort: split
# Not without Triton: this file is skipped before.
from models.expert_products import grouped
from models.kernels.many_rows import experts_of_many_rows, taken_and_places
from models.kernels.rows import silu_and_multiply
from models.moe import Experts
from parallel.expert import Copies
from parallel.kernels.sums import weighted_sums
from parallel.travel import returned_sums, travelling

# The interpreter's, of what lies behind the last end.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")

DTYPE = torch.float16 if DEVICE.type == "cpu" else torch.bfloat16  # which torch groups there
SLOTS, HIDDEN, NEURONS = 5, 24, 40


def random(*shape: int, seed: int = 0) -> Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return made.mul_(float(shape[-1]) ** -0.5).to(DEVICE, DTYPE)


def copies_of(slots: Tensor, own: bool, total: int | None = None) -> Copies:
    """own: only slots from 0 to SLOTS - 1 are here."""
    weights, chosen = torch.rand(slots.shape, generator=torch.Generator().manual_seed(3)).to(DEVICE), slots.to(DEVICE)
    return Copies.of_own(chosen, weights, SLOTS, total) if own else Copies.of(chosen, weights, SLOTS)


def check(slots: Tensor, own: bool, total: int | None = None) -> None:
    copies = copies_of(slots, own, total)
    rows = random(len(slots), HIDDEN, seed=1) * HIDDEN**0.5
    gate_up, down = random(SLOTS, 2 * NEURONS, HIDDEN), random(SLOTS, HIDDEN, NEURONS, seed=2)
    expected = copies.sums(grouped(copies.taken(rows), copies.ends, gate_up, down, F.silu))
    found = experts_of_many_rows(rows, gate_up, down, copies)
    assert found.dtype == DTYPE and found.shape == rows.shape
    # The reference rounds where this does; only exponentials and the order of a sum may turn a last bit.
    assert (found - expected).norm() <= torch.finfo(DTYPE).eps * expected.norm()


@pytest.mark.parametrize(
    "slots",
    [
        [[2]],
        [[0, 4]],
        [[4, 0], [4, 1], [0, 4]],
        [[3]] * 40,
        [[row % 5, (row + 1) % 5, (row + 3) % 5] for row in range(30)],
    ],
    ids=lambda slots: f"{len(slots)}x{len(slots[0])}",
)
def test_rows_get_their_weighted_sums(slots: list[list[int]]) -> None:
    check(torch.tensor(slots), own=False)


@pytest.mark.parametrize("total", [None, 3])
def test_choices_that_are_computed_elsewhere_add_nothing(total: int | None) -> None:
    check(torch.tensor([[1, 7], [-1, 0], [4, 9], [-2, 5]]), own=True, total=total)


def test_where_nothing_is_chosen_here_sums_are_zeros() -> None:
    for total in (None, 0):
        copies = copies_of(torch.tensor([[5, 7], [-1, 6]]), own=True, total=total)
        taken, places = taken_and_places(random(2, HIDDEN), copies)
        junk = torch.full_like(taken, torch.nan)
        assert torch.equal(places.cpu(), torch.full((2, 2), -1, dtype=torch.int32))
        assert not weighted_sums(junk, copies.weights, places).any()
    check(torch.tensor([[5, 7], [-1, 6]]), own=True, total=0)


def test_no_rows_make_nothing() -> None:
    check(torch.zeros(0, 2, dtype=torch.int64), own=False)


@settings(max_examples=10)
@given(st.integers(1, 30), st.integers(1, 4), st.integers(0, 1000), st.booleans())
def test_any_choices(rows: int, chosen: int, seed: int, own: bool) -> None:
    spare = 2 if own else 0
    check(torch.rand(rows, SLOTS + spare, generator=torch.Generator().manual_seed(seed)).argsort(-1)[:, :chosen], own)


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_what_comes_back_is_added_up_as_torch_adds_it(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = torch.rand(ranks, 9, generator=torch.Generator().manual_seed(ranks)) < 0.6
    asked[:, 3] = False  # a row whose experts are all elsewhere, as padding is
    going, places = travelling(asked.to(DEVICE))
    sent = asked.sum(-1).tolist()
    tokens, back = going[: sum(sent)], random(sum(sent), HIDDEN)
    expected = returned_sums(back.float(), tokens, sent, places).to(DTYPE)
    monkeypatch.setattr("parallel.kernels.can_run", lambda device: True)
    found = returned_sums(back, tokens, sent, places)
    assert found.dtype == DTYPE and torch.equal(found, expected)


def test_experts_take_it_for_many_rows_and_not_for_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parallel.kernels.can_run", lambda device: True)
    seen: list[int] = []

    def watched(rows: Tensor, *others: Tensor | Copies) -> Tensor:
        seen.append(len(rows))
        return rows

    monkeypatch.setattr("models.kernels.many_rows.experts_of_many_rows", watched)
    experts = Experts(random(SLOTS, 2 * NEURONS, HIDDEN), random(SLOTS, HIDDEN, NEURONS, seed=2), F.silu)
    gelu = Experts(experts.gate_up, experts.down, F.gelu)
    for rows in (4, 170):
        hidden, copies = random(rows, HIDDEN), copies_of(torch.arange(rows).view(-1, 1) % SLOTS, own=False)
        gelu(hidden, copies)
        experts(hidden, copies)
    assert seen == [170]


@pytest.mark.parametrize("hidden", [24, 1500, 4100])  # a program has a row, or a part of one
def test_rows_of_any_width_are_taken_and_added_up(hidden: int) -> None:
    copies = copies_of(torch.tensor([[1, 0, 6], [2, 1, 0], [7, 4, 1]]), own=True)
    rows, last = random(3, hidden), int(copies.ends[-1])
    taken, places = taken_and_places(rows, copies)
    assert torch.equal(taken[:last], copies.taken(rows)[:last])
    expected = copies.sums(copies.taken(rows))
    torch.testing.assert_close(weighted_sums(taken, copies.weights, places), expected, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("width", [3, 40, 1030])
def test_a_gate_rounds_where_the_layers_do(width: int) -> None:
    gate_up = 4 * random(6, 2 * width)
    gate, up = gate_up.chunk(2, dim=-1)
    torch.testing.assert_close(silu_and_multiply(gate_up), F.silu(gate) * up, rtol=2e-3, atol=1e-6)
    assert silu_and_multiply(gate_up[:0]).shape == (0, width)
