"""The floor of a case, against figures that were worked out by hand for two H200 before there was code for them."""

from __future__ import annotations

import pytest

from coordinator.plan.census import Census, take_census
from coordinator.plan.floor import Floor, Rates, expected_experts, floor
from echelon.bench.cases import Case
from models.config import read_model_config
from parallel.degrees import Degrees
from tests.published import PUBLISHED, write_config

H200 = Rates(read_bytes_s=4.49e12, flops=802e12, all_reduce_s=9e-6)
TP2, PP2 = Degrees(tensor=2), Degrees(pipeline=2)
# By hand, to two digits; None: no least one was worked out.
BY_HAND = [
    ("qwen3-8b", Degrees(), "1x128x256", None, 0.87),
    ("qwen3-8b", Degrees(), "64x512x128", None, 1.15),
    ("qwen3-8b", Degrees(), "256x1024x256", 5.8, 7.9),
    ("qwen3-8b", TP2, "1x128x256", None, 0.60),
    ("qwen3-8b", TP2, "256x1024x256", 2.9, 4.1),
    ("qwen3-8b", PP2, "1x128x256", None, 0.87),
    ("qwen3-8b", PP2, "64x512x128", None, 0.79),
    ("qwen3-8b", PP2, "256x1024x256", 2.9, 4.4),
    ("deepseek-v2-lite", Degrees(), "1x128x256", None, 0.28),
    ("deepseek-v2-lite", Degrees(), "256x1024x256", None, 3.8),
    ("deepseek-v2-lite", Degrees(data=2, expert=2), "256x1024x256", None, 1.9),
]


@pytest.fixture(scope="module")
def censuses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Census]:
    folder = tmp_path_factory.mktemp("models")
    names = ("qwen3-8b", "deepseek-v2-lite")
    return {name: take_census(read_model_config(write_config(folder / name, PUBLISHED[name])), 2, 2) for name in names}


def of(censuses: dict[str, Census], model: str, degrees: Degrees, case: str) -> Floor:
    return floor(censuses[model], degrees, Case.parse(case), H200)


@pytest.mark.parametrize(("model", "degrees", "case", "least_s", "most_s"), BY_HAND)
def test_floors_worked_out_by_hand_come_out(
    censuses: dict[str, Census], model: str, degrees: Degrees, case: str, least_s: float | None, most_s: float
) -> None:
    found = of(censuses, model, degrees, case)
    assert found.most_s == pytest.approx(most_s, rel=0.025)
    if least_s is not None:
        assert found.least_s == pytest.approx(least_s, rel=0.025)
    assert found.least_s <= found.most_s


def test_bytes_worked_out_by_hand_come_out(censuses: dict[str, Census]) -> None:
    dense = of(censuses, "qwen3-8b", Degrees(), "1x128x256")
    assert dense.step_bytes == pytest.approx(15.1e9, rel=0.005) and dense.kv_token_bytes == 147_456
    assert dense.distinct_experts is None
    one, all_of_them = (of(censuses, "deepseek-v2-lite", Degrees(), case) for case in ("1x128x256", "256x1024x256"))
    assert one.step_bytes == pytest.approx(4.9e9, rel=0.01) and one.distinct_experts == pytest.approx(6)
    assert all_of_them.step_bytes == pytest.approx(31e9, rel=0.01) and all_of_them.kv_token_bytes == 31_104
    assert all_of_them.distinct_experts == pytest.approx(64)


def test_counted_experts_take_the_place_of_expected_ones(censuses: dict[str, Census]) -> None:
    census, case = censuses["deepseek-v2-lite"], Case(64, 512, 128)
    assert expected_experts(census, 64) == pytest.approx(64 * (1 - (58 / 64) ** 64))
    expected, half = floor(census, Degrees(), case, H200), floor(census, Degrees(), case, H200, 32.0)
    assert half.distinct_experts == 32.0 and half.decode_s < 0.75 * expected.decode_s
    assert expected.distinct_experts == expected_experts(census, 64)


def test_all_reduces_are_counted_where_layers_are_split(censuses: dict[str, Census]) -> None:
    """Two a layer and step; 64x512x128 on two devices, by hand: half of one device's, and 128 * 72 * 9 us."""
    one, two = (of(censuses, "qwen3-8b", degrees, "64x512x128") for degrees in (Degrees(), TP2))
    assert two.most_s == pytest.approx(one.most_s / 2 + 128 * 72 * 9e-6, rel=0.005)
