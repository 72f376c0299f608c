"""Routers as two launches: the experts and shares that the plain ones find, whatever the sizes, groups and rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from tests.kernel_device import DEVICE

# isort: split
# Not without Triton: this file is skipped before.
from models.kernels import routing
from models.kernels.routing import Choosing, route
from models.router import GroupedSoftmaxRouter, Router, SigmoidRouter, SoftmaxRouter
from models.routing import Groups


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True, slots=True)
class Kind:
    """A router, and what the kernel is told of it besides how many experts a row has."""

    name: str
    choosing: Choosing
    router: Callable[[torch.Tensor, torch.Tensor, Choosing], Router]
    corrected: bool = False


def softmax(weight: torch.Tensor, correction: torch.Tensor, given: Choosing) -> Router:
    return SoftmaxRouter(weight, given.experts_per_token, given.normalizes, given.rounds_shares)


def deepseek_v2(weight: torch.Tensor, correction: torch.Tensor, given: Choosing) -> Router:
    return GroupedSoftmaxRouter(weight, given.experts_per_token, given.groups, given.scale)


def deepseek_v3(weight: torch.Tensor, correction: torch.Tensor, given: Choosing) -> Router:
    return SigmoidRouter(weight, correction, given.experts_per_token, given.groups, given.normalizes, given.scale)


KINDS = [
    Kind("softmax", Choosing(1, normalizes=True, rounds_scores=True), softmax),
    Kind("softmax, rounded", Choosing(1, rounds_scores=True, rounds_shares=True), softmax),
    Kind("deepseek-v2", Choosing(1, scale=16.0), deepseek_v2),
    Kind("deepseek-v2, groups", Choosing(1, groups=Groups(4, 2), scale=16.0), deepseek_v2),
    Kind("deepseek-v3", Choosing(1, True, Groups(4, 3), True, 1e-20, 2.5), deepseek_v3, corrected=True),
    Kind("deepseek-v3, no groups", Choosing(1, True, None, False, 1e-20), deepseek_v3, corrected=True),
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("few", [0, 256], ids=["many", "few"])
@pytest.mark.parametrize(("rows", "hidden", "experts", "chosen"), [(1, 64, 8, 2), (5, 200, 20, 3), (18, 136, 64, 6)])
def test_the_plain_routers_choice(
    kind: Kind, rows: int, hidden: int, experts: int, chosen: int, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routing, "FEW_ROWS", few)
    x, weight = random(rows, hidden, seed=1).half(), (random(experts, hidden, seed=2) / hidden**0.5).half()
    choosing, correction = replace(kind.choosing, experts_per_token=chosen), 0.2 * random(experts, seed=3)
    expected_ids, expected = kind.router(weight, correction, choosing).plain(x)
    given = correction.to(DEVICE) if kind.corrected else None
    ids, shares = (found.cpu() for found in route(x.to(DEVICE), weight.to(DEVICE), given, choosing))
    assert (ids.dtype, shares.dtype) == (torch.int64, torch.float32)
    assert [len(set(row)) for row in ids.tolist()] == [chosen] * rows
    table = torch.zeros(rows, experts)
    close = table.scatter(1, ids, shares) - table.scatter(1, expected_ids, expected)
    # Sums in another order turn a last bit of a score, and with it, in few rows, a tie.
    assert ((close.abs() > 2e-3 * choosing.scale).any(1)).sum() <= rows * 0.06


def test_of_equal_scores_the_lowest_expert_is_chosen() -> None:
    x, weight = torch.ones(2, 32).half(), torch.ones(16, 32).half()
    ids, shares = route(x.to(DEVICE), weight.to(DEVICE), None, Choosing(4, normalizes=True))
    assert ids.tolist() == [[0, 1, 2, 3]] * 2
    assert shares.tolist() == [[0.25] * 4] * 2


def test_no_row_asks_for_nothing() -> None:
    ids, shares = route(torch.ones(0, 32).half().to(DEVICE), torch.ones(4, 32).half().to(DEVICE), None, Choosing(2))
    assert ids.shape == shares.shape == (0, 2)


@pytest.mark.filterwarnings("ignore:invalid value")  # the interpreter computes as numpy does
@pytest.mark.parametrize("sigmoid", [False, True])
def test_a_row_that_is_not_finite_chooses_experts_that_there_are(sigmoid: bool) -> None:
    x = torch.full((1, 32), torch.nan).half()
    choosing = Choosing(3, sigmoid, Groups(3, 2), True, 1e-20)
    ids, _ = route(x.to(DEVICE), random(15, 32, seed=1).half().to(DEVICE), torch.zeros(15, device=DEVICE), choosing)
    assert ((ids >= 0) & (ids < 15)).all()
