"""ModelConfig: the facts of a Hugging Face model directory that placement, loading and computing need.

Read by the coordinator and by every rank from config.json and generation_config.json, as transformers 4 and 5 write
them. It knows no torch and no transformers; anything that Echelon does not compute is refused here by name.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from echelon.errors import ConfigError
from models.families import FAMILIES, FULL, SLIDING, Family, Windows
from models.json_source import JsonSource
from models.latent import LatentAttention, read_latent
from models.quantization import Quantization, read_quantization
from models.rope import Rope, RopeReader
from models.routing import Routing, read_routing

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
ACTIVATIONS = ("silu", "gelu_pytorch_tanh")


@dataclass(frozen=True, slots=True)
class DefaultSampling:
    """What generation_config.json asks for when the request does not say; None where it is silent."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """What may differ from layer to layer. window: a token sees itself and the window - 1 before it; None sees all.

    routing: None for a layer with an MLP.
    """

    window: int | None
    rope: Rope
    routing: Routing | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A decoder-only model. Names are those of config.json; dtype is the one the checkpoint declares.

    attention_scale: what the products of queries and keys are multiplied by. A cap c bends numbers x to
    c * tanh(x / c), those products in attention_cap, the logits in logit_cap. With latent attention all heads read the
    same keys, which begin with the values: num_key_value_heads is 1, head_dim that of queries. prediction_layers: for
    multi-token prediction, behind the others in the checkpoint. prediction: the first of these, where it is computed.
    """

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    layers: tuple[LayerConfig, ...]
    rms_norm_eps: float
    activation: str
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    attention_scale: float
    attention_cap: float | None
    logit_cap: float | None
    dtype: str
    end_ids: tuple[int, ...]
    default_sampling: DefaultSampling
    latent: LatentAttention | None = None
    quantization: Quantization | None = None
    prediction_layers: int = 0
    prediction: LayerConfig | None = None

    def layer(self, number: int) -> LayerConfig:
        """Of a layer by its number in the checkpoint, where that of prediction stands behind the others."""
        if number < len(self.layers):
            return self.layers[number]
        assert self.prediction is not None, f"layer {number} is not computed"
        return self.prediction

    @property
    def family(self) -> Family:
        """What the architecture's name says."""
        return FAMILIES[self.architecture]

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layers)

    @property
    def key_dim(self) -> int:
        """Numbers of a key in the cache."""
        return self.head_dim if self.latent is None else self.latent.cached_numbers

    @property
    def turning_dim(self) -> int:
        """Of a head's numbers those that a rope is for, all or some of which it turns."""
        return self.head_dim if self.latent is None else self.latent.rotary_dim


def read_model_config(
    directory: Path, max_context: int | None = None, *, planning: bool = False, keep_float8: bool = False
) -> ModelConfig:
    """The config of a model directory. Raises ConfigError naming the file and the key.

    max_context: tokens of the longest request that will be served, the model's own limit if None. It chooses between
    the two lists of LongRoPE, and changes nothing else. planning: nothing will be computed, so how a checkpoint is
    quantised does not matter. keep_float8: matrices of 8 bit floats stay what they are.
    """
    outer = JsonSource.read(directory / "config.json")
    architecture, family = _architecture(outer)
    source = _text_config(outer, family)
    _refuse_what_is_not_computed(source, family)
    heads = source.count("num_attention_heads")
    latent = read_latent(source) if family.latent else None
    key_value_heads = 1 if latent else source.count("num_key_value_heads", heads)
    if heads % key_value_heads != 0:
        source.refuse(f"num_key_value_heads={key_value_heads} does not divide num_attention_heads={heads}")
    head_dim = latent.head_dim if latent else _head_dim(source, heads)
    if max_context is None:
        max_context = source.count("max_position_embeddings")
    ropes = RopeReader(source, family, latent.rotary_dim if latent else head_dim, max_context)
    attention_bias = source.flag("attention_bias")
    generation = JsonSource.read(directory / "generation_config.json", required=False)
    return ModelConfig(
        architecture=architecture,
        hidden_size=source.count("hidden_size"),
        intermediate_size=source.count("intermediate_size"),
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=head_dim,
        vocab_size=source.count("vocab_size"),
        max_position_embeddings=source.count("max_position_embeddings"),
        layers=_layers(source, family, ropes),
        rms_norm_eps=source.number("rms_norm_eps", 1e-6),
        activation=_activation(source),
        tie_word_embeddings=source.flag("tie_word_embeddings"),
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        output_bias=attention_bias and family.qkv_bias is None,
        attention_scale=(source.optional_number("query_pre_attn_scalar") or head_dim) ** -0.5 * ropes.score_factor(),
        attention_cap=source.optional_number("attn_logit_softcapping") if family.caps_attention else None,
        logit_cap=source.optional_number("final_logit_softcapping"),
        dtype=_dtype(source),
        end_ids=generation.ids("eos_token_id") or source.ids("eos_token_id"),
        default_sampling=_default_sampling(generation),
        latent=latent,
        quantization=None if planning and not keep_float8 else read_quantization(outer, keep_float8),
        prediction_layers=source.count("num_nextn_predict_layers", 0, minimum=0),
    )


def with_prediction(config: ModelConfig) -> ModelConfig:
    """The same with its first layer for multi-token prediction, which is like the last of the others.

    Raises ConfigError where the model has none.
    """
    if not config.prediction_layers:
        raise ConfigError(
            f"speculation=mtp: {config.architecture} has num_nextn_predict_layers=0, no layer for multi-token "
            "prediction; use speculation=ngram, or a checkpoint that has one",
            field="speculation",
        )
    return replace(config, prediction=config.layers[-1])


def _architecture(source: JsonSource) -> tuple[str, Family]:
    names = source.get("architectures", [])
    name = names[0] if isinstance(names, list) and names else None
    if isinstance(name, str) and name in FAMILIES:
        return name, FAMILIES[name]
    found = "'architectures' names none" if name is None else f"architecture {name!r} is not supported"
    source.refuse(f"{found}; supported: {', '.join(FAMILIES)}")


def _text_config(outer: JsonSource, family: Family) -> JsonSource:
    """The language model's config over the file's own keys over the family's defaults."""
    if family.text_config is None:
        return outer.over(family.defaults)
    outer.require(family.text_config)
    return outer.table(family.text_config).over(outer.values).over(family.defaults)


def _refuse_what_is_not_computed(source: JsonSource, family: Family) -> None:
    for key in ("mlp_bias", "use_bidirectional_attention"):
        if source.flag(key):
            source.refuse(f"{key}=true is not supported")
    cap = source.get("attn_logit_softcapping")
    if cap is not None and not family.caps_attention:
        source.refuse(f"attn_logit_softcapping={cap!r} is not supported for this architecture")


def _layers(source: JsonSource, family: Family, reader: RopeReader) -> tuple[LayerConfig, ...]:
    """Every layer's window, rope and routing."""
    kinds = _layer_kinds(source, family)
    ropes = reader.by_kind()
    window = source.count("sliding_window") if SLIDING in kinds else None
    windows = {FULL: None, SLIDING: window}
    routing = read_routing(source, family.experts, len(kinds))
    return tuple(LayerConfig(windows[kind], ropes[kind], routed) for kind, routed in zip(kinds, routing, strict=True))


def _layer_kinds(source: JsonSource, family: Family) -> list[str]:
    """FULL or SLIDING for each layer: what layer_types says, where the family reads it, or else the family's rule."""
    layers = range(source.count("num_hidden_layers"))
    windowed = source.get("sliding_window") is not None
    match family.windows:
        case Windows.NONE:
            kinds = [FULL for _ in layers]
        case Windows.EVERY_LAYER:
            kinds = [SLIDING if windowed else FULL for _ in layers]
        case Windows.EVERY_LAYER_IF_USED:
            windowed = windowed and source.flag("use_sliding_window")
            kinds = [SLIDING if windowed else FULL for _ in layers]
        case Windows.UPPER_LAYERS:
            windowed = windowed and source.flag("use_sliding_window")
            first = source.count("max_window_layers", minimum=0) if windowed else len(layers)
            kinds = [SLIDING if layer >= first else FULL for layer in layers]
        case Windows.ALL_BUT_EVERY_NTH:
            every = source.count("sliding_window_pattern")
            kinds = [SLIDING if (layer + 1) % every else FULL for layer in layers]
    stated = source.get("layer_types", kinds)
    if not isinstance(stated, list) or len(stated) != len(layers):
        source.refuse(f"layer_types must be a list of num_hidden_layers={len(layers)} kinds, found {stated!r}")
    for kind in stated:
        if kind not in (FULL, SLIDING):
            source.refuse(f"layer_types: {kind!r} is not supported; supported: {FULL}, {SLIDING}")
    uniform = (Windows.NONE, Windows.EVERY_LAYER, Windows.EVERY_LAYER_IF_USED)
    if family.windows in uniform and stated != kinds:
        source.refuse(f"layer_types={stated!r} is not supported; every layer of this architecture is {kinds[0]!r}")
    if SLIDING in stated and not windowed:
        source.refuse(f"layer_types has {SLIDING!r}, but the config has no sliding_window in use")
    return stated


def _activation(source: JsonSource) -> str:
    """hidden_activation where there is one: files that have both mean that one."""
    key = "hidden_act" if source.get("hidden_activation") is None else "hidden_activation"
    name = source.get(key, "silu")
    if not isinstance(name, str) or name not in ACTIVATIONS:
        source.refuse(f"{key}={name!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
    return name


def _head_dim(source: JsonSource, heads: int) -> int:
    hidden_size = source.count("hidden_size")
    if source.get("head_dim") is not None:
        head_dim = source.count("head_dim")
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
    """What the file asks for. What shapes a draw applies only if it asks to draw, and is transformers' leftovers
    otherwise; a penalty applies to greedy decoding too. top_k and min_p of 0 are none."""
    repetition_penalty = generation.optional_number("repetition_penalty")
    if not generation.flag("do_sample"):
        return DefaultSampling(repetition_penalty=repetition_penalty)
    return DefaultSampling(
        temperature=generation.optional_number("temperature"),
        top_p=generation.optional_number("top_p", maximum=1),
        top_k=generation.count("top_k") if generation.get("top_k") else None,
        min_p=generation.optional_number("min_p", maximum=1) if generation.get("min_p") else None,
        repetition_penalty=repetition_penalty,
    )
