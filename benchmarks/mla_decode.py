"""One layer of latent attention in decode: its time at a batch and a context, beside the floor that its bytes set.

    python -m benchmarks.mla_decode --device cuda [--case 1x4096 --case 256x4096] [--bandwidth 4.8e12]
    python -m benchmarks.mla_decode --case 2x64 --hidden 64 --heads 4 --query-rank 24 --rank 32 --repeats 3

Random weights; sizes are DeepSeek-V2-Lite's. Prints a JSON line for each case: microseconds of the layer and of its
attention alone, each the median of runs that are waited for, and the mean of runs that follow one another; what a
device must read at least, in bytes and in microseconds; and the bytes that the layer takes at its peak besides.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.attention import PagedAttention
from models.batch import ForwardBatch
from models.config import ModelConfig, read_model_config
from models.latent_attention import LatentQueries, LatentSelfAttention
from models.layers import Rotation
from models.registry import build_model
from parallel.context import solo_context
from worker.kv_cache import KVCache

BLOCK_TOKENS = 16
CASES = ("1x4096", "256x4096")


@dataclass(frozen=True, slots=True)
class Layer:
    """The layer, what rotates its queries and keys, and the attention of the batch."""

    attention: LatentSelfAttention
    hidden: Tensor
    rotation: Rotation
    attend: PagedAttention

    def __call__(self) -> Tensor:
        return self.attention(self.hidden, self.rotation, self.attend)


def config_of(arguments: argparse.Namespace) -> ModelConfig:
    """A model of one layer, small but for its attention."""
    values = {
        "architectures": ["DeepseekV2ForCausalLM"],
        "hidden_size": arguments.hidden,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": arguments.heads,
        "q_lora_rank": arguments.query_rank or None,
        "kv_lora_rank": arguments.rank,
        "first_k_dense_replace": 1,
        "num_experts_per_tok": 1,
        "vocab_size": 16,
        "max_position_embeddings": 1 << 20,
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(values))
        return read_model_config(Path(folder))


def layer_of(config: ModelConfig, rows: int, context_tokens: int, device: torch.device, dtype: torch.dtype) -> Layer:
    """Every row decodes its last token, over blocks that lie scattered."""
    context = solo_context(device, dtype)
    model = build_model(config, context)
    for shard in model.shards.values():
        torch.nn.init.normal_(shard, std=shard.shape[-1] ** -0.5)
    width = -(-context_tokens // BLOCK_TOKENS)
    cache = KVCache(config, context, rows * width, BLOCK_TOKENS)
    for keys in cache.keys:
        keys.normal_()
    tables = torch.randperm(rows * width, device=device).view(rows, width)
    last = context_tokens - 1
    positions = torch.full((rows,), last, device=device)
    batch = ForwardBatch(
        token_ids=torch.zeros_like(positions),
        positions=positions,
        slot_mapping=tables[:, last // BLOCK_TOKENS] * BLOCK_TOKENS + last % BLOCK_TOKENS,
        num_decode_rows=rows,
        decode_block_tables=tables,
        decode_context_lens=positions + 1,
        prefill=(),
        sample_index=torch.arange(rows, device=device),
    )
    attention = model.layers[0].attention
    assert isinstance(attention, LatentSelfAttention)
    return Layer(
        attention,
        torch.randn(rows, config.hidden_size, device=device, dtype=dtype),
        model.rotations(positions, dtype)[model.layers[0].rope],
        PagedAttention(batch, cache, {attention.rule.window}),
    )


def reads_bytes(config: ModelConfig, layer: Layer, rows: int, context_tokens: int, itemsize: int) -> tuple[int, int]:
    """At least: of what is cached, and of the weights besides."""
    attention = layer.attention
    linears = (attention.queries.compress, attention.queries.project, attention.compress, attention.output)
    weights = [attention.expand, *(linear.weight for linear in linears if linear is not None)]
    return rows * context_tokens * config.key_dim * itemsize, sum(weight.nbytes for weight in weights)


def microseconds(work: Callable[[], object], device: torch.device, repeats: int) -> dict[str, float]:
    """Of runs that are waited for, the median; of runs in a row, the mean."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def timed(times: int) -> float:
        wait()
        begun_s = time.perf_counter()
        for _ in range(times):
            work()
        wait()
        return (time.perf_counter() - begun_s) * 1e6 / times

    timed(3)
    return {
        "alone_us": round(statistics.median(timed(1) for _ in range(repeats)), 1),
        "in_a_row_us": round(timed(repeats), 1),
    }


@torch.inference_mode()
def measure(arguments: argparse.Namespace, config: ModelConfig, case: str) -> dict[str, object]:
    """One line of the output."""
    rows, context_tokens = map(int, case.split("x"))
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    layer = layer_of(config, rows, context_tokens, device, dtype)
    attention = layer.attention
    assert config.latent is not None
    plain, rotated = (
        torch.randn(rows, config.num_attention_heads, width, device=device, dtype=dtype)
        for width in (config.latent.plain_dim, config.latent.rotary_dim)
    )
    heads = LatentQueries(config.latent, attention.expand, plain, rotated)
    key = torch.randn(rows, 1, config.key_dim, device=device, dtype=dtype)

    def attend() -> Tensor:
        layer.attend.places(attention.layer).put(key)
        return layer.attend.latent(attention.layer, attention.rule, heads)

    cached_bytes, weight_bytes = reads_bytes(config, layer, rows, context_tokens, dtype.itemsize)
    row: dict[str, object] = {
        "case": case,
        "layer": microseconds(layer, device, arguments.repeats),
        "attention": microseconds(attend, device, arguments.repeats),
        "reads_bytes": {"cache": cached_bytes, "weights": weight_bytes},
        "layer_floor_us": round((cached_bytes + weight_bytes) / arguments.bandwidth * 1e6, 1),
        "attention_floor_us": round(cached_bytes / arguments.bandwidth * 1e6, 1),
    }
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        layer()
        row["peak_bytes"] = torch.cuda.max_memory_allocated(device) - before
    return row


def options(description: str, cases: Sequence[str]) -> argparse.ArgumentParser:
    """Of a benchmark of one such layer."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32", "float64"), default="bfloat16")
    parser.add_argument("--case", action="append", help=f"as above, again and again; default: {' '.join(cases)}")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=16, help="of this rank")
    parser.add_argument("--query-rank", type=int, default=0, help="0: queries are not compressed")
    parser.add_argument("--rank", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=30)
    return parser


def main(words: Sequence[str] | None = None) -> None:
    """Reads the command line."""
    parser = options(__doc__ or "", CASES)
    parser.add_argument("--bandwidth", type=float, default=4.8e12, help="bytes a second; default: an H200's")
    arguments = parser.parse_args(words)
    config = config_of(arguments)
    for case in arguments.case or CASES:
        print(json.dumps(measure(arguments, config, case)), flush=True)


if __name__ == "__main__":
    main()
