"""Sampling rules: greedy and its ties, draws that follow softmax, truncation, log-probabilities, no company effects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from worker import sampler
from worker.logit_rules import Allowed, Banned, Biased, Lookback, Penalties, Rule
from worker.sampler import Path, RuledRows, SamplingPaths, SamplingRows

DRAWS = 20_000
LOGITS = torch.tensor([1.0, -0.5, 2.0, 0.3, 0.3, -3.0, 1.5, 0.0], dtype=torch.float64)
CHI_SQUARE_999 = {
    1: 10.83,
    2: 13.82,
    3: 16.27,
    4: 18.47,
    5: 20.52,
    6: 22.46,
    7: 24.32,
    8: 26.12,
}  # by degrees of freedom


def rows_of(
    count: int, *, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, seed: int = 7, first: int = 0
) -> SamplingRows:
    return SamplingRows(
        temperature=torch.full((count,), temperature, dtype=torch.float64),
        top_p=torch.full((count,), top_p, dtype=torch.float64),
        top_k=torch.full((count,), top_k),
        seed=torch.full((count,), seed),
        choice=torch.zeros(count, dtype=torch.int64),
        position=torch.arange(first, first + count),
    )


def sample(logits: Tensor, rows: SamplingRows, paths: SamplingPaths, ruled: Sequence[RuledRows] = ()) -> Tensor:
    return sampler.sample(logits, rows, paths, ruled).ids


def all_plain(count: int) -> SamplingPaths:
    return SamplingPaths(plain=torch.arange(count), truncated=torch.arange(0))


def all_truncated(count: int) -> SamplingPaths:
    return SamplingPaths(plain=torch.arange(0), truncated=torch.arange(count))


def assert_follows(ids: Tensor, probabilities: Tensor) -> None:
    """Pearson's test at 0.1 %, and nothing drawn that has no probability."""
    observed = torch.bincount(ids, minlength=len(probabilities)).double()
    assert observed[probabilities == 0].sum() == 0
    kept = probabilities > 0
    expected = probabilities[kept] * len(ids)
    statistic = ((observed[kept] - expected) ** 2 / expected).sum().item()
    assert statistic < CHI_SQUARE_999[int(kept.sum()) - 1]


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 5.0, 5.0, 5.0], [0.0, 1.0, 2.0, 3.0]])
    assert sample(logits, rows_of(3, temperature=0.0), all_plain(0)).tolist() == [1, 0, 3]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_plain_draws_follow_softmax(temperature: float, dtype: torch.dtype) -> None:
    logits = LOGITS.to(dtype)
    ids = sample(logits.expand(DRAWS, -1), rows_of(DRAWS, temperature=temperature), all_plain(DRAWS))
    assert_follows(ids, (logits.double() / temperature).softmax(dim=-1))


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "kept"),
    [
        (1.0, 3, 1.0, [2, 6, 0]),
        (0.8, 4, 1.0, [2, 6, 0, 3]),  # 3 and 4 are equal: the lower id is kept
        (1.0, 0, 0.5, [2, 6]),  # 0.40 alone falls short of 0.5
        (1.0, 0, 0.40, [2, 6]),
        (1.0, 0, 0.39, [2]),
        (1.0, 2, 0.6, [2]),  # among the two likeliest, 2 alone has 0.62
        (1.3, 0, 1.0, [0, 1, 2, 3, 4, 5, 6, 7]),
        (1.0, 10**6, 1.0, [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_truncated_draws_follow_the_kept_tokens(temperature: float, top_k: int, top_p: float, kept: list[int]) -> None:
    if top_p in (0.40, 0.39):
        assert 0.39 < LOGITS.softmax(dim=-1)[2] < 0.40
    rows = rows_of(DRAWS, temperature=temperature, top_k=top_k, top_p=top_p)
    ids = sample(LOGITS.expand(DRAWS, -1), rows, all_truncated(DRAWS))
    expected = torch.zeros_like(LOGITS)
    expected[kept] = (LOGITS / temperature).exp()[kept]
    if len(kept) == 1:
        assert set(ids.tolist()) == set(kept)
    else:
        assert_follows(ids, expected / expected.sum())


@pytest.mark.parametrize(("top_k", "top_p"), [(1, 1.0), (0, 1e-9), (1, 0.5)])
def test_the_tightest_truncation_is_greedy_with_its_ties(top_k: int, top_p: float) -> None:
    logits = torch.randint(0, 4, (200, 50), generator=torch.Generator().manual_seed(1)).float()
    ids = sample(logits, rows_of(200, top_k=top_k, top_p=top_p), all_truncated(200))
    assert torch.equal(ids, logits.argmax(dim=-1))


def test_the_truncated_path_without_truncation_draws_what_the_plain_path_draws() -> None:
    logits = torch.randn(300, 97, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    plain = sample(logits, rows_of(300), all_plain(300))
    assert torch.equal(plain, sample(logits, rows_of(300), all_truncated(300)))
    assert not torch.equal(plain, sample(logits, rows_of(300, seed=8), all_plain(300)))


def draw_ruled(path: Path, *rules: Rule, min_p: float | None = None, **parameters: float) -> Tensor:
    """DRAWS ids from LOGITS under these rules, which must not depend on the row."""
    share = None if min_p is None else torch.full((DRAWS,), min_p, dtype=torch.float64)
    part = RuledRows(torch.arange(DRAWS), path, rules, share)
    rows = rows_of(DRAWS, **parameters)  # type: ignore[arg-type]
    return sample(LOGITS.expand(DRAWS, -1), rows, all_plain(0), [part])


def pairs(*tokens: int) -> tuple[Tensor, Tensor]:
    """Every row with each of these tokens."""
    return torch.arange(DRAWS).repeat(len(tokens)), torch.tensor(tokens).repeat_interleave(DRAWS)


def looking_back(*ids: int, prompt_tokens: int) -> Lookback:
    """All rows in one slot, after these ids."""
    history = torch.tensor([[3] * len(ids) + [4], [*ids, 7]], dtype=torch.int32)  # another slot's, and what came after
    positions = torch.full((DRAWS,), len(ids))
    return Lookback(history, torch.ones(DRAWS, dtype=torch.int64), positions, torch.full((DRAWS,), prompt_tokens))


def constant(value: float) -> Tensor:
    return torch.full((DRAWS,), value, dtype=torch.float64)


def kept(logits: Tensor, tokens: list[int]) -> Tensor:
    """Probabilities where only these tokens may be drawn."""
    masked = torch.full_like(logits, -torch.inf)
    masked[tokens] = logits[tokens]
    return masked.softmax(dim=-1)


@pytest.mark.parametrize(
    ("min_p", "temperature", "tokens"),
    [
        (0.15, 1.0, [0, 2, 3, 4, 6]),  # at least 0.15 of token 2's probability: not token 7 with exp(-2) = 0.135
        (0.13, 1.0, [0, 2, 3, 4, 6, 7]),
        (0.15, 0.5, [2, 6]),  # after the temperature: exp(-2 * 0.5) = 0.37, exp(-2 * 1) = 0.135
        (1e-9, 2.0, list(range(8))),
    ],
)
@pytest.mark.parametrize("path", [Path.PLAIN, Path.TRUNCATED])
def test_min_p_keeps_a_share_of_the_likeliest(path: Path, min_p: float, temperature: float, tokens: list[int]) -> None:
    ids = draw_ruled(path, min_p=min_p, temperature=temperature)
    assert_follows(ids, kept(LOGITS / temperature, tokens))


def test_min_p_comes_before_top_k_and_top_p() -> None:
    ids = draw_ruled(Path.TRUNCATED, min_p=0.15, top_k=4, top_p=0.9)
    among_four = kept(LOGITS, [2, 6, 0, 3])
    assert among_four[[2, 6]].sum() < 0.9 < among_four[[2, 6, 0]].sum()
    assert_follows(ids, kept(LOGITS, [2, 6, 0]))


def test_biased_draws_follow_the_biased_logits() -> None:
    rows, ids = pairs(1, 2)
    found = draw_ruled(Path.PLAIN, Biased(rows, ids, torch.where(ids == 1, 2.5, -1.5).double()))
    assert_follows(found, (LOGITS + torch.tensor([0, 2.5, -1.5, 0, 0, 0, 0, 0]).double()).softmax(dim=-1))


def test_banned_tokens_are_never_drawn_and_the_others_keep_their_odds() -> None:
    assert_follows(draw_ruled(Path.PLAIN, Banned(*pairs(2, 0))), kept(LOGITS, [1, 3, 4, 5, 6, 7]))


def test_a_mask_leaves_the_allowed_tokens_their_odds() -> None:
    bits = torch.tensor([[0b1010_0110, 0]], dtype=torch.int32).expand(DRAWS, -1)
    assert_follows(draw_ruled(Path.PLAIN, Allowed(torch.arange(DRAWS), bits)), kept(LOGITS, [1, 2, 5, 7]))


def test_the_last_bit_of_a_mask_word_counts_too() -> None:
    logits = torch.zeros(2, 40)
    bits = torch.tensor([[-(2**31), 0], [0, 1 << 7]], dtype=torch.int32)
    part = RuledRows(torch.arange(2), Path.GREEDY, (Allowed(torch.arange(2), bits),))
    assert sample(logits, rows_of(2), all_plain(0), [part]).tolist() == [31, 39]


@pytest.mark.parametrize(
    ("penalties", "change"),
    [
        ((1.0, 0.8, 0.0), {2: 2.0 - 3 * 0.8, 6: 1.5 - 0.8}),
        ((1.0, 0.0, 0.8), {2: 2.0 - 0.8, 6: 1.5 - 0.8}),
        ((2.0, 0.0, 0.0), {2: 1.0, 6: 0.75, 0: 0.5, 1: -1.0}),  # of the prompt too; what is negative is multiplied
        ((2.0, 0.5, 0.25), {2: 1.0 - 1.5 - 0.25, 6: 0.75 - 0.5 - 0.25, 0: 0.5, 1: -1.0}),
        ((0.5, -0.5, -0.25), {2: 4.0 + 1.5 + 0.25, 6: 3.0 + 0.5 + 0.25, 0: 2.0, 1: -0.25}),
    ],
)
def test_penalised_draws_follow_the_penalised_logits(
    penalties: tuple[float, float, float], change: dict[int, float]
) -> None:
    lookback = looking_back(0, 1, 2, 6, 2, 2, prompt_tokens=2)
    repetition, frequency, presence = map(constant, penalties)
    rule = Penalties(torch.arange(DRAWS), repetition, frequency, presence, 6, lookback)
    logits = LOGITS.clone()
    logits[list(change)] = torch.tensor(list(change.values()), dtype=torch.float64)
    assert_follows(draw_ruled(Path.PLAIN, rule), logits.softmax(dim=-1))


def test_choices_of_a_request_are_drawn_independently() -> None:
    """Pairs of ids of two choices at the same seeds and positions follow the product of their distributions."""
    rows, expected = rows_of(DRAWS), LOGITS.softmax(dim=-1)
    logits = LOGITS.expand(DRAWS, -1)
    draws = [
        sample(logits, replace(rows, choice=torch.full((DRAWS,), choice)), all_plain(DRAWS)) for choice in range(3)
    ]
    common = torch.tensor([0, 2, 6])  # likely enough that each pair is expected often
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert_follows(draws[second], expected)
        both = torch.isin(draws[first], common) & torch.isin(draws[second], common)
        places = torch.searchsorted(common, torch.stack([draws[first][both], draws[second][both]]))
        chances = expected[common] / expected[common].sum()
        assert_follows(places[0] * 3 + places[1], torch.outer(chances, chances).flatten())


@pytest.mark.parametrize("temperature", [1e-40, 1e-3, 1e3, 3e38])
def test_extreme_temperatures_never_draw_a_masked_token(temperature: float) -> None:
    logits = torch.randn(100, 20, generator=torch.Generator().manual_seed(3))
    logits[:, 17:] = -torch.inf
    for paths in (all_plain(100), all_truncated(100)):
        ids = sample(logits, rows_of(100, temperature=temperature, top_p=0.999), paths)
        assert int(ids.max()) < 17
        if temperature < 1e-2:
            assert torch.equal(ids, logits.argmax(dim=-1))


def mixed(count: int) -> tuple[Tensor, SamplingRows, list[str]]:
    generator = torch.Generator().manual_seed(4)
    paths = [("greedy", "plain", "truncated")[index % 3] for index in range(count)]
    rows = SamplingRows(
        temperature=torch.rand(count, generator=generator, dtype=torch.float64) + 0.2,
        top_p=torch.rand(count, generator=generator, dtype=torch.float64).clamp(min=0.3),
        top_k=torch.randint(0, 40, (count,), generator=generator),
        seed=torch.randint(-(2**62), 2**62, (count,), generator=generator),
        choice=torch.randint(0, 3, (count,), generator=generator),
        position=torch.randint(0, 4096, (count,), generator=generator),
    )
    return torch.randn(count, 83, generator=generator, dtype=torch.float64) * 2, rows, paths


def take(logits: Tensor, rows: SamplingRows, paths: list[str], order: list[int]) -> list[int]:
    """Ids of the rows in this order, as one batch."""

    def places(path: str) -> Tensor:
        return torch.tensor([place for place, index in enumerate(order) if paths[index] == path], dtype=torch.int64)

    chosen = SamplingRows(*(getattr(rows, name)[order] for name in SamplingRows.__slots__))
    return sample(logits[order], chosen, SamplingPaths(places("plain"), places("truncated"))).tolist()


def test_a_row_draws_the_same_in_any_company_order_and_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, rows, paths = mixed(40)
    together = take(logits, rows, paths, list(range(40)))
    alone = [take(logits, rows, paths, [index])[0] for index in range(40)]
    assert alone == together
    assert take(logits, rows, paths, list(reversed(range(40)))) == together[::-1]
    monkeypatch.setattr(sampler, "_PIECE_ELEMENTS", 83 * 3)
    assert take(logits, rows, paths, list(range(40))) == together


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_logprobs_are_the_log_softmax_of_the_raw_logits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "_PIECE_ELEMENTS", 100)  # two rows a piece
    logits = torch.randn(9, 50, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)
    ids, chosen = torch.arange(9) * 5, torch.tensor([8, 0, 3, 4, 5])
    own, top_ids, top = sampler.logprobs(logits, ids, chosen)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = logits.to(wide).log_softmax(dim=-1)[chosen]
    assert own.dtype == top.dtype == wide
    assert torch.equal(own, expected[torch.arange(5), ids[chosen]])
    assert top_ids.shape == (5, 20)
    assert torch.equal(top, expected.gather(1, top_ids))
    assert torch.equal(top, expected.sort(dim=-1, descending=True).values[:, :20])


def test_a_small_vocabulary_has_no_more_alternatives_than_tokens() -> None:
    own, top_ids, top = sampler.logprobs(torch.zeros(1, 3), torch.tensor([2]), torch.tensor([0]))
    assert top_ids.shape == top.shape == (1, 3)
    assert own.item() == pytest.approx(-1.0986123)


def test_a_row_that_is_not_finite_still_gives_an_id_of_the_vocabulary() -> None:
    logits = torch.full((3, 11), torch.nan)
    for paths in (all_plain(0), all_plain(3), all_truncated(3)):
        ids = sample(logits, rows_of(3, top_p=0.9), paths)
        assert int(ids.min()) >= 0 and int(ids.max()) < 11
