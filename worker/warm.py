"""What a spare does before it is told which rank it is: everything that takes long and is the same for all.

In a rank process that waits in a slot, in a thread of its own: imports, the device's context, and the first use of the
libraries and kernels that a rank's first steps would wait for, by steps of a small model. Knows no epoch, and no model
that anybody asked for.
"""

from __future__ import annotations

from typing import NoReturn

import torch

import worker.rank  # noqa: F401 - all that a rank imports
from models.config import DefaultSampling, LayerConfig, ModelConfig
from models.registry import build_model
from models.rope import Rope
from parallel.context import solo_context
from worker.kv_cache import KVCache
from worker.matchers import Matchers
from worker.memory import largest_step
from worker.plan import decode, encode
from worker.runner import Runner, RunnerLimits

SMALL = ModelConfig(
    architecture="Qwen3ForCausalLM",
    hidden_size=1024,
    intermediate_size=2048,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=128,
    vocab_size=1024,
    max_position_embeddings=128,
    layers=(LayerConfig(window=None, rope=Rope(theta=10_000.0)),),
    rms_norm_eps=1e-6,
    activation="silu",
    tie_word_embeddings=False,
    qkv_bias=False,
    output_bias=False,
    attention_scale=128**-0.5,
    attention_cap=None,
    logit_cap=None,
    dtype="bfloat16",
    end_ids=(0,),
    default_sampling=DefaultSampling(),
)
RUNNING, CONTEXT, BLOCK_TOKENS = 4, 128, 16
WHOLE_PROMPT, CHUNK = (
    CONTEXT - 1 + RUNNING - 1,
    32,
)  # tokens of a step: a prompt that starts and ends in it, and a part of one


def warm(device: str) -> None:
    """device: cpu, or cuda, of which Ray shows this process one."""
    torch.set_num_threads(1)  # a pool of threads made here would stay as nice as this one
    context = solo_context(torch.device(device), torch.float32 if device == "cpu" else torch.bfloat16)
    matchers = Matchers(_no_tokenizer, 1)
    with torch.inference_mode():
        model = build_model(SMALL, context)
        for shard in model.shards.values():
            shard.normal_(std=0.02)
        for step_tokens in (WHOLE_PROMPT, CHUNK):
            limits = RunnerLimits(RUNNING, CONTEXT, BLOCK_TOKENS)
            runner = Runner(model, KVCache(SMALL, context, 1, BLOCK_TOKENS), context, limits, matchers)
            runner.run(decode(encode(largest_step(RUNNING, CONTEXT, step_tokens, context.epoch))))
    matchers.close()


def _no_tokenizer() -> NoReturn:
    raise AssertionError("these steps have no constraint")
