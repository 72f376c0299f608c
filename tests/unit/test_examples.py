"""The examples are what they claim: prompts the server accepts, and checkpoints it can load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coordinator.jobs.batch_input import parse_batch
from coordinator.tokenizer import Tokenizer
from examples import make_checkpoint
from examples.make_checkpoint import PROMPTS, cut_config, small_config, write_checkpoint
from models.config import read_model_config
from models.files import check_model_directory, checkpoint_index


def test_the_prompts_are_many_and_varied() -> None:
    items = parse_batch(PROMPTS.read_bytes())
    assert len(items) >= 200
    assert len({item.custom_id.split("-")[0] for item in items}) >= 8
    assert {type(item.prompt) is str for item in items} == {True, False}, "completions and chats"
    limits = [item.sampling.max_tokens or 0 for item in items]
    assert min(limits) >= 8 and max(limits) <= 48 and len(set(limits)) >= 5
    temperatures = [item.sampling.temperature for item in items]
    assert temperatures.count(0) > len(items) // 2 and len(set(temperatures)) >= 3


@pytest.mark.parametrize("family", make_checkpoint.FAMILIES)
def test_a_small_checkpoint_is_complete(tmp_path: Path, family: str) -> None:
    config = small_config(family, hidden_size=64, num_layers=1, dtype="float32")
    write_checkpoint(tmp_path, config)
    check_model_directory(tmp_path)
    tokenizer = Tokenizer.from_directory(tmp_path)
    texts = make_checkpoint.prompt_texts(PROMPTS)
    assert [tokenizer.decode(tokenizer.encode(text)[1:]) for text in texts] == texts
    assert max(len(tokenizer.encode(text)) for text in texts) + 48 < read_model_config(tmp_path).max_position_embeddings


def test_weights_are_split_over_files_and_keep_to_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {**small_config("qwen3", hidden_size=64, num_layers=2, dtype="bfloat16"), "vocab_size": 5000}
    monkeypatch.setattr(make_checkpoint, "SHARD_BYTES", 300_000)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_checkpoint(tmp_path / name, config, seed=seed)
        check_model_directory(tmp_path / name)
    files = sorted({stored.file.name for stored in checkpoint_index(tmp_path / "a").values()})
    assert len(files) > 2 and files[0].startswith("model-00001-of-")
    contents = {name: [(tmp_path / name / file).read_bytes() for file in files] for name in "abc"}
    assert contents["a"] == contents["b"] != contents["c"]
    assert json.loads((tmp_path / "a/config.json").read_text())["vocab_size"] == 5000


def test_the_first_layers_of_a_config_make_a_smaller_model(tmp_path: Path) -> None:
    config = {
        **small_config("qwen3-moe", hidden_size=64, num_layers=3, dtype="float32"),
        "layer_types": ["full_attention"] * 3,
    }
    assert cut_config(config, None) == config
    write_checkpoint(tmp_path, cut_config(config, 2))
    check_model_directory(tmp_path)
    assert len(read_model_config(tmp_path).layers) == 2
    assert json.loads((tmp_path / "config.json").read_text())["layer_types"] == ["full_attention"] * 2
