"""What each stage of a layout holds: layers, heads, experts, and the bytes of weights, step and KV cache on a rank.

Pure, for the planner. Weights are exact, being the parameter table's; what a step needs is an estimate of its largest
tensors, which ranks measure when they start. The rest of the memory is KV cache.
"""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.plan.census import Census, Numbers
from coordinator.plan.hardware import Machines
from models.tables import kv_heads_held
from parallel.degrees import Degrees

BLOCK_TOKENS = 16  # of the KV cache
SCORE_COPIES = 4  # of sampled rows in float32: logits, what rules make of them, the sorted ones, probabilities
UNEVEN = 2  # rows on the busiest expert rank over the mean, allowed for


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Tokens of the longest request, of one step of a data rank, and requests at once on all data ranks together."""

    max_context: int
    step_tokens: int = 2048
    requests: int = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class StageLoad:
    """What each rank of a stage holds. experts: whole or in part, in each layer that has some."""

    stage: int
    layers: range
    heads: int
    key_value_heads: int
    experts: int
    numbers: Numbers
    weight_bytes: int
    step_bytes: int
    kv_bytes_per_token: int
    usable_bytes: float

    @property
    def room_bytes(self) -> int:
        """For the KV cache; negative where weights and step alone do not fit."""
        return int(self.usable_bytes) - self.weight_bytes - self.step_bytes

    @property
    def kv_tokens(self) -> int:
        """What the room holds, in whole blocks."""
        return max(self.room_bytes, 0) // (BLOCK_TOKENS * self.kv_bytes_per_token) * BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class Load:
    """What a layout holds, stage by stage."""

    degrees: Degrees
    stages: tuple[StageLoad, ...]

    @property
    def tightest(self) -> StageLoad:
        """The stage whose ranks can hold the fewest tokens."""
        return min(self.stages, key=lambda stage: (stage.kv_tokens, stage.room_bytes))

    @property
    def pool_tokens(self) -> int:
        """Of KV cache that the requests of one data rank share."""
        return self.tightest.kv_tokens

    @property
    def pools(self) -> int:
        """Data ranks of all replicas: each has requests and KV cache of its own."""
        return self.degrees.replicas * self.degrees.data

    def requests(self, tokens: int) -> int:
        """How many requests of so many tokens the KV cache holds at once."""
        return self.pools * (self.pool_tokens // (-(-tokens // BLOCK_TOKENS) * BLOCK_TOKENS))

    def fits(self, limits: Limits) -> bool:
        """Whether every data rank can hold one request of max_context tokens."""
        return self.requests(limits.max_context) > 0


def load(census: Census, degrees: Degrees, cut: tuple[range, ...], machines: Machines, limits: Limits) -> Load:
    """What a layout holds; cut: the layers of each stage. The degrees must divide the model."""
    config, routing = census.config, census.routing
    stages = []
    for stage, layers in enumerate(cut):
        numbers = census.held(degrees, layers, stage)
        routed = routing is not None and any(config.layer(layer).routing for layer in census.computed(layers))
        stages.append(
            StageLoad(
                stage=stage,
                layers=layers,
                heads=config.num_attention_heads // degrees.tensor,
                key_value_heads=kv_heads_held(config, degrees.tensor),
                experts=routing.experts // degrees.expert if routing is not None and routed else 0,
                numbers=numbers,
                weight_bytes=census.bytes_of(numbers),
                step_bytes=_step_bytes(census, degrees, limits, last=stage == degrees.pipeline - 1),
                kv_bytes_per_token=census.kv_bytes_per_token(degrees, layers),
                usable_bytes=machines.usable_bytes,
            )
        )
    return Load(degrees, tuple(stages))


def _step_bytes(census: Census, degrees: Degrees, limits: Limits, last: bool) -> int:
    """The largest tensors of one step: the hidden state, the larger of attention and MLP or experts, the scores."""
    config, tokens, tensor = census.config, limits.step_tokens, degrees.tensor
    attention = (2 * config.num_attention_heads // tensor + 2 * kv_heads_held(config, tensor)) * config.head_dim
    if (latent := config.latent) is not None:  # queries, the same in the latent space, and what they read there
        attention = config.num_attention_heads // tensor * (latent.head_dim + latent.cached_numbers + latent.rank)
    widest = max(attention, 3 * config.intermediate_size // tensor) * tokens
    if (routing := census.routing) is not None:
        rows = UNEVEN * tokens * degrees.data * routing.experts_per_token // degrees.expert
        widest = max(widest, rows * (2 * config.hidden_size + 3 * routing.neurons // degrees.expert_tensor))
    sampled = -(-limits.requests // (degrees.replicas * degrees.data))
    scores = SCORE_COPIES * 4 * -(-sampled // tensor) * config.vocab_size if last else 0
    return census.number_bytes * (4 * tokens * config.hidden_size + widest) + scores
