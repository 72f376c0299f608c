"""ModelConfig: the facts of a Hugging Face model directory that placement, loading and computing need.

Read by the coordinator and by every rank from config.json and generation_config.json, as transformers 4 and 5 write
them. It knows no torch and no transformers; anything that Echelon does not compute is refused here by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from models.json_source import JsonSource
from models.rope import Rope, read_rope

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """What the name of an architecture says, where others are told by their config.json or do not have it.

    qkv_bias None: attention_bias of config.json gives all four projections a bias. default_head_dim None: hidden_size
    / num_attention_heads. reads_window: sliding_window of config.json holds for every layer.
    """

    qkv_bias: bool | None = None
    normalizes_heads: bool = False
    default_head_dim: int | None = None
    reads_window: bool = False


FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(qkv_bias=False, reads_window=True),
    "Qwen2ForCausalLM": Family(qkv_bias=True),
    "Qwen3ForCausalLM": Family(normalizes_heads=True, default_head_dim=128),
}


@dataclass(frozen=True, slots=True)
class DefaultSampling:
    """What generation_config.json asks for when the request does not say; None where it is silent."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A decoder-only model. Names are those of config.json; dtype is the one the checkpoint declares."""

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: Rope
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    sliding_window: int | None
    dtype: str
    end_ids: tuple[int, ...]
    default_sampling: DefaultSampling

    @property
    def normalizes_heads(self) -> bool:
        """Whether each query and key head passes through an RMSNorm of its own before the rotation."""
        return FAMILIES[self.architecture].normalizes_heads


def read_model_config(directory: Path) -> ModelConfig:
    """The config of a model directory. Raises ConfigError naming the file and the key."""
    source = JsonSource.read(directory / "config.json")
    architecture = _architecture(source)
    family = FAMILIES[architecture]
    _refuse_what_is_not_computed(source)
    heads = source.count("num_attention_heads")
    key_value_heads = source.count("num_key_value_heads", heads)
    if heads % key_value_heads != 0:
        source.refuse(f"num_key_value_heads={key_value_heads} does not divide num_attention_heads={heads}")
    attention_bias = source.flag("attention_bias")
    generation = JsonSource.read(directory / "generation_config.json", required=False)
    return ModelConfig(
        architecture=architecture,
        hidden_size=source.count("hidden_size"),
        intermediate_size=source.count("intermediate_size"),
        num_hidden_layers=source.count("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=_head_dim(source, family, heads),
        vocab_size=source.count("vocab_size"),
        max_position_embeddings=source.count("max_position_embeddings"),
        rms_norm_eps=source.number("rms_norm_eps", 1e-6),
        rope=read_rope(source),
        tie_word_embeddings=source.flag("tie_word_embeddings"),
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        output_bias=attention_bias and family.qkv_bias is None,
        sliding_window=_sliding_window(source) if family.reads_window else None,
        dtype=_dtype(source),
        end_ids=generation.ids("eos_token_id") or source.ids("eos_token_id"),
        default_sampling=_default_sampling(generation),
    )


def _refuse_what_is_not_computed(source: JsonSource) -> None:
    hidden_act = source.get("hidden_act", "silu")
    if hidden_act != "silu":
        source.refuse(f"hidden_act={hidden_act!r} is not supported; supported: silu")
    if source.flag("mlp_bias"):
        source.refuse("mlp_bias=true is not supported")
    if source.flag("use_sliding_window"):
        source.refuse("use_sliding_window=true is not supported; a window that only some layers have is not computed")
    layer_types = source.get("layer_types", [])
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        source.refuse(f"layer_types={layer_types!r} is not supported; every layer must be 'full_attention'")


def _sliding_window(source: JsonSource) -> int | None:
    """null is no window; transformers takes 4096 where the key is missing."""
    if "sliding_window" not in source.values:
        return 4096
    return None if source.get("sliding_window") is None else source.count("sliding_window")


def _architecture(source: JsonSource) -> str:
    names = source.get("architectures", [])
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(name, str) or name not in FAMILIES:
        found = "'architectures' names none" if name is None else f"architecture {name!r} is not supported"
        source.refuse(f"{found}; supported: {', '.join(FAMILIES)}")
    return name


def _head_dim(source: JsonSource, family: Family, heads: int) -> int:
    hidden_size = source.count("hidden_size")
    if source.get("head_dim") is not None:
        head_dim = source.count("head_dim")
    elif family.default_head_dim is not None:
        head_dim = family.default_head_dim
    elif hidden_size % heads != 0:
        source.refuse(f"head_dim is missing, and num_attention_heads={heads} does not divide hidden_size={hidden_size}")
    else:
        head_dim = hidden_size // heads
    if head_dim % 2 != 0:
        source.refuse(f"head_dim={head_dim} is odd; rotary embeddings turn pairs of dimensions")
    return head_dim


def _dtype(source: JsonSource) -> str:
    name = source.get("dtype") or source.get("torch_dtype") or "float32"
    if not isinstance(name, str) or name not in DTYPE_BYTES:
        source.refuse(f"dtype {name!r} is not supported; supported: {', '.join(DTYPE_BYTES)}")
    return name


def _default_sampling(generation: JsonSource) -> DefaultSampling:
    """The file's sampling applies only if it asks to sample; otherwise its numbers are transformers' leftovers."""
    if not generation.flag("do_sample"):
        return DefaultSampling()
    return DefaultSampling(
        temperature=generation.optional_number("temperature"),
        top_p=generation.optional_number("top_p"),
        top_k=generation.count("top_k") if generation.get("top_k") else None,
    )
