"""What each rank of each layout reads of a checkpoint, counted by the kernel, and what it then holds."""

from __future__ import annotations

import gc
import math
from itertools import product, repeat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from echelon.internal.v1 import control_pb2
from models.config import read_model_config
from models.files import check_model_directory, checkpoint_index
from models.parameter import Parameter
from models.registry import build_model
from models.tables import held_parameters
from parallel.context import ParallelContext
from parallel.degrees import Degrees, Place
from parallel.sharding import region_shape
from tests.tiny import make_checkpoint
from worker import weight_file
from worker.loader import load_weights
from worker.weights import bring_weights

FLOAT32_BYTES = 4
LAYOUTS = [
    Degrees(pipeline=pipeline, data=data, tensor=tensor, expert=expert)
    for pipeline, data, tensor, expert in product((1, 2), (1, 2), (1, 2, 4), (1, 2, 4))
    if data * tensor % expert == 0
]
WIDER: dict[str, object] = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 2049}
MODELS = {
    "llama": WIDER,
    "gemma3": WIDER,  # a tied head
    "phi3": WIDER,  # stacked matrices
    "mixtral": WIDER,
    "qwen3-moe": WIDER | {"moe_intermediate_size": 64},
    "deepseek-v3": WIDER | {"moe_intermediate_size": 64},
}
QUICK = {"gemma3", "deepseek-v3"}  # between them: tied and untied heads, experts, latent attention


def bytes_read() -> int:
    """By this process with a call of the kernel; columns, which are copied out of a mapping, are not among them."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("rchar:"):
            return int(line.split()[1])
    raise OSError("/proc/self/io has no rchar")


def run_bytes(parameter: Parameter, place: Place) -> int:
    """Those of a parameter that the rank takes some columns of."""
    regions = parameter.held_regions(place)
    split = any(region_shape(region)[1:] != parameter.shape[1:] for region in regions)
    return FLOAT32_BYTES * sum(math.prod(region_shape(region)) for region in regions) if split else 0


def load(directory: Path, degrees: Degrees, rank: int, dtype: torch.dtype) -> tuple[dict[str, Tensor], int]:
    """A rank's shards, and the bytes that the loader says it read."""
    context = ParallelContext(epoch=1, device=torch.device("cpu"), dtype=dtype, place=degrees.place(rank))
    config = read_model_config(directory)
    model = build_model(config, context)
    for shard in model.shards.values():
        shard.fill_(torch.nan)
    told: list[tuple[int, int]] = []
    read = load_weights(model, config, directory, context, lambda *progress: told.append(progress))
    assert told == sorted(told) and told[-1] == (read, read) and {total for _, total in told} == {read}
    return dict(model.shards), read


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=() if family in QUICK else pytest.mark.long) for family in MODELS]
)
def test_a_rank_reads_its_share_and_nothing_else(tmp_path: Path, family: str) -> None:
    """The share is what stays resident, less the vocabulary's padding; beside it only headers are read."""
    directory = make_checkpoint(tmp_path, family, seed=0, shards=2, **MODELS[family])
    config = read_model_config(directory)
    whole = {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}
    before = bytes_read()
    checkpoint_index(directory)
    headers = bytes_read() - before
    for degrees in LAYOUTS:
        if degrees.expert > 1 and config.family.experts is None:
            continue
        for rank in range(degrees.replica_ranks):
            place = degrees.place(rank)
            before = bytes_read()
            shards, read = load(directory, degrees, rank, torch.float32)
            really_read = bytes_read() - before
            regions = [region for each in held_parameters(config, place) for region in each.held_regions(place)]
            assert read == FLOAT32_BYTES * sum(math.prod(region_shape(region)) for region in regions)
            columns = sum(map(run_bytes, held_parameters(config, place), repeat(place)))
            limit = read - columns + headers + 8192  # config.json, /proc
            assert read - columns <= really_read <= limit, f"rank {rank} of {degrees}"
            for parameter in held_parameters(config, place):
                held = torch.cat([whole[parameter.name][region] for region in parameter.held_regions(place)])
                found = shards[parameter.name]
                assert torch.equal(found[: len(held)], held), f"{parameter.name} on rank {rank} of {degrees}"
                assert not found[len(held) :].any()  # the vocabulary's padding, and no NaN
    del whole
    gc.collect()


def test_no_page_of_a_file_stays_resident(tmp_path: Path) -> None:
    """Looked at after each tensor, while the file is mapped."""
    directory = make_checkpoint(tmp_path, "llama", seed=0, shards=1, **WIDER)
    seen: list[int] = []

    def look(loaded_bytes: int, total_bytes: int) -> None:
        lines = iter(Path("/proc/self/smaps").read_text().splitlines())
        for line in lines:
            if line.endswith("model.safetensors"):
                seen.append(int(next(line for line in lines if line.startswith("Rss:")).split()[1]))

    config, degrees = read_model_config(directory), Degrees(tensor=2)
    context = ParallelContext(epoch=1, device=torch.device("cpu"), dtype=torch.float32, place=degrees.place(1))
    load_weights(build_model(config, context), config, directory, context, look)
    assert len(seen) == len(held_parameters(config, degrees.place(1))) and not any(seen)


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_numbers_are_converted_from_what_the_file_holds(tmp_path: Path, stored: torch.dtype) -> None:
    directory = make_checkpoint(tmp_path)
    file, name = directory / "model.safetensors", "model.layers.1.mlp.down_proj.weight"
    whole = {key: tensor.to(stored) for key, tensor in load_file(file).items()}
    save_file(whole, file)
    for rank in range(2):
        shards, read = load(directory, Degrees(tensor=2), rank, torch.float32)
        assert torch.equal(shards[name], whole[name][:, rank * 48 : (rank + 1) * 48].float())
        norms = sum(tensor.nbytes for key, tensor in whole.items() if tensor.dim() == 1)
        assert read == (sum(tensor.nbytes for tensor in whole.values()) + norms) // 2


def test_tensors_larger_than_the_buffer_come_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make_checkpoint(tmp_path)
    expected, _ = load(directory, Degrees(tensor=2), 1, torch.float32)
    monkeypatch.setattr(weight_file, "BUFFER_BYTES", 1000)  # three rows of 64 numbers, two of 96, and a bit
    found, _ = load(directory, Degrees(tensor=2), 1, torch.float32)
    assert all(torch.equal(found[name], shard) for name, shard in expected.items()) and found.keys() == expected.keys()


def test_a_file_that_was_cut_meanwhile_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make_checkpoint(tmp_path)
    index = checkpoint_index(directory)
    monkeypatch.setattr("worker.loader.checkpoint_index", lambda directory: index)
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(OSError, match=rf"{file} ends at byte \d+, though it was longer when it was checked"):
        load(directory, Degrees(), 0, torch.float32)


@pytest.mark.parametrize(("layers", "left"), [(1, "2 tensors of 1 layers for multi-token prediction"), (0, "")])
def test_layers_for_prediction_stay_in_the_files(tmp_path: Path, layers: int, left: str) -> None:
    make_checkpoint(tmp_path, "deepseek-v3", num_nextn_predict_layers=layers)
    config, file = read_model_config(tmp_path), tmp_path / "model.safetensors"
    weights = load_file(file)
    behind = {f"model.layers.2.{part}.weight": torch.ones(3, 3) for part in ("eh_proj", "self_attn.kv_b_proj")}
    save_file(weights | behind, file, metadata={"format": "pt"})
    check_model_directory(tmp_path)
    context = ParallelContext(epoch=1, device=torch.device("cpu"), dtype=torch.float32)
    model = build_model(config, context)
    command = control_pb2.FormEpoch(model_path=str(tmp_path), dtype="float32")
    told = bring_weights(model, config, command, context, lambda loaded_bytes, total_bytes: None).told()
    assert (told.origin, told.left) == ("source", left)
    assert told.bytes == sum(tensor.nbytes for tensor in weights.values())
    assert model.shards.keys() == weights.keys()
