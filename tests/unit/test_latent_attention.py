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
from models.batch import ForwardBatch, PrefillRow
from models.config import read_model_config
from models.latent_attention import LatentQueries, LatentSelfAttention
from models.registry import build_model
from parallel.context import solo_context
from tests.published import PUBLISHED
from tests.tiny import YARN_ROPE, make_checkpoint
from worker.kv_cache import KVCache
from worker.loader import load_weights

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
        YARN | {"mscale_all_dim": 0},
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
    with Largest() as largest:
        model(batch_of(torch.full((CONTEXT,), 3), CONTEXT - 1, 1), cache)
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


def test_chunks_are_attended_alike_whether_heads_are_made_or_not(tmp_path: Path) -> None:
    """One sequence as a whole, in halves that are long enough to pay for heads, in pieces that are not, and token by
    token; the second half sees what the first has stored."""
    make_checkpoint(tmp_path, "deepseek-v3", first_k_dense_replace=2)
    config, context = read_model_config(tmp_path), solo_context(CPU, torch.float64)
    model = build_model(config, context)
    load_weights(model, config, tmp_path, context, lambda loaded_bytes, total_bytes: None)
    attention = model.layers[0].attention
    assert isinstance(attention, LatentSelfAttention)
    queries = LatentQueries(attention.shape, attention.expand, torch.empty(0, 4, 10), torch.empty(0, 4, 6))
    assert [queries.expanding_pays(tokens) for tokens in (1, 8, 32, 64)] == [False, False, True, True]
    ids = torch.randint(2, 300, (CONTEXT,), generator=torch.Generator().manual_seed(3))
    found = []
    for chunk in (64, 32, 8, 1):
        cache = KVCache(config, context, CONTEXT // BLOCK_TOKENS, BLOCK_TOKENS)
        with torch.inference_mode():
            parts = [model(batch_of(ids, first, chunk), cache) for first in range(0, CONTEXT, chunk)]
        found.append(torch.cat(parts))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-6)


def batch_of(ids: Tensor, first: int, tokens: int) -> ForwardBatch:
    """Consecutive tokens of a sequence that lies in blocks 0, 1, 2 and so on; a single one decodes."""
    positions, decodes = torch.arange(first, first + tokens), tokens == 1
    blocks = torch.arange(-(-(first + tokens) // BLOCK_TOKENS))
    return ForwardBatch(
        token_ids=ids[positions],
        positions=positions,
        slot_mapping=positions,
        num_decode_rows=int(decodes),
        decode_block_tables=blocks[None] if decodes else blocks.new_zeros(0, 0),
        decode_context_lens=positions + 1 if decodes else positions.new_zeros(0),
        prefill=() if decodes else (PrefillRow(0, tokens, first + tokens, blocks),),
        sample_index=torch.arange(tokens),
    )
