"""Which rows go to which ranks: in the order that ranks expect them, without a question to the device."""

from __future__ import annotations

import pytest
import torch

from parallel.travel import returned_sums, travelling


@pytest.mark.parametrize(("ranks", "rows"), [(1, 1), (2, 7), (5, 30), (3, 0)])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_rows_go_rank_after_rank(ranks: int, rows: int, share: float) -> None:
    asked = torch.rand(ranks, rows, generator=torch.Generator().manual_seed(rows)) < share
    going, places = travelling(asked)
    assert torch.equal(going[: int(asked.sum())], asked.nonzero()[:, 1])
    assert places.dtype == torch.int32 and torch.equal(places >= 0, asked.t())
    for row, rank in asked.t().nonzero().tolist():
        place = int(places[row, rank])
        assert going[place] == row and place == int(asked.flatten()[: rank * rows + row].sum())


def test_what_comes_back_is_added_up() -> None:
    asked = torch.tensor([[True, False, True], [True, False, False]])
    going, places = travelling(asked)
    back = torch.tensor([[1.0], [2.0], [4.0]], dtype=torch.float64)
    assert returned_sums(back, going[:3], [2, 1], places).tolist() == [[5.0], [0.0], [2.0]]
