"""Echelon's models against transformers, in float64: every log-probability within 1e-6, on 1 to 3 tensor ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from models.config import ModelConfig, read_model_config
from models.tables import kv_bytes_per_block, parameter_bytes
from parallel.degrees import Degrees
from tests.oracle.cases import CASES, GREEDY_TOKENS, LAYOUTS, PARAMETERS, PROMPT_TOKENS
from tests.oracle.harness import BLOCK_TOKENS, NUM_BLOCKS, Arrays, run_ranks
from tests.tiny import make_checkpoint

FLOAT64_BYTES = 8
EVERYWHERE: tuple[str, ...] = ("norm.weight", ".gate.weight", "correction_bias", "o_proj.bias")
EVERYWHERE += (".q_a_proj.weight", ".kv_a_proj_with_mqa.weight")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def selected(request: pytest.FixtureRequest) -> list[tuple[str, int]]:
    """The layouts that this run tests: all, or those that -k names."""
    parametrized = [item.callspec for item in request.session.items if hasattr(item, "callspec")]
    wanted = {(callspec.params.get("name"), callspec.params.get("tensor")) for callspec in parametrized}
    return [layout for layout in LAYOUTS if layout in wanted]


@pytest.fixture(scope="module")
def oracle(selected: list[tuple[str, int]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By case: the checkpoint, sequences of prompt and greedy tokens, and transformers' log-probabilities of both."""
    root = tmp_path_factory.mktemp("oracle")
    return {name: _ask_transformers(name, root / name) for name in sorted({name for name, _ in selected})}


def _ask_transformers(name: str, directory: Path) -> dict[str, Any]:
    case = CASES[name]
    make_checkpoint(directory, case.family, shards=case.shards, **dict(case.config))
    # Its own choice of attention: sdpa, and eager for what sdpa cannot compute.
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float64, experts_implementation="eager", output_loading_info=True
    )
    images = ("model.vision_tower.", "model.multi_modal_projector.")
    missing = [key for key in loading["missing_keys"] if not key.startswith(images)]
    assert not missing and not loading["unexpected_keys"], loading
    random = torch.Generator().manual_seed(7)
    sequences, logprobs = [], []
    for tokens in PROMPT_TOKENS:
        ids = torch.randint(2, model.config.get_text_config().vocab_size, (1, tokens), generator=random)
        with torch.inference_mode():
            for _ in range(GREEDY_TOKENS):
                ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
            logprobs.append(model(ids).logits[0].log_softmax(-1).numpy())
        sequences.append(ids[0].tolist())
    return {"directory": str(directory), "sequences": sequences, "logprobs": logprobs}


@pytest.fixture(scope="module")
def ranks(
    selected: list[tuple[str, int]],
    oracle: dict[str, dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[int, list[Arrays]]:
    """By tensor size: the results of each rank. One start of the processes serves all cases."""
    results = {}
    for tensor in sorted({tensor for _, tensor in selected}):
        job = tmp_path_factory.mktemp("job") / "job.json"
        cases = {
            name: {
                "directory": oracle[name]["directory"],
                "sequences": oracle[name]["sequences"],
                "prompts": PROMPT_TOKENS,
                "max_context": CASES[name].max_context,
            }
            for name, size in selected
            if size == tensor
        }
        job.write_text(json.dumps(cases))
        results[tensor] = run_ranks(job, tensor)
    return results


@pytest.mark.parametrize("way", ["whole", "chunked"])
@pytest.mark.parametrize(("name", "tensor"), PARAMETERS)
def test_logprobs_equal_transformers(
    name: str, tensor: int, way: str, oracle: dict[str, dict[str, Any]], ranks: dict[int, list[Arrays]]
) -> None:
    for rank in ranks[tensor]:
        for sequence, expected in enumerate(oracle[name]["logprobs"]):
            found = rank[f"{name}/{way}-{sequence}"]
            assert found.dtype == np.float64 and found.shape == expected.shape
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
            assert (found.argmax(-1) == expected.argmax(-1)).all()


@pytest.mark.parametrize(("name", "tensor"), PARAMETERS)
def test_resident_bytes_equal_the_table(
    name: str, tensor: int, oracle: dict[str, dict[str, Any]], ranks: dict[int, list[Arrays]]
) -> None:
    config = read_model_config(Path(oracle[name]["directory"]))
    for index, rank in enumerate(ranks[tensor]):
        place = Degrees(tensor=tensor).place(index)
        assert rank[f"{name}/parameter_bytes"] == parameter_bytes(config, place, FLOAT64_BYTES)
        block_bytes = kv_bytes_per_block(config, place, BLOCK_TOKENS, FLOAT64_BYTES)
        assert rank[f"{name}/kv_bytes"] == NUM_BLOCKS * block_bytes


@pytest.mark.parametrize(("name", "tensor"), PARAMETERS)
def test_ranks_read_their_slices_and_no_more(
    name: str, tensor: int, oracle: dict[str, dict[str, Any]], ranks: dict[int, list[Arrays]]
) -> None:
    directory = Path(oracle[name]["directory"])
    headers = [_header(file) for file in directory.glob("*.safetensors")]
    stored = {key: entry for header in headers for key, entry in header.items() if "data_offsets" in entry}
    stored_bytes = sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in stored.values())
    read_bytes = [int(rank[f"{name}/read_bytes"]) for rank in ranks[tensor]]
    # What every rank reads: norms, routers, the output bias, what compresses latents, and keys and values if they have
    # fewer heads than ranks.
    shapes = [entry["shape"] for key, entry in stored.items() if key.endswith(EVERYWHERE)]
    everywhere = sum(math.prod(shape) for shape in shapes) + _shared_head_numbers(read_model_config(directory))
    assert sum(read_bytes) == stored_bytes + (tensor - 1) * 4 * everywhere


def _header(file: Path) -> dict[str, Any]:
    content = file.read_bytes()
    header: dict[str, Any] = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return header


def _shared_head_numbers(config: ModelConfig) -> int:
    if config.latent is not None:
        return 0
    head = config.head_dim * (config.hidden_size + (1 if config.qkv_bias else 0))
    return 2 * head * config.num_hidden_layers if config.num_key_value_heads == 1 else 0
