"""A chunk of a prompt in latent attention: absorbed beside expanded, and which of them the model takes.

    python -m benchmarks.mla_prefill --device cuda [--case 64x4096 --case 512x4096]
    python -m benchmarks.mla_prefill --case 4x64 --hidden 64 --heads 4 --rank 32 --repeats 3

A case T x C is the last T tokens of a context of C; a chunk is as long as its context for a whole prompt. Random
weights; sizes are DeepSeek-V2-Lite's. Prints a JSON line for each case: microseconds of both ways over what is
cached, the mean of runs that follow one another, how far their outputs lie apart, and what `expanding_pays` says.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.mla_decode import BLOCK_TOKENS, config_of, microseconds, options
from models.attention import PagedAttention
from models.batch import ForwardBatch, PrefillRow
from models.config import ModelConfig
from models.latent_attention import LatentQueries, LatentSelfAttention
from models.registry import build_model
from parallel.context import solo_context
from worker.kv_cache import KVCache

CASES = ("16x4096", "32x4096", "64x4096", "128x4096", "256x4096", "512x4096", "1024x4096", "64x1024", "1024x1024")


@dataclasses.dataclass(frozen=True, slots=True)
class Forced(LatentQueries):
    """Queries that go the way they are told to."""

    expands: bool = False

    def expanding_pays(self, tokens: int) -> bool:
        return self.expands


def batch_of(chunk_tokens: int, context_tokens: int, device: torch.device) -> ForwardBatch:
    """One row, whose earlier tokens are cached."""
    positions = torch.arange(context_tokens - chunk_tokens, context_tokens, device=device)
    table = torch.randperm(-(-context_tokens // BLOCK_TOKENS), device=device)
    return ForwardBatch(
        token_ids=torch.zeros_like(positions),
        positions=positions,
        slot_mapping=table[positions // BLOCK_TOKENS] * BLOCK_TOKENS + positions % BLOCK_TOKENS,
        num_decode_rows=0,
        decode_block_tables=table.new_empty(0, 1),
        decode_context_lens=table.new_empty(0),
        prefill=(PrefillRow(offset=0, tokens=chunk_tokens, context_len=context_tokens, block_table=table),),
        sample_index=torch.zeros(1, dtype=torch.int64, device=device),
    )


@torch.inference_mode()
def measure(arguments: argparse.Namespace, config: ModelConfig, case: str) -> dict[str, object]:
    """One line of the output."""
    chunk_tokens, context_tokens = map(int, case.split("x"))
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    context = solo_context(device, dtype)
    model = build_model(config, context)
    for shard in model.shards.values():
        torch.nn.init.normal_(shard, std=shard.shape[-1] ** -0.5)
    cache = KVCache(config, context, -(-context_tokens // BLOCK_TOKENS), BLOCK_TOKENS)
    for keys in cache.keys:
        keys.normal_()
    attention, latent = model.layers[0].attention, config.latent
    assert isinstance(attention, LatentSelfAttention) and latent is not None
    plain, rotated, key = (
        torch.randn(chunk_tokens, heads, width, device=device, dtype=dtype)
        for heads, width in (
            (config.num_attention_heads, latent.plain_dim),
            (config.num_attention_heads, latent.rotary_dim),
            (1, config.key_dim),
        )
    )
    attend = PagedAttention(batch_of(chunk_tokens, context_tokens, device), cache, {attention.rule.window})
    absorbed, expanded = (Forced(latent, attention.expand, plain, rotated, expands) for expands in (False, True))

    def run(heads: Forced) -> Tensor:
        attend.places(attention.layer).put(key)
        return attend.latent(attention.layer, attention.rule, heads)

    outputs = [run(heads).double() for heads in (absorbed, expanded)]
    times = [
        microseconds(functools.partial(run, heads), device, arguments.repeats)["in_a_row_us"]
        for heads in (absorbed, expanded)
    ]
    return {
        "case": case,
        "absorbed_us": times[0],
        "expanded_us": times[1],
        "apart": float((outputs[0] - outputs[1]).norm() / outputs[1].norm()),
        "expands": LatentQueries(latent, attention.expand, plain, rotated).expanding_pays(chunk_tokens),
    }


def main(words: Sequence[str] | None = None) -> None:
    """Reads the command line."""
    arguments = options(__doc__ or "", CASES).parse_args(words)
    config = config_of(arguments)
    for case in arguments.case or CASES:
        print(json.dumps(measure(arguments, config, case)), flush=True)


if __name__ == "__main__":
    main()
