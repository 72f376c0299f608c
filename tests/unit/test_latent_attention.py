"""Latent attention: its scale, what its cache holds, and that decode makes no heads of it. Values: tests/oracle."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

from echelon.errors import ConfigError
from models.batch import ForwardBatch
from models.config import read_model_config
from models.registry import build_model
from parallel.context import solo_context
from tests.published import PUBLISHED
from tests.tiny import YARN_ROPE, make_checkpoint
from worker.kv_cache import KVCache

CPU = torch.device("cpu")
HEADS, CONTEXT, BLOCK_TOKENS = 12, 64, 4
YARN = YARN_ROPE | {"mscale": 0.707, "mscale_all_dim": 0.707}


@pytest.mark.parametrize("family", ["deepseek-v2", "deepseek-v2-lite", "deepseek-v3"])
@pytest.mark.parametrize(
    "table",
    [
        {"rope_type": "default", "rope_theta": 1e4, "mscale_all_dim": 0.7, "factor": 8.0},
        {"rope_type": "linear", "rope_theta": 1e4, "mscale_all_dim": 0.7, "factor": 8.0},
        YARN,
        YARN | {"mscale_all_dim": 1.0},
        YARN_ROPE,
        YARN | {"factor": 1.0},
    ],
    ids=lambda table: "-".join(str(value) for value in table.values()),
)
def test_the_scale_of_scores_is_that_of_transformers(tmp_path: Path, family: str, table: dict[str, object]) -> None:
    make_checkpoint(tmp_path, family, rope_parameters=table)
    keys = json.loads((tmp_path / "config.json").read_text())
    theirs = (
        DeepseekV3Attention(DeepseekV3Config(**keys), 0)
        if family == "deepseek-v3"
        else DeepseekV2Attention(DeepseekV2Config(**keys), 0)
    )
    assert read_model_config(tmp_path).attention_scale == pytest.approx(theirs.scaling, rel=1e-15)


def test_the_published_scale(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["deepseek-v2-lite"]))
    found = read_model_config(tmp_path).attention_scale
    assert found == pytest.approx(192**-0.5 * (0.1 * 0.707 * 3.6888794541139363 + 1) ** 2, rel=1e-12)  # log(40)


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that is made; views count as what they show."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numbers = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return made


@pytest.mark.parametrize("family", ["deepseek-v2", "deepseek-v3"])
def test_decode_makes_no_keys_or_values_of_heads(tmp_path: Path, family: str) -> None:
    make_checkpoint(
        tmp_path, family, num_attention_heads=HEADS, num_key_value_heads=HEADS, hidden_size=36, vocab_size=331
    )
    config = read_model_config(tmp_path)
    assert config.latent is not None
    context = solo_context(CPU, torch.float64)
    model, cache = build_model(config, context), KVCache(config, context, CONTEXT // BLOCK_TOKENS, BLOCK_TOKENS)
    assert [tensor.shape for tensor in cache.keys] == [(CONTEXT // BLOCK_TOKENS, BLOCK_TOKENS, 1, 20 + 6)] * 2
    assert cache.values == ()
    batch = ForwardBatch(
        token_ids=torch.tensor([3]),
        positions=torch.tensor([CONTEXT - 1]),
        slot_mapping=torch.tensor([CONTEXT - 1]),
        num_decode_rows=1,
        decode_block_tables=torch.arange(CONTEXT // BLOCK_TOKENS)[None],
        decode_context_lens=torch.tensor([CONTEXT]),
        prefill=(),
        sample_index=torch.tensor([0]),
    )
    with Largest() as largest:
        model(batch, cache)
    narrowest = min(config.latent.plain_dim, config.latent.value_dim)
    assert CONTEXT * 26 <= largest.numbers < HEADS * CONTEXT * narrowest


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"rope_parameters": {"rope_type": "ntk"}}, ["'ntk'", "default, linear, dynamic, llama3, yarn, longrope"]),
        ({"rope_interleave": "yes"}, ["rope_interleave", "'yes'"]),
        ({"rope_parameters": YARN | {"mscale_all_dim": "all"}}, ["rope_parameters.mscale_all_dim", "'all'"]),
        ({"attention_bias": True}, ["attention_bias=true is not supported for this architecture"]),
        ({"kv_lora_rank": 0}, ["kv_lora_rank", ">= 1", "0"]),
        ({"qk_rope_head_dim": 5}, ["qk_rope_head_dim=5", "odd"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_refuses_what_it_does_not_compute(tmp_path: Path, keys: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        make_checkpoint(tmp_path, "deepseek-v3", **keys)
    assert all(word in str(error.value) for word in ["config.json", *words]), error.value
