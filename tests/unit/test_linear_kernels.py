"""Products of few rows: what the kernels make is torch's product, whatever the shapes, and a row's own matter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernel_device import DEVICE, DTYPES

# isort: split
# Not without Triton: this file is skipped before.
from models.layers import gated
from parallel import kernels
from parallel.kernels.linear import Tiling, gated_of_few_rows, linear_of_few_rows, tiling_of
from parallel.linear import FEW_ROWS, LEAST_ROWS, linear, takes_few

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
ALONE, SMALL = Tiling(1, 4, 32, 2, 2), Tiling(16, 16, 32, 2, 2)


def random(*shape: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm().clamp(min=0.1 * max(exact.numel(), 1) ** 0.5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 15, 16])
def test_a_product_is_torchs(rows: int, has_bias: bool, dtype: torch.dtype) -> None:
    """As it is served, 40 neurons of 520 inputs: no tile is full."""
    x, weight = random(rows, 520, dtype=dtype), random(40, 520, dtype=dtype, seed=1) / 23
    bias = random(40, dtype=dtype, seed=2) if has_bias else None
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    found = linear_of_few_rows(x, weight, bias)
    assert found.dtype == dtype and found.shape == (rows, 40) and error(found, exact) < TOLERANCE[dtype]
    exact = gated(F.linear(x.double(), weight.double()), F.silu)
    assert error(gated_of_few_rows(x, weight), exact) < TOLERANCE[dtype]


@settings(max_examples=20)
@given(rows=st.integers(0, 16), neurons=st.integers(1, 40), inputs=st.integers(1, 90), alone=st.booleans())
def test_any_shape_is_torchs(rows: int, neurons: int, inputs: int, alone: bool) -> None:
    rows, tiling = (min(rows, 1), ALONE) if alone else (rows, SMALL)
    x, weight = random(rows, inputs), random(2 * neurons, inputs, seed=1) / inputs**0.5
    exact = F.linear(x.double(), weight.double())
    assert error(linear_of_few_rows(x, weight, None, tiling), exact) < TOLERANCE[torch.float16]
    assert error(gated_of_few_rows(x, weight, tiling), gated(exact, F.silu)) < TOLERANCE[torch.float16]


def test_a_row_does_not_depend_on_its_company() -> None:
    x, weight = random(16, 300), random(24, 300, seed=1)
    together = linear_of_few_rows(x, weight, None)
    assert torch.equal(linear_of_few_rows(x[3:9], weight, None), together[3:9])
    x[0] = torch.nan
    assert torch.equal(linear_of_few_rows(x, weight, None)[1:], together[1:])


@pytest.mark.parametrize("is_gated", [False, True])
def test_every_number_of_few_rows_has_a_tiling(is_gated: bool) -> None:
    tilings = {rows: tiling_of(rows, is_gated).rows for rows in range(1, FEW_ROWS + 1)}
    assert all(rows <= tile for rows, tile in tilings.items()) and tilings[1] == 1
    assert (
        tuple(min(rows for rows in tilings if tilings[rows] == tile) for tile in sorted({*tilings.values()}))
        == LEAST_ROWS
    )


def test_the_kernels_take_few_rows_of_their_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = random(FEW_ROWS + 1, 8), random(4, 8)
    monkeypatch.setattr(kernels, "can_run", lambda device: True)
    assert takes_few(x[1:], weight) and not takes_few(x, weight)
    assert not takes_few(x[1:].double(), weight.double()) and not takes_few(x[1:], weight.double())
    assert not takes_few(x[1:], random(8, 4).T)
    assert linear(x, weight).equal(F.linear(x, weight))
    monkeypatch.setattr(kernels, "can_run", lambda device: False)
    assert not takes_few(x[1:], weight)
