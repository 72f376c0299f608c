"""Every family in every dtype: near itself in float64, which `test_models` compares with transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import AutoModelForCausalLM

from models.config import read_model_config
from models.registry import build_model
from parallel.context import solo_context
from tests.oracle.harness import run_case
from tests.tiny import FAMILIES, make_checkpoint

PROMPTS, LENGTHS = (23, 40), (30, 44)
SLOW = ("deepseek-v2-lite", "deepseek-v3")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def logprobs(directory: Path, dtype: torch.dtype) -> npt.NDArray[np.float64]:
    """Of every token of two random sequences, fed whole and in chunks."""
    random = np.random.default_rng(3)
    sequences = [random.integers(2, 320, size=length).tolist() for length in LENGTHS]
    case = {"directory": directory, "prompts": PROMPTS, "sequences": sequences, "max_context": None}
    results = run_case(case, solo_context(torch.device("cpu"), dtype))
    return np.concatenate([results[f"{way}-{i}"].ravel() for way in ("whole", "chunked") for i in range(len(LENGTHS))])


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.long if name in SLOW else ()) for name in FAMILIES]
)
def test_lower_precision_is_near_float64(tmp_path: Path, family: str) -> None:
    make_checkpoint(tmp_path, family)
    exact = logprobs(tmp_path, torch.float64)
    for name, dtype in DTYPES.items():
        error = np.abs(logprobs(tmp_path, dtype) - exact).mean() / exact.std()
        epsilon = torch.finfo(dtype).eps
        assert epsilon / 100 < error < 10 * epsilon, name  # it is computed in this precision, and well


@pytest.mark.parametrize("name", [*DTYPES, "float64"])
def test_gemma_scales_embeddings_by_what_transformers_rounds_to(tmp_path: Path, name: str) -> None:
    make_checkpoint(tmp_path, "gemma2", hidden_size=60)  # whose root no dtype holds
    dtype = getattr(torch, name)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).model.embed_tokens.embed_scale
    ours = build_model(read_model_config(tmp_path), solo_context(torch.device("cpu"), dtype)).embedding_scale
    assert theirs.dtype == dtype and ours == theirs.item()
