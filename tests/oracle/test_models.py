"""Echelon's models against transformers, in float64: every log-probability within 1e-6, on 1 to 3 tensor ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from models.config import ModelConfig, read_model_config
from models.tables import kv_bytes_per_block, parameter_bytes
from tests.oracle.harness import BLOCK_TOKENS, NUM_BLOCKS, Arrays, run_ranks
from tests.tiny import LLAMA3_ROPE, YARN_ROPE, make_checkpoint

PROMPT_TOKENS = (23, 40)
GREEDY_TOKENS = 12
FLOAT64_BYTES = 8

CASES: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama"},
    "llama3-rope": {"family": "llama", "rope_parameters": LLAMA3_ROPE, "shards": 3},
    "llama-odd": {
        "family": "llama",
        "hidden_size": 66,
        "intermediate_size": 94,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "vocab_size": 331,
        "tie_word_embeddings": True,
        "attention_bias": True,
    },
    "linear-rope": {"family": "llama", "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "dynamic-rope": {  # to the very end of what it may serve
        "family": "llama",
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
        "max_position_embeddings": max(PROMPT_TOKENS) + GREEDY_TOKENS,
    },
    "yarn-rope": {"family": "llama", "rope_parameters": YARN_ROPE},
    "mistral": {"family": "mistral"},
    "mistral-window": {"family": "mistral", "sliding_window": 9},  # ends within chunks and within blocks
    "qwen2": {"family": "qwen2", "tie_word_embeddings": True},
    "qwen2-yarn": {
        "family": "qwen2",
        "rope_parameters": YARN_ROPE | {"attention_factor": 1.5, "beta_fast": 24.0, "truncate": False},
        "num_key_value_heads": 1,
        "vocab_size": 331,
    },
    "llama-one-kv-head": {"family": "llama", "num_key_value_heads": 1},
    "qwen3": {"family": "qwen3", "tie_word_embeddings": True},
    "qwen3-odd": {
        "family": "qwen3",
        "hidden_size": 60,
        "intermediate_size": 99,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 14,
        "vocab_size": 331,
    },
}
LAYOUTS = [(name, 1) for name in CASES] + [(name, 2) for name in CASES if name != "qwen3-odd"] + [("qwen3-odd", 3)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from threads, and several ranks on few cores lose much by them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By case: the checkpoint, sequences of prompt and greedy tokens, and transformers' log-probabilities of both."""
    root = tmp_path_factory.mktemp("oracle")
    return {name: _ask_transformers(make_checkpoint(root / name, **CASES[name])) for name in CASES}


def _ask_transformers(directory: Path) -> dict[str, Any]:
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float64, attn_implementation="sdpa", output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"], loading
    random = torch.Generator().manual_seed(7)
    sequences, logprobs = [], []
    for tokens in PROMPT_TOKENS:
        ids = torch.randint(2, model.config.vocab_size, (1, tokens), generator=random)
        with torch.inference_mode():
            for _ in range(GREEDY_TOKENS):
                ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
            logprobs.append(model(ids).logits[0].log_softmax(-1).numpy())
        sequences.append(ids[0].tolist())
    return {"directory": str(directory), "sequences": sequences, "logprobs": logprobs}


@pytest.fixture(scope="module")
def ranks(oracle: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Arrays]]:
    """By tensor size: the results of each rank. One start of the processes serves all cases."""
    results = {}
    for tensor in sorted({tensor for _, tensor in LAYOUTS}):
        job = tmp_path_factory.mktemp("job") / "job.json"
        names = [name for name, size in LAYOUTS if size == tensor]
        cases = {
            name: {key: oracle[name][key] for key in ("directory", "sequences")} | {"prompts": PROMPT_TOKENS}
            for name in names
        }
        job.write_text(json.dumps(cases))
        results[tensor] = run_ranks(job, tensor)
    return results


@pytest.mark.parametrize("way", ["whole", "chunked"])
@pytest.mark.parametrize(("name", "tensor"), LAYOUTS)
def test_logprobs_equal_transformers(
    name: str, tensor: int, way: str, oracle: dict[str, dict[str, Any]], ranks: dict[int, list[Arrays]]
) -> None:
    for rank in ranks[tensor]:
        for sequence, expected in enumerate(oracle[name]["logprobs"]):
            found = rank[f"{name}/{way}-{sequence}"]
            assert found.dtype == np.float64 and found.shape == expected.shape
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
            assert (found.argmax(-1) == expected.argmax(-1)).all()


@pytest.mark.parametrize(("name", "tensor"), LAYOUTS)
def test_resident_bytes_equal_the_table(
    name: str, tensor: int, oracle: dict[str, dict[str, Any]], ranks: dict[int, list[Arrays]]
) -> None:
    config = read_model_config(Path(oracle[name]["directory"]))
    for index, rank in enumerate(ranks[tensor]):
        assert rank[f"{name}/parameter_bytes"] == parameter_bytes(config, index, tensor, FLOAT64_BYTES)
        block_bytes = kv_bytes_per_block(config, tensor, BLOCK_TOKENS, FLOAT64_BYTES)
        assert rank[f"{name}/kv_bytes"] == NUM_BLOCKS * block_bytes


@pytest.mark.parametrize(("name", "tensor"), LAYOUTS)
def test_ranks_read_their_slices_and_no_more(
    name: str, tensor: int, oracle: dict[str, dict[str, Any]], ranks: dict[int, list[Arrays]]
) -> None:
    directory = Path(oracle[name]["directory"])
    config = read_model_config(directory)
    stored_bytes = sum(
        entry["data_offsets"][1] - entry["data_offsets"][0]
        for file in directory.glob("*.safetensors")
        for entry in _header(file).values()
        if "data_offsets" in entry
    )
    read_bytes = [int(rank[f"{name}/read_bytes"]) for rank in ranks[tensor]]
    assert sum(read_bytes) == stored_bytes + (tensor - 1) * 4 * _replicated_numbers(config, tensor)


def _header(file: Path) -> dict[str, Any]:
    content = file.read_bytes()
    header: dict[str, Any] = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return header


def _replicated_numbers(config: ModelConfig, tensor: int) -> int:
    """What every rank reads: norms, the output bias, and keys and values if they have fewer heads than ranks."""
    norms = 2 * config.hidden_size + (2 * config.head_dim if config.normalizes_heads else 0)
    bias = config.hidden_size if config.output_bias else 0
    head = config.head_dim * (config.hidden_size + (1 if config.qkv_bias else 0))
    shared = 2 * head if config.num_key_value_heads == 1 else 0
    return config.num_hidden_layers * (norms + bias + shared) + config.hidden_size
