"""What the cluster tests serve: models of every family in layouts of every kind, and the products of both.

Data alone. LAYOUTS are gone through thoroughly, PRODUCT (COVER in short) with one test each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from models.families import FULL, SLIDING
from parallel.degrees import Degrees, divisors
from tests.oracle.cases import DEEPSEEK_ODD
from tests.tiny import LLAMA3_ROPE, YARN_ROPE

# Odd on purpose: head_dim is not hidden / heads, the vocabulary is a multiple of nothing, layers are three.
ODD: dict[str, object] = {
    "hidden_size": 60,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 14,
    "intermediate_size": 88,
}
ODD |= {"num_hidden_layers": 3, "vocab_size": 331}
ODD_BY_THREE = ODD | {"num_key_value_heads": 3, "intermediate_size": 90}

LLAMA3: dict[str, object] = {"rope_parameters": LLAMA3_ROPE}
TIED_ODD = ODD | {"tie_word_embeddings": True}
WINDOWS: dict[str, object] = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}
# An original context of one token: transformers, too, turns all of them by the long factors.
LONGROPE: dict[str, object] = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 6,
        "long_factor": [1.0, 1.5, 2.5, 6.0, 20.0, 40.0],
        "attention_factor": 1.2,
        "partial_rotary_factor": 0.75,
    },
    "original_max_position_embeddings": 1,
    "sliding_window": 24,
}
# A dense layer, then two with experts, those of the best groups; YaRN scales rotations and scores, each otherwise.
DEEPSEEK: dict[str, object] = {
    "num_hidden_layers": 3,
    "topk_method": "group_limited_greedy",
    "routed_scaling_factor": 1.5,
    "rope_parameters": YARN_ROPE | {"mscale": 1.0, "mscale_all_dim": 0.7},
}
DEEPSEEK_V3 = DEEPSEEK | {"topk_method": "noaux_tc", "n_shared_experts": 2}
# Without groups, a query of one matrix, and sizes that are multiples of nothing.
DEEPSEEK_LITE = DEEPSEEK_ODD | {"intermediate_size": 98, "topk_method": "greedy", "n_shared_experts": 2}
MOE: dict[str, object] = {"num_hidden_layers": 3, "mlp_only_layers": [1], "norm_topk_prob": True}
WINDOW: dict[str, object] = {"sliding_window": 24}
TIED: dict[str, object] = {"tie_word_embeddings": True}
BIASED: dict[str, object] = {"attention_bias": True, "num_key_value_heads": 1, "vocab_size": 322}


@dataclass(frozen=True, slots=True)
class Layout:
    """A checkpoint's family and shape, the degrees, and the other flags it is served with."""

    family: str
    degrees: Degrees
    shape: Mapping[str, Any]
    flags: Mapping[str, Any] = field(default_factory=dict)
    long: bool = False

    @property
    def checkpoint(self) -> str:
        """The same for layouts that share a checkpoint."""
        return f"{self.family} {self.shape}"

    @property
    def all_flags(self) -> dict[str, Any]:
        """Those of `echelon serve`, the model's left out."""
        degrees = {name: getattr(self.degrees, name) for name in ("pipeline", "data", "tensor", "expert")}
        return degrees | dict(self.flags)

    def __str__(self) -> str:
        """Family and degrees above 1."""
        return "-".join([self.family, *(f"{name}-{count}" for name, count in self.all_flags.items() if count != 1)])


CHUNKED = {"max_step_tokens": 7, "max_running": 7}
LAYOUTS = {
    "llama-1": Layout("llama", Degrees(), LLAMA3, long=True),
    "llama-2": Layout("llama", Degrees(tensor=2), LLAMA3, long=True),
    "qwen3-1-chunked": Layout("qwen3", Degrees(), TIED_ODD, CHUNKED),
    "qwen3-pipeline-2-tensor-2": Layout("qwen3", Degrees(pipeline=2, tensor=2), TIED_ODD, long=True),
    "qwen3-2": Layout("qwen3", Degrees(tensor=2), TIED_ODD, long=True),
    "phi3-1-chunked": Layout("phi3", Degrees(), LONGROPE, CHUNKED, long=True),
    "gemma2-2": Layout("gemma2", Degrees(tensor=2), {}, long=True),
    "llama-2-chunked": Layout("llama", Degrees(tensor=2), LLAMA3, CHUNKED, long=True),
    "llama-1-plain": Layout("llama", Degrees(), {}, long=True),
    "llama-1-biased": Layout("llama", Degrees(), BIASED, long=True),
    "llama-2-biased": Layout("llama", Degrees(tensor=2), BIASED, long=True),  # one KV head, on both ranks
    "llama-3-odd": Layout("llama", Degrees(tensor=3), ODD_BY_THREE, long=True),
    "qwen3-1": Layout("qwen3", Degrees(), TIED_ODD, long=True),
    "qwen3-2-chunked": Layout("qwen3", Degrees(tensor=2), TIED_ODD, CHUNKED, long=True),
    "qwen2-2": Layout("qwen2", Degrees(tensor=2), TIED, long=True),
    "mistral-2-chunked": Layout("mistral", Degrees(tensor=2), WINDOW, CHUNKED, long=True),
    "qwen3-2-upper-windows": Layout("qwen3", Degrees(tensor=2), WINDOWS, long=True),
    "phi3-2": Layout("phi3", Degrees(tensor=2), LONGROPE, long=True),
    "phi3-3-odd": Layout("phi3", Degrees(tensor=3), ODD_BY_THREE, long=True),
    "gemma2-1-chunked": Layout("gemma2", Degrees(), {}, CHUNKED, long=True),
    "gemma3-1": Layout("gemma3", Degrees(), {}, long=True),
    "gemma3-2-chunked": Layout("gemma3", Degrees(tensor=2), {}, CHUNKED, long=True),
    "qwen3-moe-2-expert-2-chunked": Layout("qwen3-moe", Degrees(tensor=2, expert=2), MOE, CHUNKED, long=True),
    "qwen3-moe-2": Layout("qwen3-moe", Degrees(tensor=2), MOE, long=True),
    "mixtral-1": Layout("mixtral", Degrees(), WINDOW, long=True),
    "mixtral-2-expert-2": Layout("mixtral", Degrees(tensor=2, expert=2), WINDOW, long=True),
    "mixtral-4-expert-2": Layout("mixtral", Degrees(tensor=4, expert=2), WINDOW, long=True),
    "mixtral-2-expert-2-pipeline-2": Layout("mixtral", Degrees(pipeline=2, tensor=2, expert=2), WINDOW, long=True),
    "deepseek-v2-2-chunked": Layout("deepseek-v2", Degrees(tensor=2), DEEPSEEK, CHUNKED, long=True),
    "deepseek-v2-lite-pipeline-2": Layout("deepseek-v2-lite", Degrees(pipeline=2), DEEPSEEK, long=True),
    "deepseek-v2-lite-data-2-expert-2": Layout("deepseek-v2-lite", Degrees(data=2, expert=2), DEEPSEEK_LITE, long=True),
    "deepseek-v2-lite-2": Layout("deepseek-v2-lite", Degrees(tensor=2), DEEPSEEK_LITE, long=True),
    "deepseek-v3-2-expert-2": Layout("deepseek-v3", Degrees(tensor=2, expert=2), DEEPSEEK_V3, long=True),
    "qwen3-4": Layout("qwen3", Degrees(tensor=4), {"head_dim": 32, "num_key_value_heads": 4}, long=True),
}

# A family and its degrees meet every other's: each two of them in one layout at least, up to four ranks.
COVER = [
    Layout("llama", Degrees(pipeline=2, tensor=2), LLAMA3),
    Layout("llama", Degrees(data=2), LLAMA3),
    Layout("qwen3", Degrees(data=2, tensor=2), TIED_ODD),
    Layout("qwen3", Degrees(pipeline=2), TIED_ODD),
    Layout("gemma2", Degrees(pipeline=2, data=2), {}),
    Layout("gemma2", Degrees(tensor=2), {}),
    Layout("mixtral", Degrees(pipeline=2, tensor=2), WINDOW),
    Layout("mixtral", Degrees(data=2, expert=2), WINDOW),
    Layout("qwen3-moe", Degrees(tensor=2, expert=2), MOE),
    Layout("qwen3-moe", Degrees(pipeline=2, data=2, expert=2), MOE),
    Layout("qwen3-moe", Degrees(pipeline=3), MOE),
]

THREE_LAYERS: dict[str, object] = {"num_hidden_layers": 3}
SHAPES: dict[str, Mapping[str, object]] = {
    "llama": LLAMA3 | THREE_LAYERS,
    "mistral": WINDOW | THREE_LAYERS,
    "qwen2": TIED | THREE_LAYERS,
    "qwen3": TIED | THREE_LAYERS,
    "phi3": LONGROPE | THREE_LAYERS,
    "gemma2": THREE_LAYERS,
    "gemma3": THREE_LAYERS | {"layer_types": [SLIDING, FULL, SLIDING]},
    "mixtral": WINDOW | THREE_LAYERS,
    "qwen3-moe": MOE,
    "deepseek-v2": DEEPSEEK,
    "deepseek-v3": DEEPSEEK_V3,
}
WITH_EXPERTS = ("mixtral", "qwen3-moe", "deepseek-v2", "deepseek-v3")
MOST_RANKS = 4


def _product() -> Iterator[Layout]:
    """Every family in every layout of up to four ranks; a data rank or a tensor rank more than two is four."""
    cuts = [(p, d, t) for p in (1, 2, 3) for d in (1, 2, 4) for t in (1, 2, 4) if p * d * t <= MOST_RANKS]
    for family, shape in SHAPES.items():
        for pipeline, data, tensor in cuts:
            for expert in divisors(data * tensor) if family in WITH_EXPERTS else (1,):
                degrees = Degrees(pipeline=pipeline, data=data, tensor=tensor, expert=expert)
                yield Layout(family, degrees, shape, long=True)


EIGHT_RANKS = Degrees(pipeline=2, data=2, tensor=2, expert=4)
PRODUCT = [*_product(), Layout("mixtral", EIGHT_RANKS, SHAPES["mixtral"], long=True)]


def pairs(layouts: Iterable[Layout]) -> set[tuple[tuple[str, object], tuple[str, object]]]:
    """Each two of family and degrees that meet in one of the layouts; more than 2 ranks are as 2."""
    found: set[tuple[tuple[str, object], tuple[str, object]]] = set()
    for layout in layouts:
        degrees = layout.degrees
        factors: list[tuple[str, object]] = [("family", layout.family)]
        factors += [(name, min(getattr(degrees, name), 2)) for name in ("pipeline", "data", "tensor", "expert")]
        found.update(combinations(factors, 2))
    return found
