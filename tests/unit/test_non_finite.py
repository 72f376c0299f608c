"""Where a row went astray is looked for in pieces, and what it cannot be looked for costs no step."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs

from worker import non_finite
from worker.non_finite import Astray, Sampled, first_astray
from worker.plan import NON_FINITE

BLOCK_TOKENS, LAYERS = 4, 2
TABLE = torch.tensor([7, 2, 5, 0, 3])


def cache(*spoilt: tuple[int, int]) -> Any:
    """spoilt: layers and positions of a sequence that lies in the blocks of the table."""
    keys = [torch.zeros(8, BLOCK_TOKENS, 2, 3) for _ in range(LAYERS)]
    for layer, position in spoilt:
        keys[layer][TABLE[position // BLOCK_TOKENS], position % BLOCK_TOKENS, 1, 2] = torch.nan
    return SimpleNamespace(keys=tuple(keys), block_tokens=BLOCK_TOKENS)


@pytest.mark.parametrize("piece_tokens", [1, BLOCK_TOKENS, 2 * BLOCK_TOKENS, 4096])
def test_a_position_is_found_whatever_piece_it_lies_in(piece_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(non_finite, "PIECE_TOKENS", piece_tokens)
    for position in range(18):
        assert first_astray(cache((1, position)), TABLE, 18) == Astray(1, position)
    assert first_astray(cache((1, 3), (0, 17), (0, 16)), TABLE, 18) == Astray(0, 16), "the first layer counts"
    assert first_astray(cache((0, 18)), TABLE, 18) is None, "it is nobody's"


def test_no_more_than_a_piece_is_taken_out_of_the_cache_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(non_finite, "PIECE_TOKENS", 2 * BLOCK_TOKENS)
    taken: list[int] = []

    @dataclass(frozen=True)
    class Keys:
        keys: torch.Tensor

        def __getitem__(self, blocks: torch.Tensor) -> torch.Tensor:
            taken.append(len(blocks))
            return self.keys[blocks]

    found = cache()
    found.keys = tuple(map(Keys, found.keys))
    assert first_astray(found, TABLE, 18) is None
    assert taken == [2, 2, 1] * LAYERS


def test_a_device_without_memory_to_look_ends_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def look(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(non_finite, "first_astray", look)
    state: Any = SimpleNamespace(block_tables=TABLE.unsqueeze(0))
    rows = Sampled(torch.tensor([[5], [NON_FINITE]]), torch.tensor([0, 0]), torch.tensor([9, 18]))
    with capture_logs() as told:
        non_finite.tell(3, rows, state, cache(), 0)
    assert [(entry["step"], entry["tokens"], entry["layer"]) for entry in told] == [
        (3, 18, "unknown: no memory is left to look")
    ]
