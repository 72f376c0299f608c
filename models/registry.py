"""The registry: which code computes which architecture.

In rank processes. `models.families.FAMILIES` lists the same names for processes without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from models.config import ModelConfig
from models.decoder import DecoderModel, build_decoder
from parallel.context import ParallelContext

BUILDERS: Mapping[str, Callable[[ModelConfig, ParallelContext], DecoderModel]] = {
    "LlamaForCausalLM": build_decoder,
    "MistralForCausalLM": build_decoder,
    "Qwen2ForCausalLM": build_decoder,
    "Qwen3ForCausalLM": build_decoder,
    "MixtralForCausalLM": build_decoder,
    "Qwen3MoeForCausalLM": build_decoder,
    "Phi3ForCausalLM": build_decoder,
    "Gemma2ForCausalLM": build_decoder,
    "Gemma3ForCausalLM": build_decoder,
    "Gemma3ForConditionalGeneration": build_decoder,
    "DeepseekV2ForCausalLM": build_decoder,
    "DeepseekV3ForCausalLM": build_decoder,
}


def build_model(config: ModelConfig, context: ParallelContext) -> DecoderModel:
    """The model of the config's architecture, its tensors allocated and uninitialized."""
    return BUILDERS[config.architecture](config, context)
