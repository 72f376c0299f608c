"""The census of a model: its parameter table counted once, tensors of the same kind together.

Pure, for the planner, which asks for the bytes of hundreds of layouts; a model of experts has tens of thousands of
tensors of a dozen kinds. What it adds up to on a rank is what `models.tables.parameter_bytes` says of that rank.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from enum import StrEnum

from models.config import ModelConfig
from models.parameter import FLOAT8_BYTES, WIDE_BYTES, splitting_ranks
from models.routing import Routing
from models.tables import EMBEDDING, HEAD, cached_numbers, parameter_table, tensor_name
from parallel.degrees import Degrees
from parallel.partition import cut
from parallel.sharding import Blocks, Placement, Shape, held_shape


class Part(StrEnum):
    """What a tensor is to a step: read in rows, for every token, for tokens that choose it, for sampled tokens."""

    EMBEDDING = "embedding"
    EVERY_TOKEN = "every_token"
    EXPERT = "expert"
    HEAD = "head"


@dataclass(frozen=True, slots=True)
class Kind:
    """Tensors that are alike. shared and wide: as `models.tables.Parameter` has it. float8: they stay 8 bit floats."""

    part: Part
    shape: Shape
    placement: Placement
    shared: bool
    wide: bool
    float8: bool

    def bytes_of_number(self, weight_bytes: int) -> int:
        """Of each of them in a model of so many."""
        return FLOAT8_BYTES if self.float8 else max(WIDE_BYTES, weight_bytes) if self.wide else weight_bytes


Kinds = tuple[tuple[Kind, int], ...]  # each kind, and how many tensors are of it


@dataclass(frozen=True, slots=True)
class Numbers:
    """How many numbers of each part a rank holds; wide: how many of all these are kept in float32 at least; shared: how
    many of those for every token stand beside experts; float8, float8_experts: how many of those for every token, and
    of experts, stay 8 bit floats."""

    embedding: int = 0
    every_token: int = 0
    expert: int = 0
    head: int = 0
    wide: int = 0
    shared: int = 0
    float8: int = 0
    float8_experts: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.embedding + self.every_token + self.expert + self.head


@dataclass(frozen=True, slots=True)
class Census:
    """A model's kinds of tensors: outside its layers, and by patterns that layers share; patterns[of_layer[i]] is i's.

    The layer of prediction, where there is one, stands behind the others. weight_bytes: of a weight; number_bytes: of a
    key, a value or an activation.
    """

    config: ModelConfig
    outside: Kinds
    patterns: tuple[Kinds, ...]
    of_layer: tuple[int, ...]
    weight_bytes: int
    number_bytes: int

    @property
    def routing(self) -> Routing | None:
        """Of the layers with experts, None if there are none."""
        return next((layer.routing for layer in self.config.layers if layer.routing is not None), None)

    @property
    def parameters(self) -> int:
        """Numbers of the model, each once."""
        inside = sum(_numbers(self.patterns[pattern]) for pattern in self.of_layer)
        return inside + _numbers(self.outside)

    @property
    def total_bytes(self) -> int:
        """Of the model's weights, each once."""
        kinds = [*self.outside, *(entry for pattern in self.of_layer for entry in self.patterns[pattern])]
        return sum(count * math.prod(kind.shape) * kind.bytes_of_number(self.weight_bytes) for kind, count in kinds)

    @property
    def parameters_per_token(self) -> int:
        """Those that one token passes through; of the embedding it reads one row."""
        routing = self.routing
        share = 1.0 if routing is None else routing.experts_per_token / routing.experts
        kinds = [*self.outside, *(entry for pattern in self.of_layer for entry in self.patterns[pattern])]
        tied = self.config.tie_word_embeddings
        weights = {Part.EMBEDDING: 1.0 if tied else 0.0, Part.EXPERT: share}
        return round(sum(weights.get(kind.part, 1.0) * _numbers(((kind, count),)) for kind, count in kinds))

    def cut(self, pipeline: int) -> tuple[range, ...]:
        """The layers of each stage: those of `models.tables.stage_layers`, without making the table again."""
        numbers = [_numbers(self.patterns[pattern]) for pattern in self.of_layer]
        count, head = self.config.num_hidden_layers, self.config.vocab_size * self.config.hidden_size
        return cut(numbers[:count], pipeline, last=head + sum(numbers[count:]))

    def computed(self, layers: range) -> range:
        """Of a stage with these layers, that of prediction included on the last."""
        last = layers.stop == self.config.num_hidden_layers
        return range(layers.start, len(self.of_layer) if last else layers.stop)

    def held(self, degrees: Degrees, layers: range, stage: int) -> Numbers:
        """What each rank of a stage holds. Ranks of a stage hold alike many: padding makes them equal."""
        counts: Counter[Part] = Counter()
        wide = shared = float8 = float8_experts = 0
        for pattern, times in Counter(self.of_layer[layer] for layer in self.computed(layers)).items():
            for kind, count in self.patterns[pattern]:
                held = times * _held(kind, count, degrees)
                counts[kind.part] += held
                wide += held * kind.wide
                shared += held * kind.shared
                float8 += held * (kind.float8 and kind.part is not Part.EXPERT)
                float8_experts += held * (kind.float8 and kind.part is Part.EXPERT)
        first, last = stage == 0, stage == degrees.pipeline - 1
        embeds = first or (last and self.config.prediction is not None)
        for kind, count in self.outside:
            held = _held(kind, count, degrees)
            if kind.part is not Part.EMBEDDING:
                counts[kind.part] += held if last else 0
            elif last and self.config.tie_word_embeddings:  # the head, whether the first stage has it too or not
                counts[Part.HEAD] += held
            else:
                counts[kind.part] += held if embeds else 0
        special = {"wide": wide, "shared": shared, "float8": float8, "float8_experts": float8_experts}
        return Numbers(**{part.value: count for part, count in counts.items()}, **special)

    def bytes_of(self, numbers: Numbers) -> int:
        """Of weights."""
        wide_bytes = numbers.wide * max(0, WIDE_BYTES - self.weight_bytes)
        saved_bytes = (numbers.float8 + numbers.float8_experts) * (self.weight_bytes - FLOAT8_BYTES)
        return numbers.total * self.weight_bytes + wide_bytes - saved_bytes

    def kv_bytes_per_token(self, degrees: Degrees, layers: range) -> int:
        """Of keys and values on a rank that computes these layers."""
        return len(self.computed(layers)) * cached_numbers(self.config, degrees.tensor) * self.number_bytes

    def pair_flop(self, decode: bool) -> int:
        """Of a head, for a query and a key: their product, and the value's share in the sum.

        Latent attention decodes on what is cached, all heads alike; for prompts the floor is that of keys and values of
        heads made of it.
        """
        latent = self.config.latent
        if latent is None:
            return 4 * self.config.head_dim
        if decode:
            return 2 * (latent.cached_numbers + latent.rank)
        return 2 * (latent.head_dim + latent.value_dim)


def take_census(config: ModelConfig, weight_bytes: int, number_bytes: int) -> Census:
    """Count a model's tensors."""
    parts = {tensor_name(config, EMBEDDING): Part.EMBEDDING, tensor_name(config, HEAD): Part.HEAD}
    counts: defaultdict[int | None, Counter[Kind]] = defaultdict(Counter)
    for parameter in parameter_table(config):
        part = Part.EXPERT if parameter.expert is not None else parts.get(parameter.name, Part.EVERY_TOKEN)
        narrow = parameter.block is not None
        kind = Kind(part, parameter.shape, parameter.placement, parameter.shared, parameter.wide, narrow)
        counts[parameter.layer][kind] += 1
    layers = config.num_hidden_layers + (config.prediction is not None)
    by_layer = [tuple(counts[layer].items()) for layer in range(layers)]
    patterns = tuple(dict.fromkeys(by_layer))
    of_layer = tuple(map(patterns.index, by_layer))
    return Census(config, tuple(counts[None].items()), patterns, of_layer, weight_bytes, number_bytes)


def _numbers(kinds: Kinds) -> int:
    """Of the model: scales are none."""
    return sum(count * math.prod(kind.shape) for kind, count in kinds if not isinstance(kind.placement, Blocks))


def _held(kind: Kind, count: int, degrees: Degrees) -> int:
    """Numbers on one rank: an expert lives on the ranks of its group, which split it; all else is on all of a stage."""
    expert = kind.part is Part.EXPERT
    size = splitting_ranks(degrees, expert=expert, shared=kind.shared)
    return (count // degrees.expert if expert else count) * math.prod(held_shape(kind.shape, kind.placement, size))
