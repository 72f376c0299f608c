"""Checkpoints of 8 bit floats: what each rank makes of its share, and what is refused with the key and the remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from echelon.errors import ConfigError
from examples.quantize_fp8 import Block, quantise, quantise_checkpoint
from models.config import read_model_config
from models.files import check_model_directory, checkpoint_index
from models.quantization import covering
from models.registry import build_model
from parallel.context import ParallelContext
from parallel.degrees import Degrees, Place
from tests.quantised import change_config, make_quantised
from tests.shards import KeepingRank, assert_same
from tests.tiny import make_checkpoint
from worker import parts, weight_file
from worker.loader import load_weights

SIZES: dict[str, Any] = {
    "hidden_size": 36,
    "intermediate_size": 42,
    "num_hidden_layers": 1,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "head_dim": 10,
    "vocab_size": 331,
}
MOE = SIZES | {"num_experts": 6, "moe_intermediate_size": 18}
DEEPSEEK = SIZES | {"head_dim": 6, "first_k_dense_replace": 0}
CASES: dict[str, tuple[str, dict[str, Any], Block]] = {
    "blocks": ("qwen3-moe", MOE, (16, 11)),
    "one-scale": ("qwen3-moe", MOE, None),
    "deepseek": ("deepseek-v3", DEEPSEEK, (16, 11)),
}


def load(directory: Path, place: Place, dtype: torch.dtype) -> tuple[dict[str, Tensor], int]:
    """What a rank holds, and the bytes that it read for it."""
    context = ParallelContext(epoch=1, device=torch.device("cpu"), dtype=dtype, place=place)
    config = read_model_config(directory)
    model = build_model(config, context)
    for shard in model.shards.values():
        shard.fill_(torch.nan)
    read = load_weights(model, config, directory, context, lambda loaded_bytes, total_bytes: None)
    return dict(model.shards), read


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Of 8 bit floats in two files, and plain; blocks that no rank's share begins or ends with."""
    family, sizes, block = CASES[request.param]
    return make_quantised(tmp_path_factory.mktemp(request.param), family, block, shards=2, **sizes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "degrees",
    [Degrees(), Degrees(tensor=2), Degrees(tensor=3), Degrees(tensor=2, expert=2), Degrees(data=2, tensor=3, expert=2)],
    ids=lambda d: f"data-{d.data}-tensor-{d.tensor}-expert-{d.expert}",
)
def test_ranks_hold_what_the_floats_stand_for(pair: tuple[Path, Path], degrees: Degrees, dtype: torch.dtype) -> None:
    """Wherever the cut goes through a block; and they read little more than a byte a number."""
    float8, plain = pair
    check_model_directory(float8)
    for rank in range(degrees.ranks):
        found, read = load(float8, degrees.place(rank), dtype)
        expected, plain_read = load(plain, degrees.place(rank), dtype)
        assert_same(found, expected)
        assert read < plain_read


def test_large_matrices_are_multiplied_some_rows_at_a_time(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    float8, plain = pair
    monkeypatch.setattr(parts, "MOST_SCALED_NUMBERS", 5 * 36)
    place = Degrees(tensor=3).place(1)
    assert_same(load(float8, place, torch.float32)[0], load(plain, place, torch.float32)[0])


def test_scales_that_fill_the_buffer_more_than_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has room for a row of the widest tensor, the head: 36 numbers of four bytes; queries have 15 x 4 scales."""
    float8, plain = make_quantised(tmp_path, "llama", (4, 11), **SIZES)
    expected = load(plain, Degrees().place(0), torch.float32)[0]
    monkeypatch.setattr(weight_file, "BUFFER_BYTES", 36 * 4)
    assert_same(load(float8, Degrees().place(0), torch.float32)[0], expected)


def test_a_rank_without_a_word_of_the_vocabulary_needs_no_scales(tmp_path: Path) -> None:
    """331 words are 16 on each of 20 ranks, 11 on the next, and none on the last of 22."""
    cut = {"num_attention_heads": 22, "num_key_value_heads": 22, "intermediate_size": 44}
    directory = make_quantised(tmp_path, "llama", (16, 16), **SIZES | cut)[0]
    weights = load_file(directory / "model.safetensors")
    values, scales = quantise(weights["lm_head.weight"], (16, 16))
    weights |= {"lm_head.weight": values.contiguous(), "lm_head.weight_scale_inv": scales.contiguous()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    check_model_directory(directory)
    before, last = (load(directory, Degrees(tensor=22).place(rank), torch.float32)[0] for rank in (20, 21))
    assert before["lm_head.weight"].any(-1).sum() == 11
    assert last["lm_head.weight"].shape == (16, 36) and not last["lm_head.weight"].any()


def test_a_shard_checkpoint_holds_what_the_rank_holds(pair: tuple[Path, Path], tmp_path: Path) -> None:
    float8, plain = pair
    rank = KeepingRank(float8, tmp_path, Degrees(tensor=3).place(2), dtype="bfloat16")
    assert rank.keep().reason == ""
    restored, loaded = rank.load()
    assert loaded.origin == "shard"
    assert_same(restored, load(plain, rank.place, torch.bfloat16)[0])


def test_what_is_left_as_it_is_is_said(pair: tuple[Path, Path]) -> None:
    """Other readers go by config.json alone."""
    stored = {name for name, tensor in checkpoint_index(pair[0]).items() if tensor.dtype != "F8_E4M3"}
    said = json.loads((pair[0] / "config.json").read_text())["quantization_config"]
    plain = said["ignore"] if "ignore" in said else said["modules_to_not_convert"]
    gates = {name.removesuffix(".weight") for name in stored if name.endswith("mlp.gate.weight")}
    assert gates and set(plain) == {"lm_head", *gates}


def test_layers_for_prediction_are_left_as_they_are_and_named(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", "deepseek-v3", **DEEPSEEK, num_nextn_predict_layers=1)
    weights = load_file(source / "model.safetensors")
    behind = {"model.layers.1.eh_proj.weight": torch.ones(3, 3), "model.layers.1.enorm.weight": torch.ones(3)}
    save_file(weights | behind, source / "model.safetensors", metadata={"format": "pt"})
    quantise_checkpoint(source, tmp_path / "float8", (16, 11))
    said = json.loads((tmp_path / "float8" / "config.json").read_text())["quantization_config"]
    assert said["modules_to_not_convert"] == ["lm_head", "model.layers.0.mlp.gate", "model.layers.1.eh_proj"]
    assert checkpoint_index(tmp_path / "float8")["model.layers.1.eh_proj.weight"].dtype == "F32"


def test_a_checkpoint_is_not_written_over_another(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    with pytest.raises(SystemExit, match="is not empty; give a new folder"):
        quantise_checkpoint(source, source, (16, 11))
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 17), st.integers(1, 17), st.integers(0, 99))
def test_quantising_keeps_three_bits_of_each_number(rows: int, columns: int, high: int, wide: int, seed: int) -> None:
    """Of e4m3's mantissa: an error of a sixteenth, or of the smallest number that a block can tell from none."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weight[: rows // 2] *= 1000
    values, scales = quantise(weight, (high, wide))
    for row in range(rows):
        for column in range(columns):
            scale = float(scales[row // high, column // wide])
            found, exact = float(values[row, column]) * scale, float(weight[row, column])
            assert abs(found - exact) <= max(abs(exact) / 16, scale * 2**-9) * 1.001


def test_a_block_of_zeros_stays_zero() -> None:
    values, scales = quantise(torch.zeros(4, 4), (2, 2))
    assert not values.float().any() and (scales == 1).all()


@given(st.data())
def test_scales_cover_a_region_and_no_more(data: st.DataObject) -> None:
    start = data.draw(st.integers(0, 500))
    stop, length = data.draw(st.integers(start, 600)), data.draw(st.integers(1, 130))
    covered = covering((slice(start, stop), slice(0, 1)), (length, 7))
    first, last = covered.region[0].start, covered.region[0].stop
    assert covered.first_row == first * length and covered.first_column == 0
    wanted = {number // length for number in range(start, stop)}
    assert wanted == set(range(first, last))


QUERIES = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return make_quantised(tmp_path, "llama", (16, 16), **SIZES)[0]


def rewrite(directory: Path, **changed: Tensor | None) -> None:
    """Other tensors, by the end of their names behind that of the queries; None takes one away."""
    weights = load_file(directory / "model.safetensors")
    weights |= {QUERIES + name: tensor for name, tensor in changed.items() if tensor is not None}
    left = {name: tensor for name, tensor in weights.items() if changed.get(name.removeprefix(QUERIES), 0) is not None}
    save_file(left, directory / "model.safetensors", metadata={"format": "pt"})


def refusal(directory: Path) -> str:
    with pytest.raises(ConfigError) as refused:
        check_model_directory(directory)
    return str(refused.value)


@pytest.mark.parametrize(
    ("scales", "said"),
    [
        (None, [QUERIES, "no file holds its scales", "q_proj.weight_scale_inv", "download", "an unquantised one"]),
        (torch.ones(3, 4), ["weight_scale_inv has shape (3, 4), expected (4, 3)", "blocks of 16 x 16 of (60, 36)"]),
        (torch.ones(4, 3).double(), ["weight_scale_inv is stored as F64", "F32, BF16, F16"]),
    ],
)
def test_scales_that_cannot_be_used(small: Path, scales: Tensor | None, said: list[str]) -> None:
    rewrite(small, _scale_inv=scales)
    assert all(part in refusal(small) for part in said), refusal(small)


def test_scales_of_two_bytes_are_good_too(small: Path) -> None:
    rewrite(small, _scale_inv=torch.ones(4, 3).bfloat16())
    check_model_directory(small)
    stored = load_file(small / "model.safetensors")[QUERIES]
    found, _ = load(small, Degrees().place(0), torch.float32)
    assert torch.equal(found[QUERIES], stored.float())


@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv"])
def test_a_scale_a_tensor_by_both_of_its_names(small: Path, name: str) -> None:
    """vLLM's and transformers'."""
    change_config(small, weight_block_size=None)
    weights = load_file(small / "model.safetensors")
    for matrix in [matrix for matrix in weights if matrix.endswith("_scale_inv")]:
        del weights[matrix]
        weights[matrix.removesuffix("weight_scale_inv") + name] = torch.tensor(3.0)
    save_file(weights, small / "model.safetensors", metadata={"format": "pt"})
    check_model_directory(small)
    found, _ = load(small, Degrees(tensor=2).place(1), torch.float32)
    assert torch.equal(found[QUERIES], weights[QUERIES][30:].float() * 3)
    rewrite(small, **{f"_{name.removeprefix('weight_')}": None})
    assert "q_proj.weight_scale_inv or model.layers.0.self_attn.q_proj.weight_scale; download" in refusal(small)


def test_floats_of_eight_bits_without_a_word_about_them(small: Path) -> None:
    values = json.loads((small / "config.json").read_text())
    del values["quantization_config"]
    (small / "config.json").write_text(json.dumps(values))
    assert "stored as F8_E4M3, but config.json has no quantization_config" in refusal(small)


def test_other_floats_of_eight_bits(small: Path) -> None:
    rewrite(small, **{"": load_file(small / "model.safetensors")[QUERIES].to(torch.float8_e5m2)})
    assert "stored as F8_E5M2; supported: F64, F32, BF16, F16, F8_E4M3" in refusal(small)


def test_what_is_no_matrix(small: Path) -> None:
    weights = load_file(small / "model.safetensors")
    norm = weights["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(weights | {"model.norm.weight": norm}, small / "model.safetensors", metadata={"format": "pt"})
    assert "model.norm.weight of shape (36,) is stored as F8_E4M3" in refusal(small)


WEIGHTS = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}


def compressed(**weights: object) -> dict[str, object]:
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": WEIGHTS | weights}}}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"quant_method": "gptq"}, ["quant_method='gptq'", "supported: fp8", "compressed-tensors", "unquantised"]),
        ({"fmt": "e5m2"}, ["fmt='e5m2'", "supported: fp8 with fmt e4m3"]),
        ({"weight_block_size": [128]}, ["weight_block_size", "[128]"]),
        ({"weight_block_size": [0, 128]}, ["weight_block_size", "[0, 128]"]),
        (compressed(num_bits=4), ["weights.num_bits=4"]),
        (compressed(type="int"), ["weights.type='int'"]),
        (compressed(symmetric=False), ["weights.symmetric=False"]),
        (compressed(strategy="token"), ["weights.strategy='token'", "tensor, channel, block"]),
        (compressed(strategy="block"), ["block_structure", "None"]),
        (compressed() | {"quantization_status": "frozen"}, ["quantization_status='frozen'"]),
        (compressed() | {"config_groups": {}}, ["config_groups has no group"]),
        (
            compressed() | {"config_groups": {"a": {"weights": WEIGHTS}, "b": {"weights": {"strategy": "channel"}}}},
            ["config_groups", "2 ways"],
        ),
    ],
)
def test_quantisations_that_cannot_be_read(small: Path, keys: dict[str, object], said: list[str]) -> None:
    change_config(small, **keys)
    assert all(part in refusal(small) for part in said), refusal(small)
    assert read_model_config(small, planning=True).quantization is None  # its bytes are planned all the same


def test_a_scale_a_row(small: Path) -> None:
    """compressed-tensors' channels, [rows, 1]."""
    change_config(small, **compressed(strategy="channel"))
    weights = load_file(small / "model.safetensors")
    for name in [name for name in weights if name.endswith("_scale_inv")]:
        rows = weights[name.removesuffix("_scale_inv")].shape[0]
        weights[name.removesuffix("_inv")] = torch.arange(1, rows + 1).float().unsqueeze(-1)
        del weights[name]
    save_file(weights, small / "model.safetensors", metadata={"format": "pt"})
    check_model_directory(small)
    assert checkpoint_index(small)[f"{QUERIES}_scale"].shape == (60, 1)
    found, _ = load(small, Degrees(tensor=3).place(1), torch.float32)
    assert torch.equal(found[QUERIES], weights[QUERIES][20:40].float() * torch.arange(21.0, 41.0).unsqueeze(-1))
