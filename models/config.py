"""ModelConfig: the facts of a Hugging Face model directory that placement, loading and computing need.

Read by the coordinator and by every rank from config.json and generation_config.json, as transformers 4 and 5 write
them. It knows no torch and no transformers; anything that Echelon does not compute is refused here by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from echelon.errors import ConfigError

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "Qwen3ForCausalLM")
DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}

Json = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1's stretch of the rotary frequencies: long wavelengths by factor, short ones not, a ramp between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding: its base, and how it was stretched to longer contexts."""

    theta: float
    scaling: Llama3Scaling | None = None


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
    attention_bias: bool
    dtype: str
    end_ids: tuple[int, ...]
    default_sampling: DefaultSampling

    @property
    def normalizes_heads(self) -> bool:
        """Whether each query and key head passes through an RMSNorm of its own before the rotation."""
        return self.architecture == "Qwen3ForCausalLM"


def read_model_config(directory: Path) -> ModelConfig:
    """The config of a model directory. Raises ConfigError naming the file and the key."""
    source = _Source(directory / "config.json")
    architecture = _architecture(source)
    heads = source.count("num_attention_heads")
    key_value_heads = source.count("num_key_value_heads", heads)
    if heads % key_value_heads != 0:
        source.refuse(f"num_key_value_heads={key_value_heads} does not divide num_attention_heads={heads}")
    hidden_act = source.get("hidden_act", "silu")
    if hidden_act != "silu":
        source.refuse(f"hidden_act={hidden_act!r} is not supported; supported: silu")
    for flag in ("mlp_bias", "use_sliding_window"):
        if source.flag(flag):
            source.refuse(f"{flag}=true is not supported")
    generation = _Source(directory / "generation_config.json", required=False)
    return ModelConfig(
        architecture=architecture,
        hidden_size=source.count("hidden_size"),
        intermediate_size=source.count("intermediate_size"),
        num_hidden_layers=source.count("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=_head_dim(source, architecture, heads),
        vocab_size=source.count("vocab_size"),
        max_position_embeddings=source.count("max_position_embeddings"),
        rms_norm_eps=source.number("rms_norm_eps", 1e-6),
        rope=_rope(source),
        tie_word_embeddings=source.flag("tie_word_embeddings"),
        attention_bias=source.flag("attention_bias"),
        dtype=_dtype(source),
        end_ids=generation.ids("eos_token_id") or source.ids("eos_token_id"),
        default_sampling=_default_sampling(generation),
    )


class _Source:
    """A JSON file whose values are read by key, each checked; null counts as absent."""

    def __init__(self, path: Path, required: bool = True) -> None:
        self.path = path
        self.values = read_json_object(path) if required or path.exists() else {}

    def refuse(self, problem: str) -> None:
        raise ConfigError(f"{self.path}: {problem}")

    def get(self, key: str, default: object = None) -> object:
        value = self.values.get(key)
        return default if value is None else value

    def require(self, key: str) -> object:
        value = self.values.get(key)
        if value is None:
            self.refuse(f"the key {key!r} is missing")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        return self.positive_integer(key, self.require(key) if default is None else self.get(key, default))

    def positive_integer(self, key: str, value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{self.path}: {key} must be an integer >= 1, found {value!r}")
        return value

    def number(self, key: str, default: float) -> float:
        return self.positive_number(key, self.get(key, default))

    def positive_number(self, key: str, value: object) -> float:
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not (0 < value < math.inf):
            raise ConfigError(f"{self.path}: {key} must be a number > 0, found {value!r}")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.get(key, False)
        if not isinstance(value, bool):
            raise ConfigError(f"{self.path}: {key} must be true or false, found {value!r}")
        return value

    def ids(self, key: str) -> tuple[int, ...]:
        value = self.get(key, [])
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise ConfigError(f"{self.path}: {key} must be a token id or a list of them, found {value!r}")
        return tuple(ids)

    def table(self, key: str) -> Json:
        value = self.get(key, {})
        if not isinstance(value, dict):
            raise ConfigError(f"{self.path}: {key} must be an object, found {value!r}")
        return value


def read_json_object(path: Path) -> dict[str, object]:
    """The object that a JSON file holds, or ConfigError naming the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; a model directory in Hugging Face format has one") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold a JSON object, found {type(content).__name__}")
    return content


def _architecture(source: _Source) -> str:
    names = source.get("architectures", [])
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(name, str) or name not in SUPPORTED_ARCHITECTURES:
        found = "'architectures' names none" if name is None else f"architecture {name!r} is not supported"
        raise ConfigError(f"{source.path}: {found}; supported: {', '.join(SUPPORTED_ARCHITECTURES)}")
    return name


def _head_dim(source: _Source, architecture: str, heads: int) -> int:
    hidden_size = source.count("hidden_size")
    if source.get("head_dim") is not None:
        head_dim = source.count("head_dim")
    elif architecture == "Qwen3ForCausalLM":
        head_dim = 128  # transformers' default for this family, whatever the hidden size
    elif hidden_size % heads != 0:
        raise ConfigError(
            f"{source.path}: head_dim is missing, "
            f"and num_attention_heads={heads} does not divide hidden_size={hidden_size}"
        )
    else:
        head_dim = hidden_size // heads
    if head_dim % 2 != 0:
        source.refuse(f"head_dim={head_dim} is odd; rotary embeddings turn pairs of dimensions")
    return head_dim


def _rope(source: _Source) -> Rope:
    """From rope_parameters (transformers 5), or from rope_theta and rope_scaling (before)."""
    modern = source.get("rope_parameters") is not None
    key = "rope_parameters" if modern else "rope_scaling"
    table = source.table(key)
    theta = source.positive_number("rope_theta", table.get("rope_theta") or source.get("rope_theta") or 10_000.0)
    kind = table.get("rope_type") or table.get("type") or "default"
    if table.get("partial_rotary_factor") not in (None, 1, 1.0):
        source.refuse(f"{key}.partial_rotary_factor={table['partial_rotary_factor']!r} is not supported")
    if kind == "default":
        return Rope(theta)
    if kind != "llama3":
        source.refuse(f"{key}: rope type {kind!r} is not supported; supported: default, llama3")

    def number(name: str) -> float:
        return source.positive_number(f"{key}.{name}", table.get(name))

    original = source.positive_integer(
        f"{key}.original_max_position_embeddings", table.get("original_max_position_embeddings")
    )
    return Rope(theta, Llama3Scaling(number("factor"), number("low_freq_factor"), number("high_freq_factor"), original))


def _dtype(source: _Source) -> str:
    name = source.get("dtype") or source.get("torch_dtype") or "float32"
    if not isinstance(name, str) or name not in DTYPE_BYTES:
        raise ConfigError(f"{source.path}: dtype {name!r} is not supported; supported: {', '.join(DTYPE_BYTES)}")
    return name


def _default_sampling(generation: _Source) -> DefaultSampling:
    """The file's sampling applies only if it asks to sample; otherwise its numbers are transformers' leftovers."""
    if not generation.flag("do_sample"):
        return DefaultSampling()
    temperature, top_p, top_k = (generation.get(key) for key in ("temperature", "top_p", "top_k"))
    return DefaultSampling(
        temperature=None if temperature is None else generation.positive_number("temperature", temperature),
        top_p=None if top_p is None else generation.positive_number("top_p", top_p),
        top_k=None if top_k in (None, 0) else generation.positive_integer("top_k", top_k),
    )
