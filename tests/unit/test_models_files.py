"""check_model_directory: what is missing, cut short or of the wrong shape is named, and whole checkpoints pass."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from echelon.errors import ConfigError
from models.files import check_model_directory, checkpoint_index
from tests.tiny import FAMILIES, make_checkpoint

FIRST_SHARD = "model-00001-of-00003.safetensors"


def refusal(directory: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        check_model_directory(directory)
    return str(caught.value)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_checkpoint_passes(tmp_path: Path, family: str, shards: int) -> None:
    check_model_directory(make_checkpoint(tmp_path, family, shards=shards))


def test_the_index_finds_each_tensor_in_its_shard(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, shards=3)
    index = checkpoint_index(tmp_path)
    for name, stored in index.items():
        tensor = load_file(stored.file)[name]
        assert stored.shape == tensor.shape and stored.dtype == "F32"
    assert len({stored.file for stored in index.values()}) == 3


def test_a_missing_directory(tmp_path: Path) -> None:
    assert f"{tmp_path / 'nowhere'} does not exist" in refusal(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", [None, '{"cut":'])
def test_a_missing_or_broken_json_file(tmp_path: Path, name: str, content: str | None) -> None:
    make_checkpoint(tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_text(content)
    assert str(tmp_path / name) in refusal(tmp_path)


def test_no_weights(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert "no weights, expected model.safetensors or model.safetensors.index.json" in refusal(tmp_path)


def test_a_shard_that_the_index_names_is_missing(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, shards=3)
    (tmp_path / FIRST_SHARD).unlink()
    message = refusal(tmp_path)
    assert FIRST_SHARD in message and "no such file" in message


@pytest.mark.parametrize("missing_bytes", [1, 100_000])
def test_truncated_weights(tmp_path: Path, missing_bytes: int) -> None:
    path = make_checkpoint(tmp_path) / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-missing_bytes])
    message = refusal(tmp_path)
    assert f"{path}: truncated, expected {len(whole)} bytes, found {len(whole) - missing_bytes}" in message


def test_weights_cut_within_the_header(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path) / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    header_end = 8 + int.from_bytes(whole[:8], "little")
    assert f"truncated, expected {header_end} bytes, found 100" in refusal(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 not tensors at all", b"\x02\0\0\0\0\0\0\0[]", b"\x02\0\0\0\0\0\0\0{!"]
)
def test_files_of_another_format(tmp_path: Path, content: bytes) -> None:
    path = make_checkpoint(tmp_path) / "model.safetensors"
    path.write_bytes(content)
    assert str(path) in refusal(tmp_path)


def test_more_bytes_than_the_header_describes(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path) / "model.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + b"\0")
    assert f"{size + 1} bytes, but its header describes {size}" in refusal(tmp_path)


def test_a_tensor_of_the_table_is_missing(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path) / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path)
    assert "no file holds model.layers.1.mlp.up_proj.weight, expected with shape (96, 64); the weights are" in refusal(
        tmp_path
    )


def test_a_tensor_of_another_shape(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path) / "model.safetensors"
    save_file(load_file(path) | {"model.norm.weight": np.ones(63, dtype=np.float32)}, path)
    assert "model.norm.weight has shape (63,), expected (64,)" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("family", "up", "key", "experts"),
    [
        ("deepseek-v3", "model.layers.1.mlp.experts.{}.up_proj.weight", "n_routed_experts", 8),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.{}.w3.weight", "num_local_experts", 4),
    ],
)
def test_an_expert_that_the_config_does_not_name(tmp_path: Path, family: str, up: str, key: str, experts: int) -> None:
    path = make_checkpoint(tmp_path, family) / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {up.format(experts): tensors[up.format(experts - 1)]}, path)
    assert f"holds {up.format(experts)}, but {key}={experts} in config.json; the weights are" in refusal(tmp_path)


def test_a_tensor_of_an_unsupported_dtype(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path) / "model.safetensors"
    save_file(load_file(path) | {"model.norm.weight": np.ones(64, dtype=np.int8)}, path)
    assert "model.norm.weight is stored as I8; supported: F64, F32, BF16, F16, F8_E4M3; convert" in refusal(tmp_path)


def test_an_index_that_lies(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, shards=3)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = FIRST_SHARD
    path.write_text(json.dumps(index))
    assert f"{tmp_path / FIRST_SHARD}: the tensor model.norm.weight is missing" in refusal(tmp_path)
