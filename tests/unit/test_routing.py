"""What config.json says of a DeepSeek's experts, as published and as it must not be; what each rank holds of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from echelon.errors import ConfigError
from models.config import read_model_config
from models.cutting import check_degrees
from models.families import Gating
from models.json_source import JsonSource
from models.routing import Groups, Routing, read_routing
from models.tables import held_parameters, parameter_bytes, parameter_table
from parallel.degrees import Degrees
from tests.published import DEEPSEEK_R1, DEEPSEEK_V2_LITE, write_config

V2 = {**DEEPSEEK_V2_LITE, "n_group": 8, "topk_group": 3, "topk_method": "group_limited_greedy"}


def routing_of(directory: Path, values: dict[str, Any]) -> tuple[Routing | None, ...]:
    config = read_model_config(write_config(directory, values), planning=True)
    return tuple(layer.routing for layer in config.layers)


def test_published_models(tmp_path: Path) -> None:
    lite = routing_of(tmp_path, dict(DEEPSEEK_V2_LITE))
    expected = Routing(64, 6, 1408, normalizes=False, shared_neurons=2 * 1408, gating=Gating.DEEPSEEK_V2)
    assert lite == (None, *[expected] * 26)
    r1 = routing_of(tmp_path, dict(DEEPSEEK_R1))
    assert r1[:4] == (None, None, None, r1[-1])
    assert r1[-1] == Routing(256, 8, 2048, True, 2048, Gating.DEEPSEEK_V3, Groups(8, 4), 2.5)
    assert routing_of(tmp_path, dict(V2))[-1].groups == Groups(8, 3)  # type: ignore[union-attr]


def test_a_file_written_by_transformers_leaves_out_what_is_its_default(tmp_path: Path) -> None:
    left_out = {
        "n_routed_experts", "n_shared_experts", "moe_intermediate_size", "num_experts_per_tok", "scoring_func",
        "first_k_dense_replace", "n_group", "topk_group", "topk_method", "norm_topk_prob", "routed_scaling_factor",
    }  # fmt: skip
    short = {key: value for key, value in DEEPSEEK_R1.items() if key not in left_out}
    assert routing_of(tmp_path, short) == routing_of(tmp_path, dict(DEEPSEEK_R1))


def test_all_groups_are_as_good_as_none(tmp_path: Path) -> None:
    for groups in (1, 4):
        values = {**DEEPSEEK_R1, "n_group": groups, "topk_group": groups}
        assert routing_of(tmp_path, values)[-1].groups is None  # type: ignore[union-attr]


def test_greedy_as_deepseek_spelt_it(tmp_path: Path) -> None:
    assert routing_of(tmp_path, {**V2, "topk_method": "gready"}) == routing_of(
        tmp_path, {**V2, "topk_method": "greedy"}
    )


def test_every_second_layer_has_experts(tmp_path: Path) -> None:
    found = routing_of(tmp_path, {**DEEPSEEK_V2_LITE, "num_hidden_layers": 6, "moe_layer_freq": 2})
    assert [routing is not None for routing in found] == [False, False, True, False, True, False]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({**V2, "topk_method": "noaux_tc"}, ["topk_method='noaux_tc'", "greedy, group_limited_greedy"]),
        ({**DEEPSEEK_R1, "topk_method": "gready"}, ["topk_method='gready'", "supported: noaux_tc"]),
        ({**DEEPSEEK_R1, "topk_method": "greedy"}, ["topk_method='greedy'", "supported: noaux_tc"]),
        ({**V2, "scoring_func": "sigmoid"}, ["scoring_func='sigmoid'", "supported: softmax"]),
        ({**DEEPSEEK_R1, "scoring_func": "softmax"}, ["scoring_func='softmax'", "supported: sigmoid"]),
        ({**V2, "norm_topk_prob": True}, ["norm_topk_prob=true"]),
        ({**V2, "n_group": 7}, ["n_group=7 does not divide n_routed_experts=64"]),
        ({**V2, "topk_group": 9}, ["topk_group=9 is more than n_group=8"]),
        ({**V2, "n_group": 32, "topk_group": 2}, ["num_experts_per_tok=6", "topk_group=2 groups of 2"]),
        ({**DEEPSEEK_R1, "n_group": 256, "topk_group": 9}, ["n_group=256", "best two"]),
        ({**V2, "routed_scaling_factor": 0}, ["routed_scaling_factor", "> 0"]),
        ({**V2, "n_shared_experts": -1}, ["n_shared_experts", "-1"]),
        ({**V2, "first_k_dense_replace": "one"}, ["first_k_dense_replace", "'one'"]),
    ],
)
def test_what_is_not_computed_is_refused_by_its_key(tmp_path: Path, values: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        routing_of(tmp_path, values)
    assert all(part in str(refused.value) for part in said), refused.value


def test_no_family_without_keys_has_experts(tmp_path: Path) -> None:
    assert read_routing(JsonSource(tmp_path, {}), None, 2) == (None, None)


def test_shared_experts_are_whole_where_rows_travel(tmp_path: Path) -> None:
    """Split by tensor where every rank computes all rows; whole where each has rows of its own."""
    config = read_model_config(write_config(tmp_path, {**DEEPSEEK_V2_LITE, "num_hidden_layers": 2}), planning=True)
    name = "model.layers.1.mlp.shared_experts.{}.weight"
    neurons = {"gate_proj": 0, "up_proj": 0, "down_proj": 1}
    for degrees, held in [
        (Degrees(), 2816),
        (Degrees(tensor=2), 1408),
        (Degrees(tensor=2, expert=2), 2816),
        (Degrees(data=2), 2816),
        (Degrees(data=2, tensor=2), 2816),
    ]:
        for rank in range(degrees.ranks):
            table = {parameter.name: parameter for parameter in held_parameters(config, degrees.place(rank))}
            for part, dim in neurons.items():
                parameter = table[name.format(part)]
                assert parameter.held_shape(degrees)[dim] == held
                (region,) = parameter.held_regions(degrees.place(rank))
                first = rank * held if degrees == Degrees(tensor=2) else 0
                assert (region[dim].start, region[dim].stop) == (first, first + held)


def test_shared_experts_need_not_be_split_where_they_are_whole(tmp_path: Path) -> None:
    values = {**DEEPSEEK_V2_LITE, "moe_intermediate_size": 15, "n_shared_experts": 1, "intermediate_size": 16}
    config = read_model_config(write_config(tmp_path, values), planning=True)
    with pytest.raises(ConfigError, match="n_shared_experts"):
        check_degrees(config, Degrees(tensor=2))
    check_degrees(config, Degrees(tensor=2, expert=2))


def test_a_correction_stays_in_float32(tmp_path: Path) -> None:
    """Whatever the dtype of the model: 256 numbers of four bytes in a model of two, of eight in one of eight."""
    config = read_model_config(write_config(tmp_path, {**DEEPSEEK_R1, "num_hidden_layers": 4}), planning=True)
    corrections = [p for p in parameter_table(config) if p.name.endswith("e_score_correction_bias")]
    assert [p.name for p in corrections] == ["model.layers.3.mlp.gate.e_score_correction_bias"]
    assert {p.name for p in parameter_table(config) if p.wide} == {p.name for p in corrections}
    assert [corrections[0].held_dtype(dtype) for dtype in ("bfloat16", "float32", "float64")] == [
        "float32", "float32", "float64",
    ]  # fmt: skip
    place = Degrees().place(0)
    half, single, double = (parameter_bytes(config, place, size) for size in (2, 4, 8))
    assert 2 * half - 256 * 4 == single == double // 2
