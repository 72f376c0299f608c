"""Routers against transformers' own gates: the same experts with the same shares, to the last bit.

Hidden states are random, all alike, or such that every expert or none is preferred; a tie is chosen as transformers
chooses it.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import DeepseekV2Config, DeepseekV3Config, MixtralConfig, Qwen3MoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from models.router import GroupedSoftmaxRouter, Router, SigmoidRouter, SoftmaxRouter
from models.routing import Groups

EXPERTS, CHOSEN, HIDDEN = 12, 4, 16
DTYPES = {"float64": torch.float64, "bfloat16": torch.bfloat16}
GROUPS = {"no-groups": None, "two-of-four": Groups(4, 2), "two-of-three": Groups(3, 2)}
PREFERENCES = ("random", "one", "none", "pairs")

dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def gate_weight(preference: str, seed: int) -> Tensor:
    """[experts, hidden]: one: an expert that every positive row prefers; none: all alike; pairs: two by two alike."""
    weight = torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(seed))
    if preference == "one":
        weight[seed % EXPERTS] = 30.0
    if preference == "none":
        weight[:] = weight[0]
    if preference == "pairs":
        weight[1::2] = weight[::2]
    return weight


def rows(seed: int, dtype: torch.dtype) -> Tensor:
    """Positive, some of them alike."""
    hidden = torch.rand(9, HIDDEN, generator=torch.Generator().manual_seed(seed + 1))
    hidden[3:5] = hidden[0]
    return hidden.to(dtype)


def assert_same(router: Router, gate: nn.Module, hidden: Tensor) -> None:
    with torch.inference_mode():
        _, shares, ids = gate(hidden)
        found_ids, found = router(hidden)
    assert found_ids.dtype == torch.int64 and found.dtype == torch.float32
    assert torch.equal(found_ids, ids)
    assert torch.equal(found, shares.float())


def filled(gate: nn.Module, weight: Tensor, dtype: torch.dtype) -> nn.Module:
    gate.weight = nn.Parameter(weight.to(dtype))
    return gate


@dtypes
@settings(max_examples=20, deadline=None)
@given(preference=st.sampled_from(PREFERENCES), groups=st.sampled_from(list(GROUPS.values())), seed=st.integers(0, 99))
def test_deepseek_v2(dtype: torch.dtype, preference: str, groups: Groups | None, seed: int) -> None:
    weight = gate_weight(preference, seed)
    config = DeepseekV2Config(
        n_routed_experts=EXPERTS,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        num_experts_per_tok=CHOSEN,
        routed_scaling_factor=2.5,
        topk_method="group_limited_greedy" if groups else "greedy",
        n_group=groups.count if groups else None,
        topk_group=groups.chosen if groups else None,
    )
    router = GroupedSoftmaxRouter(weight.to(dtype), CHOSEN, groups, 2.5)
    assert_same(router, filled(DeepseekV2TopkRouter(config), weight, dtype), rows(seed, dtype))


@dtypes
@settings(max_examples=20, deadline=None)
@given(
    preference=st.sampled_from(PREFERENCES),
    groups=st.sampled_from([Groups(1, 1), Groups(4, 2), Groups(3, 2), Groups(3, 3)]),
    normalizes=st.booleans(),
    corrects=st.booleans(),
    seed=st.integers(0, 99),
)
def test_deepseek_v3(
    dtype: torch.dtype, preference: str, groups: Groups, normalizes: bool, corrects: bool, seed: int
) -> None:
    """Where all groups are chosen there need not be any."""
    weight = gate_weight(preference, seed)
    correction = torch.randn(EXPERTS, generator=torch.Generator().manual_seed(seed + 2)) * corrects
    config = DeepseekV3Config(
        n_routed_experts=EXPERTS,
        hidden_size=HIDDEN,
        num_experts_per_tok=CHOSEN,
        routed_scaling_factor=2.5,
        norm_topk_prob=normalizes,
        n_group=groups.count,
        topk_group=groups.chosen,
    )
    gate = filled(DeepseekV3TopkRouter(config), weight, dtype)
    gate.e_score_correction_bias = correction.to(torch.promote_types(dtype, torch.float32))
    limited = None if groups.count == groups.chosen else groups
    router = SigmoidRouter(weight.to(dtype), gate.e_score_correction_bias, CHOSEN, limited, normalizes, 2.5)
    assert_same(router, gate, rows(seed, dtype))


@dtypes
@pytest.mark.parametrize("preference", PREFERENCES)
@pytest.mark.parametrize("normalizes", [True, False])
def test_qwen3_moe(dtype: torch.dtype, preference: str, normalizes: bool) -> None:
    config = Qwen3MoeConfig(
        num_experts=EXPERTS, hidden_size=HIDDEN, num_experts_per_tok=CHOSEN, norm_topk_prob=normalizes
    )
    weight = gate_weight(preference, 1)
    router = SoftmaxRouter(weight.to(dtype), CHOSEN, normalizes, rounds=True)
    assert_same(router, filled(Qwen3MoeTopKRouter(config), weight, dtype), rows(1, dtype))


@dtypes
@pytest.mark.parametrize("preference", PREFERENCES)
def test_mixtral(dtype: torch.dtype, preference: str) -> None:
    config = MixtralConfig(num_local_experts=EXPERTS, hidden_size=HIDDEN, num_experts_per_tok=CHOSEN)
    weight = gate_weight(preference, 1)
    router = SoftmaxRouter(weight.to(dtype), CHOSEN, normalizes=True, rounds=False)
    assert_same(router, filled(MixtralTopKRouter(config), weight, dtype), rows(1, dtype))


def test_a_correction_chooses_and_does_not_weigh() -> None:
    """Four experts in two groups. The second group has the better two once the correction is added."""
    logits = torch.tensor([[4.0, 3.0, 0.0, 0.0]])
    correction = torch.tensor([0.0, 0.0, 1.0, 1.1])
    router = SigmoidRouter(torch.eye(4), correction, 2, Groups(2, 1), normalizes=False, scale=2.0)
    ids, shares = router(logits)
    assert sorted(ids[0].tolist()) == [2, 3]
    assert shares.tolist() == [[1.0, 1.0]]  # twice the sigmoid of 0


def test_experts_outside_the_best_group_are_not_chosen() -> None:
    """The best expert's group is judged by it alone, though the other group's experts are all second best."""
    logits = torch.tensor([[3.0, -9.0, 2.9, 2.9]])
    ids, _ = GroupedSoftmaxRouter(torch.eye(4), 2, Groups(2, 1), 1.0)(logits)
    assert sorted(ids[0].tolist()) == [0, 1]
    ids, _ = SigmoidRouter(torch.eye(4), torch.zeros(4), 2, Groups(2, 1), True, 1.0)(logits)
    assert sorted(ids[0].tolist()) == [2, 3]
