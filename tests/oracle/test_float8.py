"""A checkpoint of 8 bit floats computes what transformers computes on what they stand for, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from models.config import read_model_config
from models.registry import build_model
from parallel.context import ParallelContext
from parallel.degrees import Degrees
from tests.oracle.harness import BLOCK_TOKENS, NUM_BLOCKS, Driver, chunked_steps
from tests.quantised import make_quantised
from tests.ranks import as_ranks
from worker.kv_cache import KVCache
from worker.loader import load_weights

SIZES: dict[str, Any] = {
    "hidden_size": 36,
    "intermediate_size": 42,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "moe_intermediate_size": 18,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3-moe": SIZES | {"head_dim": 10, "num_experts": 6},
    "deepseek-v3": SIZES | {"n_shared_experts": 2},
}
PROMPT, LENGTH = 11, 15


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoints(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_quantised(tmp_path_factory.mktemp("float8"), request.param, (16, 11), **FAMILIES[request.param])


@pytest.mark.parametrize("tensor", [1, 2, 3])
def test_logprobs_equal_transformers(checkpoints: tuple[Path, Path], tensor: int) -> None:
    float8, plain = checkpoints
    ids = np.random.default_rng(5).integers(2, 320, size=LENGTH).tolist()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        plain, dtype=torch.float64, experts_implementation="eager"
    )
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)

    @torch.inference_mode()
    def as_rank(context: ParallelContext) -> torch.Tensor:
        config = read_model_config(float8)
        model = build_model(config, context)
        load_weights(model, config, float8, context, lambda loaded_bytes, total_bytes: None)
        cache = KVCache(config, context, NUM_BLOCKS, BLOCK_TOKENS)
        return Driver(model, cache, context.tensor, [ids]).logprobs(chunked_steps([PROMPT], [LENGTH]))[0]

    for found in as_ranks(Degrees(tensor=tensor), as_rank):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
