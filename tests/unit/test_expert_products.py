"""Products of experts: each way makes what the reference makes, and what serves a device never waits for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from models import expert_products
from models.expert_products import can_group, grouped, one_by_one, tiled
from models.moe import Experts
from parallel import kernels
from parallel.expert import Copies
from tests.reading_back import ForbidReadingBack

HIDDEN, NEURONS = 16, 8


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def problem(
    counts: list[int], surplus: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of so many for each slot, and some behind that no slot wants: NaN, so that whoever takes them is seen."""
    rows = random(sum(counts) + surplus, HIDDEN, seed=1, dtype=dtype)
    rows[sum(counts) :] = torch.nan
    slots = len(counts)
    weights = (
        random(slots, 2 * NEURONS, HIDDEN, seed=2, dtype=dtype),
        random(slots, HIDDEN, NEURONS, seed=3, dtype=dtype),
    )
    return rows, torch.tensor(counts).cumsum(0).int(), *weights


COUNTS = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 70)), min_size=1, max_size=6)


@settings(max_examples=40)
@given(COUNTS, st.integers(0, 40), st.sampled_from([1, 1 << 28]))
def test_tiles_make_what_slot_by_slot_is_made(counts: list[int], surplus: int, weight_bytes: int) -> None:
    """Whatever tile a row lies in, and however many tiles are computed at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expert_products, "_WEIGHT_BYTES", weight_bytes)
        given = problem(counts, surplus)
        if not len(given[0]):
            return
        found, expected = (product(*given, F.silu)[: sum(counts)] for product in (tiled, one_by_one))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("counts", [[0, 300, 0, 1], [0, 0, 0, 0], [40, 40, 40, 40]], ids=str)
def test_tiles_wait_for_no_device(counts: list[int]) -> None:
    """And have shapes that no value settles: there are none on torch's meta device."""
    given = problem(counts, 7)
    with ForbidReadingBack():
        tiled(*given, F.silu)
    rows, ends, gate_up, down = (tensor.to("meta") for tensor in given)
    assert tiled(rows, ends, gate_up, down, F.silu).shape == given[0].shape
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        one_by_one(rows, ends, gate_up, down, F.silu)


def test_there_are_no_more_tiles_than_rows_may_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of weights are what tiles cost: at most one for each slot with a row, and one for each full tile."""
    multiplied: list[int] = []

    def bmm(rows: Tensor, weights: Tensor, original: object = torch.bmm) -> Tensor:
        multiplied.append(len(rows))
        return original(rows, weights)  # type: ignore[operator, no-any-return]

    monkeypatch.setattr(torch, "bmm", bmm)
    for counts, needed, most in (([1, 0, 0, 1], 2, 2), ([1], 1, 1), ([9] * 4, 4, 6), ([320, 0, 0, 0], 3, 6)):
        multiplied.clear()
        tiled(*problem(counts, 0), F.silu)
        assert needed <= multiplied[0] <= most
        assert multiplied == multiplied[:1] * 2


def test_each_row_is_written_once() -> None:
    """Who writes last is not settled on a device, so rows of another slot in a tile must not be written at all."""
    written: list[Tensor] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: torch._ops.OpOverload, types: object, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> object:
            if "index_put" in func.name():
                written.append(args[1][0].flatten())
            return func(*args, **(kwargs or {}))

    given = problem([1, 40, 0, 3, 17], 5)
    with Watch():  # type: ignore[no-untyped-call]
        tiled(*given, F.silu)
    (places,) = written
    assert sorted(places[places < len(given[0])].tolist()) == list(range(1 + 40 + 3 + 17))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_a_cpu_torch_groups_all_but_float64(dtype: torch.dtype) -> None:
    rows, ends, gate_up, down = problem([3, 0, 5], 2, dtype)
    assert can_group(rows, down) and not can_group(rows.double(), down)
    assert not can_group(rows[:2], down), "torch would go through slots without rows too"
    found = grouped(rows, ends, gate_up, down, F.silu)[:8]
    assert torch.equal(found, one_by_one(rows, ends, gate_up, down, F.silu)[:8])


def test_torch_groups_no_rows_that_are_not_aligned() -> None:
    rows, down = torch.zeros(3, HIDDEN), torch.zeros(2, HIDDEN, NEURONS - 1)
    assert not can_group(rows, down)


@pytest.mark.parametrize(
    ("dtype", "major", "groups"),
    [
        (torch.bfloat16, 9, True),
        (torch.bfloat16, 10, True),
        (torch.bfloat16, 8, False),
        (torch.bfloat16, 12, False),
        (torch.float16, 9, False),
        (torch.float32, 9, False),
    ],
    ids=str,
)
def test_on_cuda_torch_groups_what_it_has_a_kernel_for(
    dtype: torch.dtype, major: int, groups: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere torch's grouped product is a loop that copies the ends to the host."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    rows: Any = OnDevice(dtype)
    assert can_group(rows, torch.zeros(2, HIDDEN, NEURONS)) is groups
    assert not can_group(rows, torch.zeros(2, HIDDEN, NEURONS + 1))


@pytest.mark.parametrize(
    ("dtype", "major", "copies", "by_kernel"),
    [
        (torch.bfloat16, 9, 128, True),
        (torch.bfloat16, 9, 129, False),
        (torch.bfloat16, 8, 65, True),
        (torch.float16, 9, 65, True),
        (torch.float32, 9, 1, False),
    ],
    ids=str,
)
def test_the_kernel_takes_few_rows_and_what_torch_would_loop_over(
    dtype: torch.dtype, major: int, copies: int, by_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    experts = Experts(torch.zeros(2, 2 * NEURONS, HIDDEN), torch.zeros(2, HIDDEN, NEURONS), F.silu)
    rows: Any = OnDevice(dtype)
    chosen = Copies.of(torch.zeros(copies, 1, dtype=torch.int64), torch.ones(copies, 1), 2)
    monkeypatch.setattr(kernels, "can_run", lambda device: True)
    assert experts._are_few(rows, chosen) is by_kernel
    assert not replace(experts, activation=F.gelu)._are_few(rows, chosen)


class OnDevice:
    """What is asked of rows on a CUDA device."""

    is_cuda, device = True, torch.device("cuda", 0)

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def element_size(self) -> int:
        return self.dtype.itemsize
