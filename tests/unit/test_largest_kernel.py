"""The kernel that finds the largest logit of each row finds what plain torch finds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from parallel.largest import NOT_FINITE, plain
from tests.kernel_device import DEVICE

# isort: split
# Not without Triton: this file is skipped before.
from parallel.kernels.largest import largest as by_kernel

SPOILT = (float("nan"), float("inf"), -float("inf"))


def random(rows: int, width: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """Few distinct numbers, so that many are equal."""
    generator = torch.Generator().manual_seed(rows * width)
    return torch.randint(-3, 4, (rows, width), generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 64), (4, 65), (0, 7), (3, 200)], ids=str)
def test_the_kernel_finds_what_torch_finds(shape: tuple[int, int], dtype: torch.dtype) -> None:
    logits = random(*shape, dtype)
    found = by_kernel(logits.to(DEVICE), 0, shape[1], piece=64).cpu()
    assert found[:, 1].tolist() == logits.argmax(-1).tolist()
    assert found[:, 0].tolist() == [max(row) for row in logits.tolist()]


@pytest.mark.parametrize("spoilt", SPOILT)
@pytest.mark.parametrize("place", [0, 63, 64, 199])
def test_a_row_with_one_that_is_not_finite_is_told(place: int, spoilt: float) -> None:
    logits = random(3, 200)
    logits[1, place] = spoilt
    for found in (by_kernel(logits.to(DEVICE), 7, 200, piece=64).cpu(), plain(logits, 7, 200)):
        assert found[1].tolist() == [float("inf"), NOT_FINITE]
        assert found[::2, 1].tolist() == (logits[::2].argmax(-1) + 7).tolist()


@pytest.mark.parametrize("width", [0, 3, 64, 70])
def test_what_does_not_count_is_not_read(width: int) -> None:
    logits = random(2, 80)
    logits[:, width:] = torch.nan
    expected = logits[:, :width].float().max(-1).values.tolist() if width else [-torch.inf] * 2
    for found in (by_kernel(logits.to(DEVICE), 0, width, piece=64).cpu(), plain(logits, 0, width)):
        assert found[:, 0].tolist() == expected
