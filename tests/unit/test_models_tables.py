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
from models.tables import check_degrees, kv_bytes_per_block, parameter_bytes, parameter_table
from parallel.sharding import Split, SplitVocabulary, held_region, held_shape, region_shape
from tests.tiny import make_checkpoint


@pytest.fixture
def config(tmp_path: Path) -> ModelConfig:
    return read_model_config(make_checkpoint(tmp_path, vocab_size=331, num_key_value_heads=2, num_attention_heads=4))


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_regions_cover_every_number(config: ModelConfig, tensor: int) -> None:
    for parameter in parameter_table(config):
        reads = np.zeros(parameter.shape, dtype=int)
        for rank in range(tensor):
            region = parameter.held_region(rank, tensor)
            reads[region] += 1
            padded = isinstance(parameter.placement, SplitVocabulary)
            assert region_shape(region) == parameter.held_shape(tensor) or padded
        if isinstance(parameter.placement, Split) and "_proj" in parameter.name:
            copies = tensor // 2 if ("k_proj" in parameter.name or "v_proj" in parameter.name) and tensor > 2 else 1
            assert (reads == copies).all(), parameter.name
        else:
            assert (reads >= 1).all(), parameter.name


def test_key_value_heads_go_where_their_queries_are() -> None:
    queries, heads, tensor = 8, 2, 4
    for rank in range(tensor):
        query_rows = held_region((queries,), Split(0, queries), rank, tensor)[0]
        head_rows = held_region((heads,), Split(0, heads), rank, tensor)[0]
        wanted = {query * heads // queries for query in range(query_rows.start, query_rows.stop)}
        assert wanted == set(range(head_rows.start, head_rows.stop))


def test_a_vocabulary_is_padded_at_its_end() -> None:
    shape, size = (5, 3), 4
    regions = [held_region(shape, SplitVocabulary(), rank, size) for rank in range(size)]
    assert [(rows.start, rows.stop) for rows, _ in regions] == [(0, 2), (2, 4), (4, 5), (5, 5)]
    assert held_shape(shape, SplitVocabulary(), size) == (2, 3)


def test_bytes_by_hand(config: ModelConfig) -> None:
    hidden, intermediate, head_dim = 64, 96, 16
    attention = hidden * head_dim * (2 + 1 + 1) + 2 * head_dim * hidden  # 2 query heads, 1 key, 1 value; output
    layer = attention + 3 * hidden * intermediate // 2 + 2 * hidden
    vocabulary = 2 * 166 * hidden  # 331 rows over 2 ranks are 166 each, in the embedding and in the head
    assert parameter_bytes(config, 1, 2, 4) == 4 * (2 * layer + hidden + vocabulary)
    assert kv_bytes_per_block(config, 2, 16, 4) == 2 * 2 * 16 * 1 * head_dim * 4
    assert kv_bytes_per_block(config, 4, 16, 4) == kv_bytes_per_block(config, 2, 16, 4)


def test_a_tied_head_is_counted_once(tmp_path: Path) -> None:
    untied = read_model_config(make_checkpoint(tmp_path / "untied"))
    tied = read_model_config(make_checkpoint(tmp_path / "tied", tie_word_embeddings=True))
    assert parameter_bytes(untied, 0, 1, 2) - parameter_bytes(tied, 0, 1, 2) == 2 * 320 * 64


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_table_lists_the_checkpoint(tmp_path: Path, family: str) -> None:
    config = read_model_config(make_checkpoint(tmp_path, family, attention_bias=True))
    names = [parameter.name for parameter in parameter_table(config)]
    assert len(names) == len(set(names))
    biases_and_norms = {"llama": 4, "mistral": 0, "qwen2": 3, "qwen3": 4 + 2}
    per_layer = 9 + biases_and_norms[family]
    assert len(names) == 3 + 2 * per_layer
    assert {p.layer for p in parameter_table(config)} == {None, 0, 1}
    assert all(math.prod(p.shape) > 0 for p in parameter_table(config))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (3, "tensor=3 does not divide num_attention_heads=4; tensor may be 1, 2, 4"),
        (8, "tensor=8 does not divide num_attention_heads=4; tensor may be 1, 2, 4"),
        (0, "tensor=0 is not a number of ranks; tensor may be 1, 2, 4"),
    ],
)
def test_degrees_that_do_not_divide(config: ModelConfig, tensor: int, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_degrees(config, tensor)
    assert str(caught.value) == message


def test_degrees_that_heads_or_neurons_forbid(tmp_path: Path) -> None:
    odd = read_model_config(
        make_checkpoint(tmp_path / "odd", num_attention_heads=6, num_key_value_heads=3, hidden_size=60)
    )
    with pytest.raises(ConfigError, match="neither divides num_key_value_heads=3 nor is a multiple"):
        check_degrees(odd, 2)
    narrow = read_model_config(make_checkpoint(tmp_path / "narrow", intermediate_size=98))
    with pytest.raises(ConfigError, match="tensor=4 does not divide intermediate_size=98; tensor may be 1, 2"):
        check_degrees(narrow, 4)


def test_allowed_degrees_are_accepted(config: ModelConfig) -> None:
    for tensor in (1, 2, 4):
        check_degrees(config, tensor)


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
            assert region_shape(parameter.held_region(one, 4)) == region_shape(parameter.held_region(other, 4))
