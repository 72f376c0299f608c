"""The largest logit of each row: the lowest id among equals, in parts of a vocabulary too, and rows that are spoilt."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from parallel.largest import NOT_FINITE, largest, winners

NUMBERS = (-1.0, 0.0, 2.0)
SPOILT = (float("nan"), float("inf"), -float("inf"))


def row(numbers: tuple[float, ...]) -> st.SearchStrategy[list[float]]:
    return st.lists(st.sampled_from(numbers), min_size=7, max_size=7)


@given(st.lists(st.one_of(row(NUMBERS), row((*NUMBERS, *SPOILT))), min_size=1, max_size=4), st.integers(1, 5))
def test_parts_of_a_vocabulary_bring_what_the_whole_brings(rows: list[list[float]], ranks: int) -> None:
    logits = torch.tensor(rows, dtype=torch.float64)
    held = -(-7 // ranks)
    padded = torch.nn.functional.pad(logits, (0, held * ranks - 7), value=torch.nan)
    parts = [largest(part, rank * held, 7 - rank * held) for rank, part in enumerate(padded.split(held, dim=1))]
    assert winners(torch.cat(parts), ranks).tolist() == winners(largest(logits), 1).tolist()
    expected = [NOT_FINITE if spoilt(row) else row.index(max(row)) for row in rows]
    assert winners(largest(logits), 1).tolist() == expected


def spoilt(row: list[float]) -> bool:
    return any(not abs(number) < float("inf") for number in row)
