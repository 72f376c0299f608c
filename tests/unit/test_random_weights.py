"""Random weights: the same model in every layout, of the scale that trained ones have, made of config.json alone."""

from __future__ import annotations

import json
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from echelon.internal.v1 import control_pb2
from models.config import read_model_config
from models.registry import build_model
from models.tables import parameter_table
from parallel.context import ParallelContext, solo_context
from parallel.degrees import Degrees
from tests.tiny import make_checkpoint
from worker import random_weights
from worker.loader import load_weights
from worker.random_weights import STANDARD_DEVIATION, elements, fill_randomly, nearly_normal
from worker.weights import bring_weights

CPU = torch.device("cpu")
LAYOUTS = [
    Degrees(pipeline=pipeline, data=data, tensor=tensor, expert=expert)
    for pipeline, data, tensor, expert in product((1, 2), (1, 2), (1, 2), (1, 2))
    if data * tensor % expert == 0
]
ODD_VOCABULARY = 331  # padded on two ranks


@pytest.fixture(params=["gemma3", "phi3", "qwen2", "deepseek-v3"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A config.json by itself: a tied head, norms from one, stacked matrices, biases, experts, latent attention."""
    made = make_checkpoint(tmp_path / "whole", request.param, vocab_size=ODD_VOCABULARY)
    (tmp_path / "config").mkdir()
    shutil.copy(made / "config.json", tmp_path / "config")
    return tmp_path / "config"


def filled(directory: Path, context: ParallelContext) -> dict[str, Tensor]:
    """A rank's shards."""
    config = read_model_config(directory)
    model = build_model(config, context)
    for shard in model.shards.values():
        shard.fill_(torch.nan)
    told: list[tuple[int, int]] = []
    made = fill_randomly(model, config, context, lambda *progress: told.append(progress))
    assert told == sorted(told) and told[-1] == (made, made)
    return {name: shard.clone() for name, shard in model.shards.items()}


def test_every_layout_has_the_model_of_one_checkpoint(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process's numbers, saved, and read back by the ranks of each layout as any checkpoint is."""
    config = read_model_config(directory)
    whole = filled(directory, solo_context(CPU, torch.float64))
    saved = {parameter.name: whole[parameter.name].contiguous() for parameter in parameter_table(config)}
    save_file(saved, tmp_path / "model.safetensors")
    monkeypatch.setattr(random_weights, "ELEMENTS_AT_ONCE", 300)  # several parts of most tensors
    for degrees in LAYOUTS:
        for rank in range(degrees.replica_ranks):
            context = ParallelContext(epoch=1, device=CPU, dtype=torch.float64, place=degrees.place(rank))
            model = build_model(config, context)
            load_weights(model, config, tmp_path, context, lambda *_: None)
            made = filled(directory, context)
            assert made.keys() == model.shards.keys()
            assert all(made[name].equal(shard) for name, shard in model.shards.items()), f"rank {rank} of {degrees}"


def test_norms_are_ones_and_all_else_is_small(directory: Path) -> None:
    config = read_model_config(directory)
    norm = 0.0 if config.family.norms_from_one else 1.0
    firsts: dict[tuple[float, ...], str] = {}
    for name, shard in filled(directory, solo_context(CPU, torch.float32)).items():
        if "norm" in name:
            assert shard.eq(norm).all(), name
        else:
            assert 0.5 < float(shard.std()) / STANDARD_DEVIATION < 1.5, name
            assert float(shard.abs().max()) < 4 * STANDARD_DEVIATION, name
            first = tuple(shard.flatten()[:4].tolist())
            assert firsts.setdefault(first, name) == name


def test_numbers_are_nearly_normal_and_of_no_neighbour() -> None:
    key = torch.tensor(5)
    places = elements((400, 1000), (slice(0, 400), slice(0, 1000)), CPU)
    numbers = nearly_normal(key, places)
    assert abs(float(numbers.mean())) < STANDARD_DEVIATION / 200
    assert float(numbers.std()) == pytest.approx(STANDARD_DEVIATION, rel=0.01)
    beyond = [float((numbers.abs() > times * STANDARD_DEVIATION).double().mean()) for times in (1, 2)]
    assert beyond == pytest.approx([0.317, 0.0455], rel=0.1)
    assert abs(float(torch.corrcoef(torch.stack((numbers[:-1].flatten(), numbers[1:].flatten())))[0, 1])) < 0.01
    assert not numbers.equal(nearly_normal(torch.tensor(6), places))


def test_a_rank_that_is_told_so_reads_no_weights(directory: Path) -> None:
    """Again and again the same ones: a rank that is replaced comes back as it was."""
    config, context = read_model_config(directory), solo_context(CPU, torch.bfloat16)
    command = control_pb2.FormEpoch(model_path=str(directory), dtype="bfloat16", random_weights=True)
    models = [build_model(config, context) for _ in range(2)]
    for model in models:
        loaded = bring_weights(model, config, command, context, lambda *_: None)
        assert (loaded.origin, loaded.writer, loaded.bytes) == ("random", None, model.resident_bytes)
    assert all(models[0].shards[name].equal(shard) for name, shard in models[1].shards.items())
    assert json.loads((directory / "config.json").read_text()) and len(list(directory.iterdir())) == 1
