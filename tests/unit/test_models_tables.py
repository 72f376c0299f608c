"""The parameter table: the ranks' regions cover every tensor, bytes add up, and bad degrees are refused."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from echelon.errors import ConfigError
from models.config import ModelConfig, read_model_config
from models.cutting import check_degrees
from models.tables import held_experts, held_parameters, kv_bytes_per_block, parameter_bytes, parameter_table
from parallel.degrees import Degrees
from parallel.sharding import Split, SplitVocabulary, held_regions, held_shape, region_shape
from tests.tiny import make_checkpoint


@pytest.fixture(params=["llama", "phi3", "mixtral"])
def config(tmp_path: Path, request: pytest.FixtureRequest) -> ModelConfig:
    return read_model_config(make_checkpoint(tmp_path, request.param, vocab_size=331))


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_regions_cover_every_number(config: ModelConfig, tensor: int) -> None:
    for parameter in parameter_table(config):
        reads = np.zeros(parameter.shape, dtype=int)
        for rank in range(tensor):
            regions = parameter.held_regions(Degrees(tensor=tensor).place(rank))
            for region in regions:
                reads[region] += 1
            rows = sum(region_shape(region)[0] for region in regions)
            padded = isinstance(parameter.placement, SplitVocabulary)
            assert (rows, *region_shape(regions[0])[1:]) == parameter.held_shape(Degrees(tensor=tensor)) or padded
        if isinstance(parameter.placement, Split):
            key_value_copies = max(1, tensor // config.num_key_value_heads)
            copies = {"k_proj": key_value_copies, "v_proj": key_value_copies}.get(parameter.name.split(".")[-2], 1)
            expected = np.full(parameter.shape, copies)
            if "qkv_proj" in parameter.name:
                expected[config.num_attention_heads * config.head_dim :] = key_value_copies
            assert (reads == expected).all(), parameter.name
        else:
            assert (reads >= 1).all(), parameter.name


def test_key_value_heads_go_where_their_queries_are() -> None:
    queries, heads, tensor = 8, 2, 4
    for rank in range(tensor):
        query_rows = held_regions((queries,), Split(0, (queries,)), rank, tensor)[0][0]
        head_rows = held_regions((heads,), Split(0, (heads,)), rank, tensor)[0][0]
        wanted = {query * heads // queries for query in range(query_rows.start, query_rows.stop)}
        assert wanted == set(range(head_rows.start, head_rows.stop))


def test_sections_of_a_stacked_tensor_are_dealt_out_each_on_its_own() -> None:
    shape, placement = (3 * 8, 5), Split(0, (4, 2, 2))  # four query heads, two of keys, two of values, of three rows
    regions = [held_regions(shape, placement, rank, 2) for rank in range(2)]
    assert [[(rows.start, rows.stop) for rows, _ in each] for each in regions] == [
        [(0, 6), (12, 15), (18, 21)],
        [(6, 12), (15, 18), (21, 24)],
    ]
    assert held_shape(shape, placement, 2) == (12, 5)
    assert held_shape(shape, placement, 4) == (9, 5)  # a head of each, the keys' and values' held twice
    assert held_regions(shape, placement, 3, 4)[1:] == held_regions(shape, placement, 2, 4)[1:]


def test_fused_matrices_hold_on_each_rank_what_single_ones_do(tmp_path: Path) -> None:
    """So that one table row may stand for three, and planned bytes are the same."""
    single, fused = (read_model_config(make_checkpoint(tmp_path / name, name)) for name in ("llama", "phi3"))
    for tensor in (1, 2, 4):
        place = Degrees(tensor=tensor).place(0)
        assert parameter_bytes(single, place, 2) == parameter_bytes(fused, place, 2)


def test_a_vocabulary_is_padded_at_its_end() -> None:
    shape, size = (5, 3), 4
    regions = [held_regions(shape, SplitVocabulary(), rank, size)[0] for rank in range(size)]
    assert [(rows.start, rows.stop) for rows, _ in regions] == [(0, 2), (2, 4), (4, 5), (5, 5)]
    assert held_shape(shape, SplitVocabulary(), size) == (2, 3)


def test_bytes_by_hand(config: ModelConfig) -> None:
    hidden, intermediate, head_dim = 64, 96, 16
    attention = hidden * head_dim * (2 + 1 + 1) + 2 * head_dim * hidden  # 2 query heads, 1 key, 1 value; output
    mlps, router = (4, 4 * hidden) if config.layers[0].routing else (1, 0)
    layer = attention + mlps * 3 * hidden * intermediate // 2 + router + 2 * hidden
    vocabulary = 2 * 166 * hidden  # 331 rows over 2 ranks are 166 each, in the embedding and in the head
    two, four = Degrees(tensor=2).place(1), Degrees(tensor=4).place(1)
    assert parameter_bytes(config, two, 4) == 4 * (2 * layer + hidden + vocabulary)
    assert kv_bytes_per_block(config, two, 16, 4) == 2 * 2 * 16 * 1 * head_dim * 4
    assert kv_bytes_per_block(config, four, 16, 4) == kv_bytes_per_block(config, two, 16, 4)


def test_a_tied_head_is_counted_once(tmp_path: Path) -> None:
    untied = read_model_config(make_checkpoint(tmp_path / "untied"))
    tied = read_model_config(make_checkpoint(tmp_path / "tied", tie_word_embeddings=True))
    alone = Degrees().place(0)
    assert parameter_bytes(untied, alone, 2) - parameter_bytes(tied, alone, 2) == 2 * 320 * 64


@pytest.mark.parametrize(
    ("family", "per_layer"),
    [
        ("llama", 9 + 4),
        ("mistral", 9),
        ("qwen2", 9 + 3),
        ("qwen3", 9 + 4 + 2),
        ("mixtral", 9 - 3 + 1 + 4 * 3),
        ("qwen3-moe", 9 - 3 + 1 + 8 * 3 + 4 + 2),
        ("phi3", 9 - 3),
        ("gemma2", 9 + 4 + 2),
        ("gemma3", 9 + 4 + 2 + 2),
    ],
)
def test_the_table_lists_the_checkpoint(tmp_path: Path, family: str, per_layer: int) -> None:
    """Nine tensors a layer, then biases, norms of heads, norms behind attention and MLP; less what is fused; for the
    three of the MLP, a router and three for each expert."""
    config = read_model_config(make_checkpoint(tmp_path, family, attention_bias=True, tie_word_embeddings=False))
    names = [parameter.name for parameter in parameter_table(config)]
    assert len(names) == len(set(names))
    assert len(names) == 3 + 2 * per_layer
    assert {p.layer for p in parameter_table(config)} == {None, 0, 1}
    assert all(math.prod(p.shape) > 0 for p in parameter_table(config))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (3, "tensor=3 does not divide num_attention_heads=4; tensor may be 1, 2, 4 ("),
        (8, "tensor=8 does not divide num_attention_heads=4; tensor may be 1, 2, 4 ("),
    ],
)
def test_degrees_that_do_not_divide(config: ModelConfig, tensor: int, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_degrees(config, Degrees(tensor=tensor))
    assert str(caught.value).startswith(message)


def test_degrees_that_heads_or_neurons_forbid(tmp_path: Path) -> None:
    odd = read_model_config(
        make_checkpoint(tmp_path / "odd", num_attention_heads=6, num_key_value_heads=3, hidden_size=60)
    )
    with pytest.raises(ConfigError, match="neither divides num_key_value_heads=3 nor is a multiple"):
        check_degrees(odd, Degrees(tensor=2))
    narrow = read_model_config(make_checkpoint(tmp_path / "narrow", intermediate_size=98))
    with pytest.raises(ConfigError, match="tensor=4 does not divide intermediate_size=98; tensor may be 1, 2"):
        check_degrees(narrow, Degrees(tensor=4))


def test_degrees_that_experts_forbid(tmp_path: Path) -> None:
    sparse = read_model_config(make_checkpoint(tmp_path / "sparse", "qwen3-moe", moe_intermediate_size=30))
    check_degrees(sparse, Degrees(data=2, tensor=4, expert=8))
    with pytest.raises(ConfigError) as split:
        check_degrees(sparse, Degrees(tensor=4))
    assert str(split.value) == (
        "expert=1 lets 4 ranks split each expert, which does not divide moe_intermediate_size=30; expert may be 2, 4 "
        "(replicas 1 * pipeline 1 * data 1 * tensor 4 = 4 ranks)"
    )
    with pytest.raises(ConfigError, match="expert=16 does not divide num_experts=8; expert may be 8 "):
        check_degrees(sparse, Degrees(data=4, tensor=4, expert=16))
    with pytest.raises(ConfigError, match="expert=7 does not divide num_experts=8; change data or tensor"):
        check_degrees(sparse, Degrees(data=7, expert=7))
    dense = read_model_config(make_checkpoint(tmp_path / "dense"))
    with pytest.raises(ConfigError, match="expert=2: LlamaForCausalLM has no experts; expert may be 1 "):
        check_degrees(dense, Degrees(tensor=2, expert=2))


def test_copies_of_experts_that_no_rank_has_a_use_for(tmp_path: Path) -> None:
    sparse = read_model_config(make_checkpoint(tmp_path / "sparse", "deepseek-v3"))
    check_degrees(sparse, Degrees(data=2, expert=2, redundant_experts=8))
    with pytest.raises(ConfigError) as many:
        check_degrees(sparse, Degrees(data=2, expert=2, redundant_experts=10))
    assert many.value.field == "redundant_experts" and str(many.value) == (
        "redundant-experts=10 gives each of expert=2 groups of ranks (8 + 10) / 2 slots, more than n_routed_experts=8; "
        "it may be at most 8 (replicas 1 * pipeline 1 * data 2 * tensor 1 = 2 ranks)"
    )
    with pytest.raises(ConfigError, match="with expert=1 all ranks have all experts; leave it out, or raise expert "):
        check_degrees(sparse, Degrees(tensor=2, redundant_experts=1))
    dense = read_model_config(make_checkpoint(tmp_path / "dense"))
    with pytest.raises(ConfigError, match="redundant-experts=1: LlamaForCausalLM has no experts; leave it out"):
        check_degrees(dense, Degrees(redundant_experts=1))


def test_copies_of_experts_are_in_the_table(tmp_path: Path) -> None:
    """Each rank holds its own experts, by slot, and those that the next one begins with; all of it is planned."""
    config = read_model_config(make_checkpoint(tmp_path, "deepseek-v3"))
    plain, copied = (Degrees(data=2, tensor=2, expert=4, redundant_experts=count) for count in (0, 4))
    held = [held_experts(config, 1, copied.place(rank)) for rank in range(4)]
    assert held == [(0, 1, 2), (2, 3, 4), (4, 5, 6), (6, 7, 0)]
    assert held_experts(config, 0, copied.place(0)) == ()
    named = {p.expert for p in held_parameters(config, copied.place(3)) if p.expert is not None}
    assert named == {6, 7, 0}
    more = [parameter_bytes(config, d.place(3), 4) for d in (plain, copied)]
    assert more[1] - more[0] == 3 * 64 * 24 * 4  # three matrices of one expert


def test_an_mlp_constrains_where_a_layer_has_one(tmp_path: Path) -> None:
    check_degrees(
        read_model_config(make_checkpoint(tmp_path / "no", "qwen3-moe", intermediate_size=97)), Degrees(tensor=2)
    )
    mixed = make_checkpoint(tmp_path / "mixed", "qwen3-moe", mlp_only_layers=[0], intermediate_size=97)
    with pytest.raises(ConfigError, match="tensor=2 does not divide intermediate_size=97; tensor may be 1"):
        check_degrees(read_model_config(mixed), Degrees(tensor=2))


@pytest.mark.parametrize("degrees", [Degrees(data=2, tensor=2, expert=e) for e in (1, 2, 4)])
def test_every_number_of_an_expert_is_held_once(tmp_path: Path, degrees: Degrees) -> None:
    config = read_model_config(make_checkpoint(tmp_path, "qwen3-moe"))
    reads = {p.name: np.zeros(p.shape, dtype=int) for p in parameter_table(config) if p.expert is not None}
    for place in map(degrees.place, range(4)):
        for parameter in held_parameters(config, place):
            if parameter.expert is not None:
                for region in parameter.held_regions(place):
                    reads[parameter.name][region] += 1
                    assert region_shape(region) == parameter.held_shape(degrees)
    assert len(reads) == 2 * 8 * 3 and all((read == 1).all() for read in reads.values())


def test_allowed_degrees_are_accepted(config: ModelConfig) -> None:
    for tensor in (1, 2, 4):
        check_degrees(config, Degrees(tensor=tensor))


def test_planning_imports_no_torch(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    program = (
        "import pathlib, sys; from models import config, files, tables; from parallel import sharding; "
        f"files.check_model_directory(pathlib.Path({json.dumps(str(tmp_path))})); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_every_pair_of_ranks_agrees_on_shapes(config: ModelConfig) -> None:
    for parameter, (one, other) in itertools.product(parameter_table(config), itertools.combinations(range(4), 2)):
        if not isinstance(parameter.placement, SplitVocabulary):
            places = [Degrees(tensor=4).place(rank) for rank in (one, other)]
            shapes = [[region_shape(region) for region in parameter.held_regions(place)] for place in places]
            assert shapes[0] == shapes[1]
