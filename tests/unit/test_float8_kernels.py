"""The kernels of 8 bit floats: what they make is what a product with the dequantised matrix makes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from examples.quantize_fp8 import quantise
from tests.kernel_device import DEVICE

# isort: split
# Not without Triton: this file is skipped before.
from models.kernels.float8 import experts_of_few_rows
from models.moe import Experts
from parallel import kernels
from parallel.expert import Copies
from parallel.float8 import FEW_ROWS, SOME_ROWS, Float8, linear, quantised_rows
from parallel.kernels import float8_rows
from parallel.kernels.float8 import FEW, dequantised, linear_of_few_rows

SMALL = replace(FEW, neurons=16, inputs=16)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul_(float(shape[-1]) ** -0.5)


def matrix(rows: int, columns: int, block: tuple[int, int], seed: int = 0) -> Float8:
    """Its blocks differ in size by far."""
    weight = random(rows, columns, seed=seed)
    weight[: rows // 2, columns // 2 :] *= 100
    values, scales = quantise(weight, block)
    return Float8(values.contiguous().to(DEVICE), scales.contiguous().to(DEVICE), block)


def stack(*matrices: Float8) -> Float8:
    values, scales = (torch.stack(parts) for parts in ([m.values for m in matrices], [m.scales for m in matrices]))
    return Float8(values, scales, matrices[0].block)


def wide(matrix: Float8) -> Tensor:
    return Float8(matrix.values.cpu(), matrix.scales.cpu(), matrix.block).meant(torch.float64).to(DEVICE)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 20), st.integers(1, 50), st.integers(1, 200), st.sampled_from([1, 3, 40]), st.integers(0, 99))
def test_products_of_few_rows(rows: int, neurons: int, inputs: int, processors: int, seed: int) -> None:
    """In one piece and in many; ends that fill no tile, no block, or neither."""
    weight = matrix(neurons, inputs, (24, 32), seed)
    x = random(rows, inputs, seed=seed + 1).half().to(DEVICE) * inputs**0.5
    found, expected = linear_of_few_rows(x, weight, SMALL, processors), F.linear(x.double(), wide(weight))
    assert found.shape == expected.shape and found.dtype == torch.float16
    assert (found.double() - expected).norm() <= 1e-3 * expected.norm()


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(("rows", "chosen"), [(1, 2), (7, 3), (40, 1)])
def test_experts_of_few_rows(rows: int, chosen: int, own: bool) -> None:
    """own: some choices are computed elsewhere."""
    slots, hidden, neurons, block = 4, 40, 24, (8, 16)
    gate_up = stack(*(matrix(2 * neurons, hidden, block, seed) for seed in range(slots)))
    down = stack(*(matrix(hidden, neurons, block, seed + 9) for seed in range(slots)))
    generator = torch.Generator().manual_seed(rows)
    ids = torch.rand(rows, slots + 2 * own, generator=generator).argsort(-1)[:, :chosen].to(DEVICE)
    shares = torch.rand(rows, chosen, generator=generator).to(DEVICE)
    copies = Copies.of_own(ids, shares, slots, None) if own else Copies.of(ids, shares, slots)
    x = random(rows, hidden, seed=5).half().to(DEVICE)
    found = experts_of_few_rows(x, gate_up, down, copies, SMALL, SMALL)
    exact = Experts(wide(gate_up), wide(down), F.silu).outputs(copies.taken(x.double()), copies.ends)
    expected = copies.sums(exact)
    assert (found.double() - expected).norm() <= 2e-3 * expected.norm()


@pytest.mark.parametrize("shape", [(1, 5, 7), (3, 70, 150)], ids=str)
def test_what_floats_stand_for(shape: tuple[int, int, int]) -> None:
    """Rounded once, as the reference does; stacked, and alone."""
    count, rows, columns = shape
    matrices = [matrix(rows, columns, (24, 32), seed) for seed in range(count)]
    for made in (matrices[0], stack(*matrices)):
        assert torch.equal(dequantised(made, torch.float16), made.meant(torch.float16))


@pytest.mark.parametrize("shape", [(1, 128), (5, 384), (19, 256)], ids=str)
@pytest.mark.parametrize("multiple", [1, 4])
def test_rows_as_floats(shape: tuple[int, int], multiple: int) -> None:
    """As the reference has them; what fills up is zeros, and a row of zeros stays one."""
    rows = random(*shape, seed=3).mul_(10).half().to(DEVICE)
    rows[0, :128] = 0
    found, expected = float8_rows.quantised_rows(rows, multiple), quantised_rows(rows)
    filled = -(-len(rows) // multiple) * multiple
    assert found.values.shape == (filled, shape[1]) and found.scales.stride() == (1, filled)
    assert not found.values[len(rows) :].float().any()
    assert torch.allclose(found.scales[: len(rows)], expected.scales, rtol=1e-6)
    numbers, wanted = found.values[: len(rows)].float(), expected.values.float()
    if DEVICE.type == "cpu":  # the interpreter loses the carry of what is rounded up to a power of two
        power = wanted.abs().frexp().mantissa == 0.5
        numbers = numbers.where(~power, wanted)
    assert torch.allclose(numbers, wanted, rtol=2**-3, atol=2**-9)  # a division may round the other way
    assert (numbers != wanted).float().mean() < 0.01


@pytest.mark.skipif(DEVICE.type != "cuda", reason="the interpreter makes a number of what is none")
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_stays_so_alone(broken: float) -> None:
    rows = random(3, 256).half().to(DEVICE)
    rows[1, 200] = broken
    assert wide(float8_rows.quantised_rows(rows)).isfinite().all(1).tolist() == [True, False, True]


@pytest.mark.skipif(
    DEVICE.type != "cuda" or not kernels.multiplies_float8(DEVICE), reason="cuBLAS multiplies 8 bit floats on Hopper"
)
@pytest.mark.parametrize("rows", [17, 64, 65, 130, 1023])
@pytest.mark.parametrize(("neurons", "inputs"), [(6144, 1024), (576, 2048), (2112, 2816)])
def test_products_of_many_rows(rows: int, neurons: int, inputs: int) -> None:
    """Rows that fill no group of four, blocks that are none either, and a block at the end that is not whole. The
    product of what both became is exact but for its sums; beside the rows as they were it is 8 bit floats' rounding."""
    weight = matrix(neurons, inputs, (128, 128))
    x = random(rows, inputs, seed=1).mul_(inputs**0.5).bfloat16().to(DEVICE)
    found = float8_rows.linear_of_quantised(x, weight).double()
    quantised = float8_rows.quantised_rows(x)
    of_floats = F.linear(wide(quantised), wide(weight))
    assert (found - of_floats).norm() <= 5e-3 * of_floats.norm()
    exact = F.linear(x.double(), wide(weight))
    assert 1e-3 * exact.norm() < (found - exact).norm() <= 5e-2 * exact.norm()
    if rows > SOME_ROWS or neurons >= 6144:
        bias = torch.ones(neurons, dtype=x.dtype, device=DEVICE)
        assert torch.equal(linear(x, weight, bias), float8_rows.linear_of_quantised(x, weight) + bias)
    assert torch.equal(linear(x[:FEW_ROWS], weight), linear_of_few_rows(x[:FEW_ROWS], weight))


@pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA graphs")
@pytest.mark.parametrize("rows", [3, 40, 66])
def test_products_in_a_graph(rows: int) -> None:
    """Captured once, they follow their inputs."""
    weight = matrix(6144, 1024, (128, 128))
    x = random(rows, 1024).bfloat16().to(DEVICE)
    linear(x, weight)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = linear(x, weight)
    x.copy_(random(rows, 1024, seed=7))
    graph.replay()
    assert torch.equal(made, linear(x, weight))
