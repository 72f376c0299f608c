"""Writes a random checkpoint in Hugging Face format, tokenizer included, in seconds.

    python examples/make_checkpoint.py DIR                               a small Llama
    python examples/make_checkpoint.py DIR --family qwen3 --hidden-size 512
    python examples/make_checkpoint.py DIR --config CONFIG_JSON --dtype bfloat16 --device cuda --num-layers 12

The tokenizer is trained on the prompts beside this file; the weights are noise, so the answers are gibberish in
many languages. Tensor names and shapes come from the table that the server loads by.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from models.config import DTYPE_BYTES, ModelConfig, read_model_config
from models.parameter import Parameter
from models.tables import parameter_table

PROMPTS = Path(__file__).with_name("prompts.jsonl")
BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"
TOKENIZER_VOCABULARY = 4096
SHARD_BYTES = 4 << 30
GEMMA: dict[str, object] = {
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 32,
    "tie_word_embeddings": True,
}
DEEPSEEK: dict[str, object] = {
    "num_key_value_heads": None,  # as many as there are heads
    "head_dim": 16,  # transformers': the part that turns
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "first_k_dense_replace": 1,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 128,
    "n_group": 4,
    "topk_group": 2,
}
FAMILIES: dict[str, dict[str, object]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 1024},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    "mixtral": {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 8},
    "qwen3-moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 128,
        "norm_topk_prob": True,
    },
    "phi3": {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "pad_token_id": None},
    "gemma2": GEMMA
    | {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 1024,
    },
    "gemma3": GEMMA
    | {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "sliding_window": 512,
        "sliding_window_pattern": 4,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    },
    "deepseek-v2": DEEPSEEK
    | {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "topk_method": "group_limited_greedy",
    },
    "deepseek-v3": DEEPSEEK
    | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    },
}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>\n{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)


def write_checkpoint(directory: Path, config: Mapping[str, object], *, seed: int = 0, device: str = "cpu") -> None:
    """Writes config, tokenizer and weights; the end and begin ids of config become the new tokenizer's."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(prompt_texts(PROMPTS), TOKENIZER_VOCABULARY)
    tokenizer.save(str(directory / "tokenizer.json"))
    ids = {"bos_token_id": tokenizer.token_to_id(BEGIN), "eos_token_id": tokenizer.token_to_id(END)}
    vocabulary = config.get("vocab_size", tokenizer.get_vocab_size())
    write_json(directory / "config.json", {**config, **ids, "vocab_size": vocabulary})
    write_json(directory / "generation_config.json", ids)
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BEGIN,
            "eos_token": END,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    write_weights(directory, seed=seed, device=device)


def small_config(family: str, *, hidden_size: int, num_layers: int, dtype: str) -> dict[str, object]:
    """The config.json of a small model: heads of 32, two query heads to a key-value head."""
    if hidden_size % 64 != 0:
        raise SystemExit(f"--hidden-size must be a multiple of 64, got {hidden_size}")
    return {
        "hidden_size": hidden_size,
        "intermediate_size": 3 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": hidden_size // 32,
        "num_key_value_heads": hidden_size // 64,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "dtype": dtype,
        **FAMILIES[family],
    }


def cut_config(config: Mapping[str, object], num_layers: int | None) -> dict[str, object]:
    """The config of the first layers alone; all of them if None."""
    if num_layers is None:
        return dict(config)
    kinds = config.get("layer_types")
    cut = {"layer_types": kinds[:num_layers]} if isinstance(kinds, list) else {}
    return {**config, "num_hidden_layers": num_layers, **cut}


def prompt_texts(path: Path) -> list[str]:
    """Every prompt and chat message of a batch file."""
    texts: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        body = json.loads(line)["body"]
        texts += [message["content"] for message in body["messages"]] if "messages" in body else [body["prompt"]]
    return texts


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE tokenizer: any text can be encoded, and a begin token goes before it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    begin_id = tokenizer.token_to_id(BEGIN)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, begin_id)]
    )
    return tokenizer


def write_weights(directory: Path, *, seed: int = 0, device: str = "cpu") -> None:
    """Random weights for the directory's config.json, drawn on the device, in files of at most about 4 GiB."""
    config = read_model_config(directory)
    random = torch.Generator(device).manual_seed(seed)
    shards = split_shards(parameter_table(config), DTYPE_BYTES[config.dtype])
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        tensors = {parameter.name: random_tensor(parameter, config, random).cpu() for parameter in shard}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def split_shards(parameters: Sequence[Parameter], itemsize: int) -> list[list[Parameter]]:
    """Runs of consecutive tensors of at most SHARD_BYTES, except where one tensor alone is larger."""
    shards: list[list[Parameter]] = [[]]
    held_bytes = 0
    for parameter in parameters:
        size_bytes = math.prod(parameter.shape) * itemsize
        if shards[-1] and held_bytes + size_bytes > SHARD_BYTES:
            shards.append([])
            held_bytes = 0
        shards[-1].append(parameter)
        held_bytes += size_bytes
    return shards


def random_tensor(parameter: Parameter, config: ModelConfig, random: torch.Generator) -> torch.Tensor:
    """Norms near what leaves their input alone; matrices scaled by their fan-in, so that every layer matters whatever
    the size."""
    dtype = getattr(torch, config.dtype)
    noise = torch.randn(parameter.shape, generator=random, device=random.device, dtype=dtype)
    if parameter.name.endswith("norm.weight"):
        return noise.mul_(0.1).add_(0 if config.family.norms_from_one else 1)
    return noise.mul_(1 / math.sqrt(parameter.shape[-1]))


def write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--family", choices=sorted(FAMILIES), default="llama")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--num-layers", type=int, help="default: 4, or those of --config")
    parser.add_argument("--config", type=Path, help="a config.json whose sizes to take instead")
    parser.add_argument("--dtype", choices=("float32", "float64", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cpu", help="where the weights are drawn")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.config is None:
        config = small_config(
            options.family, hidden_size=options.hidden_size, num_layers=options.num_layers or 4, dtype=options.dtype
        )
    else:
        config = cut_config(json.loads(options.config.read_text(encoding="utf-8")), options.num_layers)
        config.pop("torch_dtype", None)
        config["dtype"] = options.dtype
    write_checkpoint(options.directory, config, seed=options.seed, device=options.device)
    print(options.directory)


if __name__ == "__main__":
    main()
