"""Matrices that stay 8 bit floats: what is computed, held and kept is what the dequantised checkpoint gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from coordinator.plan.census import take_census
from echelon.errors import ConfigError
from examples.quantize_fp8 import Block, quantise_checkpoint
from models.config import ModelConfig, read_model_config
from models.cutting import check_degrees
from models.expert_balance import rebalance_experts
from models.files import check_model_directory, model_digest
from models.moe import MixtureOfExperts
from models.registry import build_model
from models.tables import held_layers, parameter_bytes, parameter_table
from parallel.context import ParallelContext, solo_context
from parallel.degrees import Degrees
from parallel.float8 import Float8, Way, linear, way_of
from tests.oracle.harness import BLOCK_TOKENS, NUM_BLOCKS, Driver, chunked_steps
from tests.quantised import change_config
from tests.ranks import as_ranks
from tests.shards import KeepingRank, assert_same
from tests.tiny import make_checkpoint
from worker.kv_cache import KVCache
from worker.loader import load_weights

BLOCK = (8, 4)
SIZES: dict[str, Any] = {"hidden_size": 36, "intermediate_size": 48, "vocab_size": 331}
DEEPSEEK: dict[str, Any] = {"moe_intermediate_size": 16, "n_routed_experts": 4, "n_group": 2}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("qwen2", SIZES | {"attention_bias": True}),
    "fused": ("phi3", SIZES),
    "experts": ("qwen3-moe", SIZES | {"moe_intermediate_size": 16, "num_hidden_layers": 1}),
    "deepseek": ("deepseek-v3", SIZES | DEEPSEEK),
}
WAYS = [
    (Degrees(), torch.bfloat16),
    (Degrees(tensor=2), torch.float64),
    (Degrees(tensor=2, expert=2), torch.float64),
]
PROMPTS, LENGTHS = (8, 3), (10, 5)


def quantised(directory: Path, family: str = "llama", block: Block = BLOCK, **sizes: Any) -> Path:
    source = make_checkpoint(directory / "source", family, **SIZES | sizes)
    quantise_checkpoint(source, directory / "float8", block)
    return directory / "float8"


@pytest.fixture(scope="module", params=CASES)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ranks hold of it ends with blocks, and its blocks are no squares."""
    family, sizes = CASES[request.param]
    found = quantised(tmp_path_factory.mktemp(request.param), family, shards=2, **sizes)
    check_model_directory(found, keep_float8=True)
    return found


def logprobs(directory: Path, context: ParallelContext, kept: bool, moves: bool = False) -> tuple[list[Tensor], int]:
    """Of two sequences, in chunks and decoded; and what the rank holds. moves: experts do, and all is done again."""
    config = read_model_config(directory, keep_float8=kept)
    model = build_model(config, context)
    load_weights(model, config, directory, context, lambda loaded_bytes, total_bytes: None)
    cache = KVCache(config, context, NUM_BLOCKS, BLOCK_TOKENS)
    generator = torch.Generator().manual_seed(3)
    sequences = [torch.randint(0, 300, (length,), generator=generator).tolist() for length in LENGTHS]
    driver, steps = Driver(model, cache, context.tensor, sequences), chunked_steps(PROMPTS, LENGTHS)
    with torch.inference_mode():
        if moves:
            driver.logprobs(steps)
            assert any(layer.received for layer in rebalance_experts(model, context).values())
        return driver.logprobs(steps), model.resident_bytes


@pytest.mark.parametrize(("degrees", "dtype"), WAYS, ids=["alone", "tensor-2", "tensor-2-expert-2"])
def test_logits_are_those_of_the_dequantised_checkpoint(directory: Path, degrees: Degrees, dtype: torch.dtype) -> None:
    """Bit for bit where no kernel computes; and a rank holds what the plan says, which is less."""
    config = read_model_config(directory, keep_float8=True)
    if degrees.expert > 1 and config.family.experts is None:
        pytest.skip("it has no experts")
    check_degrees(config, degrees)
    kept = as_ranks(degrees, lambda context: logprobs(directory, context, kept=True), dtype)
    plain = as_ranks(degrees, lambda context: logprobs(directory, context, kept=False), dtype)
    for rank, ((found, held_bytes), (expected, plain_bytes)) in enumerate(zip(kept, plain, strict=True)):
        assert all(torch.equal(*rows) for rows in zip(found, expected, strict=True))
        assert held_bytes == parameter_bytes(config, degrees.place(rank), dtype.itemsize) < plain_bytes


def test_what_ranks_hold_is_what_the_census_counts(directory: Path) -> None:
    config = read_model_config(directory, keep_float8=True)
    census = take_census(config, 2, 2)
    for degrees in (Degrees(), Degrees(tensor=2), Degrees(pipeline=config.num_hidden_layers)):
        for rank in range(degrees.ranks):
            place = degrees.place(rank)
            numbers = census.held(degrees, held_layers(config, place), place.pipeline_rank)
            assert census.bytes_of(numbers) == parameter_bytes(config, place, 2)


def test_routers_and_what_heads_take_apart_are_dequantised(directory: Path) -> None:
    left = {p.name.split(".")[-2] for p in matrices(read_model_config(directory, keep_float8=True)) if p.block is None}
    assert left <= {"gate", "kv_b_proj", "embed_tokens", "lm_head"}


def matrices(config: ModelConfig) -> list[Any]:
    return [p for p in parameter_table(config) if len(p.shape) == 2 and p.name.endswith(".weight")]


def test_answers_stay_when_experts_move(tmp_path: Path) -> None:
    family, sizes = CASES["experts"]
    directory, degrees = quantised(tmp_path, family, **sizes), Degrees(tensor=2, expert=2)
    moved = as_ranks(degrees, lambda context: logprobs(directory, context, kept=True, moves=True))
    still = as_ranks(degrees, lambda context: logprobs(directory, context, kept=True))
    for (found, _), (expected, _) in zip(moved, still, strict=True):
        for rows, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(rows, wanted)


def test_an_expert_moves_with_its_scales(tmp_path: Path) -> None:
    family, sizes = CASES["experts"]
    directory = quantised(tmp_path, family, **sizes)
    config = read_model_config(directory, keep_float8=True)
    context = solo_context(torch.device("cpu"), torch.float64)
    model = build_model(config, context)
    mlp = model.layers[0].mlp
    assert isinstance(mlp, MixtureOfExperts)
    shards = [shard for name, shard in model.shards.items() if ".experts." in name]
    assert sum(shard.nbytes for shard in shards) == sum(part.nbytes for part in mlp.experts.parts())
    assert all(len(part) == 8 for part in mlp.experts.parts())


def test_a_shard_checkpoint_holds_what_the_rank_holds(directory: Path, tmp_path: Path) -> None:
    """And lies apart from that of the same rank with dequantised matrices."""
    place = Degrees(tensor=2).place(1)
    kept = KeepingRank(directory, tmp_path, place, dtype="bfloat16", keep_float8=True)
    plain = KeepingRank(directory, tmp_path, place, dtype="bfloat16")
    source, _ = kept.load()
    assert kept.keep().reason == plain.keep().reason == ""
    assert kept.weights.stat().st_size < plain.weights.stat().st_size
    restored, loaded = kept.load()
    assert loaded.origin == "shard" and plain.load()[1].origin == "shard"
    assert_same(restored, source)


def test_digests_tell_how_it_is_held(directory: Path) -> None:
    assert model_digest(directory) != model_digest(directory, keep_float8=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_product_is_one_with_what_the_floats_stand_for(dtype: torch.dtype) -> None:
    values = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    scales = torch.tensor([[0.5, 3.0], [0.3, 7.0]])
    meant = torch.empty(7, 5, dtype=dtype)
    for row in range(7):
        for column in range(5):
            meant[row, column] = values[row, column].float() * scales[row // 4, column // 3]
    x, bias = torch.randn(3, 5).to(dtype), torch.randn(7).to(dtype)
    matrix = Float8(values, scales, (4, 3))
    assert torch.equal(matrix.meant(dtype), meant)
    assert torch.equal(linear(x, matrix, bias), torch.nn.functional.linear(x, meant, bias))
    stacked = Float8(values[:4].repeat(2, 1), scales[:1].repeat(2, 1), (4, 3)).stacked(2)
    assert torch.equal(stacked.meant(dtype), meant[:4].expand(2, 4, 5))


@pytest.mark.parametrize(
    ("sizes", "degrees", "problem"),
    [
        ({"intermediate_size": 40}, Degrees(tensor=2), r"2 ranks cut .*mlp.*_proj.weight at 20 of its rows"),
        ({"head_dim": 6}, Degrees(), r"1 ranks cut .*self_attn.*_proj.weight at \d+ of its rows"),
        ({"head_dim": 10}, Degrees(tensor=2), r"2 ranks cut .*self_attn.*_proj.weight at (20|10) of its rows"),
    ],
)
def test_a_cut_within_a_block_is_refused(tmp_path: Path, sizes: dict[str, Any], degrees: Degrees, problem: str) -> None:
    directory = quantised(tmp_path, "qwen3", **sizes)
    check_degrees(read_model_config(directory), degrees)
    with pytest.raises(ConfigError, match=problem) as refused:
        check_degrees(read_model_config(directory, keep_float8=True), degrees)
    assert refused.value.field == "float8" and "leave --float8 kept out" in refused.value.message


@pytest.mark.parametrize("family", ["llama", "phi3", "deepseek-v3"])
def test_what_is_stacked_but_ends_within_a_block_is_dequantised_alone(tmp_path: Path, family: str) -> None:
    """As the first layer's MLP of DeepSeek-V2-Lite does. In one matrix or in two."""
    directory = quantised(tmp_path, family, intermediate_size=44, **({} if family != "deepseek-v3" else DEEPSEEK))
    config, context = (
        read_model_config(directory, keep_float8=True),
        solo_context(torch.device("cpu"), torch.float64, 1),
    )
    check_degrees(config, Degrees())
    left = {p.name.split(".")[-2] for p in matrices(config) if p.block is None and ".mlp." in p.name}
    assert left - {"gate"} == ({"gate_up_proj"} if family == "phi3" else {"gate_proj", "up_proj"})
    found, held_bytes = logprobs(directory, context, kept=True)
    expected, plain_bytes = logprobs(directory, context, kept=False)
    assert all(torch.equal(*rows) for rows in zip(found, expected, strict=True))
    assert held_bytes == parameter_bytes(config, context.place, 8) < plain_bytes


def test_an_expert_is_held_alike_in_all_its_parts(tmp_path: Path) -> None:
    directory = quantised(tmp_path, "deepseek-v3", **DEEPSEEK | {"moe_intermediate_size": 20})
    config = read_model_config(directory, keep_float8=True)
    assert {p.block for p in matrices(config) if p.expert is not None} == {None}
    assert {p.block for p in matrices(config) if "self_attn.o_proj" in p.name} == {BLOCK}


def test_columns_are_cut_between_blocks_too(tmp_path: Path) -> None:
    directory = quantised(tmp_path, "qwen3", (4, 16), intermediate_size=40)
    with pytest.raises(ConfigError, match=r"down_proj.weight at 20 of its columns, within a block of 16"):
        check_degrees(read_model_config(directory, keep_float8=True), Degrees(tensor=2))
    check_degrees(read_model_config(directory, keep_float8=True), Degrees())  # the last block may be smaller


@pytest.mark.parametrize("plain", [True, False])
def test_what_has_no_scales_of_blocks_is_refused(tmp_path: Path, plain: bool) -> None:
    directory = make_checkpoint(tmp_path) if plain else change_config(quantised(tmp_path), weight_block_size=None)
    with pytest.raises(ConfigError, match="leave --float8 kept out"):
        check_model_directory(directory, keep_float8=True)


def test_a_matrix_that_is_stored_otherwise_is_refused(tmp_path: Path) -> None:
    directory = quantised(tmp_path)
    weights, name = load_file(directory / "model.safetensors"), "model.layers.1.mlp.up_proj.weight"
    weights[name] = weights[name].float()
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    check_model_directory(directory)
    with pytest.raises(ConfigError, match=rf"{name} is stored as F32, and cannot stay F8_E4M3") as refused:
        check_model_directory(directory, keep_float8=True)
    assert refused.value.field == "float8"


def test_compressed_tensors_name_scales_otherwise(tmp_path: Path) -> None:
    directory = quantised(tmp_path)
    weights = load_file(directory / "model.safetensors")
    renamed = {name.replace("weight_scale_inv", "weight_scale"): tensor for name, tensor in weights.items()}
    save_file(renamed, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    group = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": list(BLOCK), "dynamic": False}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": group}},
    }
    (directory / "config.json").write_text(json.dumps(config))
    check_model_directory(directory, keep_float8=True)
    context = solo_context(torch.device("cpu"), torch.float64)
    found, expected = (logprobs(directory, context, kept)[0] for kept in (True, False))
    assert all(torch.equal(*rows) for rows in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("rows", "neurons", "quantises", "way"),
    [
        (16, 24576, True, Way.WEIGHTS_ALONE),
        (17, 6144, True, Way.ROWS_TOO),
        (17, 6016, True, Way.WEIGHTS_ALONE),
        (64, 6144, False, Way.WEIGHTS_ALONE),
        (65, 128, True, Way.ROWS_TOO),
        (65, 24576, False, Way.DEQUANTISED),
    ],
)
def test_the_way_that_was_measured_to_be_the_fastest(rows: int, neurons: int, quantises: bool, way: Way) -> None:
    assert way_of(rows, neurons, quantises) is way
