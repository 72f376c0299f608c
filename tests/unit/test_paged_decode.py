"""The kernel that reads decode rows' blocks: what it makes is the reference's, whatever the shapes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernel_device import DEVICE, DTYPES

# isort: split
# Not without Triton: this file is skipped before.
from models.attention_rule import AttentionRule
from models.batch import ForwardBatch
from models.decode_attention import GatheredDecode
from models.kernels import paged_decode
from models.kernels.paged_decode import PagedDecode, Tiling, best_tiling, pieces_of

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SMALL = Tiling(tokens=16, heads=16, warps=4, stages=2, resident=1, least_tiles=1)
PLAIN = AttentionRule(None, 0.25, None)


@dataclass(frozen=True)
class Case:
    """Rows of these contexts; latent: values are what keys begin with."""

    contexts: tuple[int, ...]
    heads: int = 4
    kv_heads: int = 2
    key_dim: int = 16
    value_dim: int = 16
    block_tokens: int = 4
    latent: bool = False
    rule: AttentionRule = PLAIN
    dtype: torch.dtype = torch.float16
    processors: int = 8
    tiling: Tiling | None = SMALL


def error(case: Case) -> float:
    """The kernel's distance from the reference in float64, relative to that. Slots that no row may see hold NaN."""
    random = torch.Generator().manual_seed(sum(case.contexts))
    lengths, rows = torch.tensor(case.contexts), len(case.contexts)
    used = -(-lengths // case.block_tokens)
    width, blocks = int(used.max()), int(used.sum()) + 1
    free, tables = torch.randperm(blocks - 1, generator=random) + 1, torch.zeros(rows, width, dtype=torch.int64)
    for row, count in enumerate(used.tolist()):
        tables[row, :count], free = free[:count], free[count:]  # behind them stands block 0, which is nobody's

    def cache(dim: int) -> Tensor:
        made = torch.full((blocks, case.block_tokens, case.kv_heads, dim), torch.nan)
        for row, stored in enumerate(case.contexts):
            oldest = max(0, stored - (case.rule.window or stored))
            seen = torch.arange(oldest, stored)
            made[tables[row, seen // case.block_tokens], seen % case.block_tokens] = torch.randn(
                len(seen), case.kv_heads, dim, generator=random
            )
        return made.to(DEVICE, case.dtype)

    keys = cache(case.key_dim)
    values = keys[..., : case.value_dim] if case.latent else cache(case.value_dim)
    query = torch.randn(rows, case.heads, case.key_dim, generator=random).to(DEVICE, case.dtype)
    tables, lengths = tables.to(DEVICE), lengths.to(DEVICE)
    found = PagedDecode(tables, lengths, case.processors, case.tiling)(case.rule, query, keys, values)
    assert found.dtype == case.dtype and found.is_contiguous()
    wide = keys.double()
    batch = ForwardBatch(query, query, query, rows, tables, lengths, (), query)
    reference = GatheredDecode(batch, case.block_tokens, {case.rule.window})
    expected = reference(
        case.rule, query.double(), wide, wide[..., : case.value_dim] if case.latent else values.double()
    )
    # Where values cancel each other, rounded weights still add up to what the values' size allows.
    least = 0.1 * expected.numel() ** 0.5
    return float((found.double() - expected).norm() / expected.norm().clamp(min=least))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case((1,)),
        Case((1, 3, 4, 5, 15, 16, 17, 33)),
        Case((100, 2), heads=12, kv_heads=4, key_dim=24, value_dim=24),
        Case((70, 9), heads=3, kv_heads=3, block_tokens=16, tiling=None),
        Case((41, 8), heads=20, kv_heads=1, key_dim=40, value_dim=24, tiling=replace(SMALL, tokens=32)),
        Case((40, 1, 90), rule=AttentionRule(7, 0.3, 2.0)),
        Case((40, 1, 90), rule=AttentionRule(64, 0.3, None), block_tokens=3),
        Case((33, 64, 1), heads=12, kv_heads=1, key_dim=26, value_dim=20, latent=True),
        Case((50, 7), heads=24, kv_heads=1, key_dim=26, value_dim=20, latent=True, rule=AttentionRule(20, 0.2, 1.0)),
        Case((90,), heads=5, kv_heads=1, key_dim=36, value_dim=32, latent=True, tiling=None),
    ],
    ids=lambda case: f"{case.contexts}-{case.heads}-{case.kv_heads}-{case.latent}",
)
@pytest.mark.parametrize("processors", [1, 64], ids=["one-piece", "many-pieces"])
def test_it_is_the_reference(case: Case, dtype: torch.dtype, processors: int) -> None:
    assert error(replace(case, dtype=dtype, processors=processors)) < TOLERANCE[dtype]


@settings(max_examples=15)
@given(
    contexts=st.lists(st.integers(1, 70), min_size=1, max_size=3).map(tuple),
    kv_heads=st.integers(1, 3),
    sharing=st.integers(1, 5),
    dims=st.tuples(st.integers(1, 20), st.integers(0, 9)),
    latent=st.booleans(),
    window=st.none() | st.integers(1, 80),
    cap=st.none() | st.just(1.5),
    block_tokens=st.integers(1, 9),
    processors=st.integers(1, 40),
)
def test_any_shape_is_the_reference(
    contexts: tuple[int, ...],
    kv_heads: int,
    sharing: int,
    dims: tuple[int, int],
    latent: bool,
    window: int | None,
    cap: float | None,
    block_tokens: int,
    processors: int,
) -> None:
    value_dim, more = dims
    case = Case(
        contexts,
        heads=kv_heads * sharing,
        kv_heads=kv_heads,
        key_dim=value_dim + more,
        value_dim=value_dim,
        block_tokens=block_tokens,
        latent=latent,
        rule=AttentionRule(window, 0.3, cap),
        processors=processors,
    )
    assert error(case) < TOLERANCE[case.dtype]


@pytest.mark.parametrize("roomy", [True, False])
@pytest.mark.parametrize("sharing", [1, 7, 128])
@pytest.mark.parametrize("shared", [True, False])
def test_where_shared_memory_is_short_kernels_take_less_of_it(shared: bool, sharing: int, roomy: bool) -> None:
    tiling = best_tiling(shared, sharing, roomy)
    assert tiling.stages == (5 if roomy else 3)
    assert tiling.heads == (64 if roomy and shared and sharing > 16 else 16)


def test_pieces_take_no_more_memory_than_is_spared_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case((100, 2), tiling=SMALL, processors=64)
    made: list[int] = []
    new_empty = Tensor.new_empty

    def watched(self: Tensor, *shape: Any, **options: Any) -> Tensor:
        fresh = new_empty(self, *shape, **options)
        made.append(fresh.nbytes if fresh.dim() == 4 else 0)
        return fresh

    monkeypatch.setattr(Tensor, "new_empty", watched)
    assert error(case) < TOLERANCE[case.dtype] and max(made) == 2 * 4 * 7 * 16 * 4
    made.clear()
    monkeypatch.setattr(paged_decode, "_MOST_PARTIAL_BYTES", 3 * 2 * 4 * 16 * 4)
    assert error(case) < TOLERANCE[case.dtype] and 0 < max(made) <= 3 * 2 * 4 * 16 * 4


def test_a_row_that_pads_a_graph_reads_one_token() -> None:
    keys, query = torch.ones(2, 4, 1, 16, device=DEVICE).half(), torch.ones(2, 1, 16, device=DEVICE).half()
    tables, lengths = torch.zeros(2, 1, dtype=torch.int64, device=DEVICE), torch.tensor([0, 1], device=DEVICE)
    found = PagedDecode(tables, lengths, 1, SMALL)(PLAIN, query, keys, keys.clone())
    assert torch.equal(found, torch.ones_like(found))


def test_no_rows_make_nothing() -> None:
    keys = torch.ones(2, 4, 1, 16, device=DEVICE).half()
    tables, lengths = (torch.zeros(size, dtype=torch.int64, device=DEVICE) for size in ((0, 0), (0,)))
    assert PagedDecode(tables, lengths, 1)(PLAIN, keys.new_empty(0, 4, 16), keys, keys[..., :8]).shape == (0, 4, 8)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's, of what is not a number
def test_a_row_that_is_not_finite_spoils_no_other() -> None:
    keys, query = torch.ones(2, 4, 1, 16, device=DEVICE).half(), torch.ones(2, 1, 16, device=DEVICE).half()
    query[0] = torch.nan
    tables, lengths = torch.tensor([[0], [1]], device=DEVICE), torch.tensor([4, 4], device=DEVICE)
    found = PagedDecode(tables, lengths, 1, SMALL)(PLAIN, query, keys, keys.clone())
    assert found[0].isnan().all() and torch.equal(found[1], torch.ones_like(found[1]))


@pytest.mark.parametrize(
    ("programs", "tiles", "pieces"),
    [
        (256, 128, 1),  # a device full of them
        (1, 1, 1),
        (1, 128, 64),  # no more than are joined at once
        (264, 128, 1),
        (265, 12, 2),  # one more than fit: halves take three rounds of 8 tiles, wholes two of 14, thirds four of 6
        (2, 40, 20),  # never shorter than the least
    ],
)
def test_contexts_are_cut_so_that_a_device_is_full(programs: int, tiles: int, pieces: int) -> None:
    assert pieces_of(programs, tiles, room=264, least_tiles=2) == pieces
