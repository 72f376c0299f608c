"""The kernel that reads for prompts: what it makes is the reference's, whatever the chunks, heads and rules."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernel_device import DEVICE, DTYPES

# isort: split
# Not without Triton: this file is skipped before.
from models.attention_rule import AttentionRule
from models.batch import ForwardBatch, PrefillRow
from models.kernels.prefill import PagedPrefill, Tiling, grouped, tiles_of
from models.latent import LatentAttention
from models.latent_attention import LatentQueries
from models.prefill_attention import GatheredPrefill

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SMALL = Tiling(rows=16, keys=16, warps=4, stages=2)
PLAIN = AttentionRule(None, 0.25, None)
DECODED = 3  # rows before the chunks, which are nobody's business here


@dataclass(frozen=True)
class Case:
    """Chunks of so many tokens, each the end of a request that has stored so many."""

    chunks: tuple[tuple[int, int], ...]
    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    block_tokens: int = 4
    rule: AttentionRule = PLAIN
    dtype: torch.dtype = torch.float16
    tiling: Tiling | None = SMALL


class Requests:
    """A batch's chunks, and a cache whose blocks lie scattered; what nobody has stored is no number."""

    def __init__(self, case: Case, *shape: int) -> None:
        self.random = torch.Generator().manual_seed(sum(stored for _, stored in case.chunks))
        counts = [-(-stored // case.block_tokens) for _, stored in case.chunks]
        free = (torch.randperm(sum(counts), generator=self.random) + 1).split(counts)
        offset, rows = DECODED, []
        self.stored = []
        for (tokens, stored), blocks in zip(case.chunks, free, strict=True):
            position = torch.arange(stored)
            self.stored.append((blocks[position // case.block_tokens], position % case.block_tokens))
            rows.append(PrefillRow(offset, tokens, stored, blocks.to(DEVICE)))
            offset += tokens
        self.case, self.tokens, self.blocks = case, offset, sum(counts) + 1
        nothing = torch.zeros(0, dtype=torch.int64, device=DEVICE)
        self.batch = ForwardBatch(nothing, nothing, nothing, DECODED, nothing, nothing, tuple(rows), nothing)

    def cache(self, *shape: int) -> Tensor:
        made = torch.full((self.blocks, self.case.block_tokens, *shape), torch.nan)
        for where in self.stored:
            made[where] = torch.randn(len(where[0]), *shape, generator=self.random)
        return made.to(DEVICE, self.case.dtype)

    def rows(self, *shape: int) -> Tensor:
        return torch.randn(self.tokens, *shape, generator=self.random).to(DEVICE, self.case.dtype)

    def error(self, found: Tensor, expected: Tensor) -> float:
        """Relative, of the chunks' rows; no other may be written."""
        assert found[:DECODED].isnan().all() and found.dtype == self.case.dtype
        found, expected = found[DECODED:].double(), expected[DECODED:]
        return float((found - expected).norm() / expected.norm().clamp(min=0.1 * expected.numel() ** 0.5))


def error(case: Case) -> float:
    """The kernel's distance from the reference in float64, relative to that."""
    requests = Requests(case)
    keys, values = (requests.cache(case.kv_heads, case.dim) for _ in range(2))
    query = requests.rows(case.heads, case.dim)
    found = torch.full_like(query, torch.nan)
    PagedPrefill(requests.batch, case.tiling)(case.rule, query, keys, values, found)
    expected = query.double()
    reference = GatheredPrefill(requests.batch, {case.rule.window})
    reference(case.rule, query.double(), keys.double(), values.double(), expected)
    return requests.error(found, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(((1, 1),)),
        Case(((5, 5), (16, 16), (17, 17), (1, 33), (4, 33), (15, 31))),
        Case(((33, 70), (2, 2)), heads=12, kv_heads=4, dim=24),
        Case(((40, 41), (3, 9)), heads=14, kv_heads=2, dim=20, block_tokens=16),
        Case(((20, 20), (7, 50)), heads=3, kv_heads=3, dim=40, tiling=replace(SMALL, keys=32)),
        Case(((70, 70),), heads=40, kv_heads=1, dim=8),  # more heads than a tile has rows
        Case(((40, 90), (1, 1), (30, 30)), rule=AttentionRule(7, 0.3, 2.0)),
        Case(((40, 90), (1, 60)), rule=AttentionRule(33, 0.3, None), block_tokens=3),
        Case(((20, 20),), rule=AttentionRule(1, 0.3, None)),
        Case(((150, 200), (3, 140)), heads=8, kv_heads=2, dim=80, block_tokens=16, tiling=None),
        Case(((70, 75),), heads=2, kv_heads=1, dim=256, block_tokens=16, tiling=None),
    ],
    ids=lambda case: f"{case.chunks}-{case.heads}-{case.kv_heads}-{case.dim}",
)
def test_it_is_the_reference(case: Case, dtype: torch.dtype) -> None:
    assert error(replace(case, dtype=dtype)) < TOLERANCE[dtype]


@settings(max_examples=15)
@given(
    chunks=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 40)), min_size=1, max_size=3),
    kv_heads=st.integers(1, 3),
    sharing=st.integers(1, 5),
    dim=st.integers(1, 40),
    window=st.none() | st.integers(1, 80),
    cap=st.none() | st.just(1.5),
    block_tokens=st.integers(1, 9),
)
def test_any_shape_is_the_reference(
    chunks: list[tuple[int, int]],
    kv_heads: int,
    sharing: int,
    dim: int,
    window: int | None,
    cap: float | None,
    block_tokens: int,
) -> None:
    stored = tuple((tokens, tokens + before) for tokens, before in chunks)
    case = Case(stored, kv_heads * sharing, kv_heads, dim, block_tokens, AttentionRule(window, 0.3, cap))
    assert error(case) < TOLERANCE[case.dtype]


@pytest.mark.parametrize("most", [1 << 28, 1], ids=["together", "one-by-one"])
@pytest.mark.parametrize("dims", [(24, 16, 8, 8), (40, 48, 12, 20)], ids=str)
@pytest.mark.parametrize("rule", [PLAIN, AttentionRule(9, 0.2, 1.0)], ids=str)
def test_latents_are_the_reference(
    dims: tuple[int, ...], rule: AttentionRule, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.kernels.prefill._MADE_BYTES", most)
    rank, plain, rotary, value = dims
    shape, heads = LatentAttention(None, rank, plain, rotary, value), 3
    case = Case(((20, 20), (5, 30), (1, 2), (33, 40)), rule=rule)
    requests = Requests(case)
    keys = requests.cache(1, shape.cached_numbers)
    query = requests.rows(heads, shape.head_dim)
    expand = torch.randn(heads * (plain + value), rank, generator=requests.random).mul_(rank**-0.5)
    expand = expand.to(DEVICE, case.dtype)

    def queries(query: Tensor, expand: Tensor) -> LatentQueries:
        return LatentQueries(shape, expand, *query.split([plain, rotary], dim=-1))

    found = torch.full((len(query), heads, value), torch.nan, device=DEVICE, dtype=case.dtype)
    kernel = PagedPrefill(requests.batch, SMALL)
    for _ in range(2):  # of two layers, by the same tables
        kernel.latent(rule, queries(query, expand), keys, found)
    expected = found.double()
    reference = GatheredPrefill(requests.batch, {rule.window})
    reference.latent(rule, queries(query.double(), expand.double()), keys.double(), expected)
    assert requests.error(found, expected) < 2e-3  # keys and values are rounded before they are read


def test_no_chunks_write_nothing() -> None:
    requests = Requests(Case(()))
    query, cache = requests.rows(4, 16), requests.cache(2, 16)
    output = torch.full_like(query, torch.nan)
    PagedPrefill(requests.batch)(PLAIN, query, cache, cache, output)
    assert output.isnan().all()


@pytest.mark.filterwarnings("ignore:(invalid value|All-NaN):RuntimeWarning")  # the interpreter's
def test_a_request_that_is_not_finite_spoils_no_other() -> None:
    requests = Requests(Case(((9, 20), (12, 12))))
    query, cache = requests.rows(4, 16), requests.cache(2, 16)
    query[DECODED : DECODED + 9] = torch.nan
    output = torch.zeros_like(query)
    PagedPrefill(requests.batch, SMALL)(PLAIN, query, cache, cache, output)
    assert output[DECODED : DECODED + 9].isnan().all() and not output[DECODED + 9 :].isnan().any()


def rows_of(*chunks: tuple[int, int]) -> list[PrefillRow]:
    offsets = [sum(tokens for tokens, _ in chunks[:number]) for number in range(len(chunks))]
    tables = [torch.arange(-(-stored // 4)) for _, stored in chunks]
    return [PrefillRow(offset, *chunk, table) for offset, chunk, table in zip(offsets, chunks, tables, strict=True)]


def test_tiles_with_most_to_read_begin() -> None:
    tiles = tiles_of(rows_of((5, 5), (3, 40), (8, 8)), [7, 8, 9], 4, torch.device("cpu"))
    assert tiles.tolist() == [[8, 5, 3, 37], [7, 4, 1, 4], [9, 12, 4, 4], [7, 0, 4, 0], [9, 8, 4, 0]]


@pytest.mark.parametrize(("most", "starts"), [(100, [[0, 8, 48]]), (48, [[0, 8], [0]]), (1, [[0], [0], [0]])])
def test_requests_are_gathered_together_while_there_is_room(most: int, starts: list[list[int]]) -> None:
    groups = grouped(rows_of((5, 5), (3, 40), (8, 8)), 4, most)
    assert [list(group.starts) for group in groups] == starts
    assert [len(group.blocks) for group in groups] == [
        sum(-(-row.context_len // 4) for row in group.rows) for group in groups
    ]
