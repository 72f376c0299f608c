"""Attention step by step, where products are capped: transformers' own, to the last bits and in every dtype."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from models.attention import PagedAttention
from models.attention_rule import AttentionRule
from models.batch import ForwardBatch, PrefillRow

TOKENS, HEADS, KEY_VALUE_HEADS, HEAD_DIM = 12, 4, 2, 8


class Cache:
    """One layer, one block."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.block_tokens = TOKENS
        self.keys = [torch.zeros(1, TOKENS, KEY_VALUE_HEADS, HEAD_DIM, dtype=dtype)]
        self.values = [torch.zeros(1, TOKENS, KEY_VALUE_HEADS, HEAD_DIM, dtype=dtype)]


def whole_prompt() -> ForwardBatch:
    return ForwardBatch(
        token_ids=torch.zeros(TOKENS, dtype=torch.int64),
        positions=torch.arange(TOKENS),
        slot_mapping=torch.arange(TOKENS),
        num_decode_rows=0,
        decode_block_tables=torch.zeros(0, 0, dtype=torch.int64),
        decode_context_lens=torch.zeros(0, dtype=torch.int64),
        prefill=(PrefillRow(0, TOKENS, TOKENS, torch.zeros(1, dtype=torch.int64)),),
        sample_index=torch.arange(TOKENS),
    )


@pytest.mark.parametrize("window", [None, 5, TOKENS])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_capped_attention_is_that_of_transformers(dtype: torch.dtype, window: int | None) -> None:
    random = torch.Generator().manual_seed(1)
    query, key, value = (
        3 * torch.randn(TOKENS, heads, HEAD_DIM, dtype=torch.float64, generator=random).to(dtype)
        for heads in (HEADS, KEY_VALUE_HEADS, KEY_VALUE_HEADS)
    )
    rule = AttentionRule(window, scale=0.3, cap=2.0)
    attention = PagedAttention(whole_prompt(), Cache(dtype), {window})
    attention.places(0).put(key, value)
    found = attention(0, rule, query)
    distance = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
    seen = (distance >= 0) & (distance < (window or TOKENS))
    module = SimpleNamespace(num_key_value_groups=HEADS // KEY_VALUE_HEADS, training=False)

    def heads_first(heads: Tensor) -> Tensor:
        return heads.transpose(0, 1)[None]

    mask = torch.zeros(1, 1, TOKENS, TOKENS, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    expected, _ = eager_attention_forward(
        module, heads_first(query), heads_first(key), heads_first(value), mask, scaling=rule.scale, softcap=rule.cap
    )
    # A few last bits of what is multiplied; the weights between are float32's in float64, too.
    torch.testing.assert_close(found, expected[0], rtol=0, atol=20 * torch.finfo(dtype).eps)
