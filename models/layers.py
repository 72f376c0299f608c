"""The layers of a decoder: normalization, rotary positions, self-attention, the gated MLP, and their weights.

In rank processes. Norms and rotations are computed in float32 inside, as transformers does, so that its results are
met to the last bits. Layers know their own tensors and the attention they are handed, no batch and no cache.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention import Places
from models.attention_rule import AttentionRule
from models.parameter import Parameter
from models.prefill_attention import LatentHeads
from models.rope import LinearScaling, Llama3Scaling, LongRopeScaling, Rope, YarnScaling
from parallel import kernels
from parallel.context import ParallelContext
from parallel.expert import ExpertStep
from parallel.float8 import Float8, Matrix
from parallel.linear import takes_few
from parallel.tensor import ColumnLinear, RowLinear

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_pytorch_tanh": functools.partial(F.gelu, approximate="tanh"),
}


class Weights:
    """This rank's share of a parameter table: every tensor is allocated, uninitialized, when a layer takes it.

    shards maps each checkpoint name to the tensor, or the part of a stacked one, that the loader must fill.
    """

    def __init__(self, table: Sequence[Parameter], context: ParallelContext) -> None:
        self._pending = {parameter.name: parameter for parameter in table}
        self._context = context
        self._shards: dict[str, Tensor] = {}

    def take(self, *names: str) -> Tensor:
        """One tensor that stacks the named ones along dim 0."""
        context, taken = self._context, [self._pending.pop(name) for name in names]
        shapes = [parameter.held_shape(context.place.degrees) for parameter in taken]
        rows = [shape[0] for shape in shapes]
        dtype = getattr(torch, taken[0].held_dtype(str(context.dtype).removeprefix("torch.")))
        stacked = torch.empty((sum(rows), *shapes[0][1:]), device=context.device, dtype=dtype)
        self._shards.update(zip(names, torch.split(stacked, rows), strict=True))
        return stacked

    def matrix(self, *names: str) -> Matrix:
        """The same of matrices that are multiplied by, which the table may leave 8 bit floats, with scales."""
        block, scales = self._pending[names[0]].block, [self._pending[name].scales for name in names]
        weight = self.take(*names)
        return weight if block is None else Float8(weight, self.take(*scales), block)

    def shards(self) -> Mapping[str, Tensor]:
        """All of them; every tensor of the table has a layer that took it."""
        assert not self._pending, f"no layer took {sorted(self._pending)}"
        return self._shards


def takes_rows(rows: Tensor) -> bool:
    """Whether the kernels of rows, one launch each, take these."""
    fits = rows.dtype in kernels.DTYPES and rows.dim() in (2, 3) and rows.stride(-1) == 1
    return fits and kernels.can_run(rows.device)


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """Divides by the root mean square over the last dim, then scales: by the weight, in the dtype of x; or, from one,
    by 1 + weight in float32."""

    weight: Tensor
    epsilon: float
    from_one: bool

    def __call__(self, x: Tensor) -> Tensor:
        if takes_rows(x) and self.weight.dtype == x.dtype:
            from models.kernels.rows import rms_norm

            return rms_norm(x, self.weight, self.epsilon, self.from_one)
        return self.plain(x)

    def of_sum(self, stream: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor]:
        """[T, hidden] each -> their sum, and that normalized."""
        if added is None:
            return stream, self(stream)
        whole = stream.is_contiguous() and added.is_contiguous()
        if whole and takes_rows(stream) and self.weight.dtype == stream.dtype == added.dtype:
            from models.kernels.rows import add_and_norm

            return add_and_norm(stream, added, self.weight, self.epsilon, self.from_one)
        total = stream + added
        return total, self(total)

    def plain(self, x: Tensor) -> Tensor:
        """The same, on every device, step by step."""
        wide = x.float()
        normalized = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.epsilon)
        if self.from_one:
            return (normalized * (1.0 + self.weight.float())).to(x.dtype)
        return self.weight * normalized.to(x.dtype)


@dataclass(frozen=True, slots=True)
class Rotation:
    """Cosines and sines of some positions, [T, 1, rotary_dim], to turn the first numbers of each head of heads
    [T, heads, head_dim].

    The numbers of a pair are half of rotary_dim apart; interleaved, they are neighbours, and come apart as they turn.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = False

    def __call__(self, heads: Tensor) -> Tensor:
        if takes_rows(heads):
            from models.kernels.rows import rotate

            return rotate(heads, self.cos, self.sin, self.interleaved)
        return self.plain(heads)

    def plain(self, heads: Tensor) -> Tensor:
        """The same, on every device, step by step."""
        turning, staying = torch.tensor_split(heads, (self.cos.shape[-1],), dim=-1)
        if self.interleaved:
            turning = turning.unflatten(-1, (-1, 2)).mT.flatten(-2)
        turning = turning.to(self.cos.dtype)
        first, second = turning.chunk(2, dim=-1)
        turned = (turning * self.cos + torch.cat((-second, first), dim=-1) * self.sin).to(heads.dtype)
        return torch.cat((turned, staying), dim=-1) if staying.shape[-1] else turned


@dataclass(frozen=True, slots=True)
class RotaryEmbedding:
    """Makes the rotation of a batch's positions, scaled; frequencies [rotary_dim / 2] float32 on the device."""

    frequencies: Tensor
    scale: float
    interleaved: bool = False

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        angles = positions[:, None].float() * self.frequencies
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
        cos, sin = (angles.cos() * self.scale).to(dtype), (angles.sin() * self.scale).to(dtype)
        return Rotation(cos, sin, self.interleaved)


def rotary_frequencies(head_dim: int, rope: Rope) -> Tensor:
    """Radians per position of each pair of numbers that is turned: [rotary_dim / 2] float32 on the CPU."""
    rotary_dim = rope.rotary_dim(head_dim)
    periods = rope.theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim)
    match rope.scaling:
        case None:
            return 1.0 / periods
        case LinearScaling(factor):
            return 1.0 / periods / factor
        case Llama3Scaling() as scaling:
            return _llama3_frequencies(1.0 / periods, scaling)
        case YarnScaling() as scaling:
            return _yarn_frequencies(periods, rope.theta, scaling)
        case LongRopeScaling(factors):
            return 1.0 / (torch.tensor(factors) * periods)


def _llama3_frequencies(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    wavelengths = 2 * math.pi / frequencies
    short = scaling.original_max_position_embeddings / scaling.high_freq_factor
    long = scaling.original_max_position_embeddings / scaling.low_freq_factor
    turns = scaling.original_max_position_embeddings / wavelengths
    ramp = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blended = (1 - ramp) * frequencies / scaling.factor + ramp * frequencies
    stretched = torch.where(wavelengths > long, frequencies / scaling.factor, blended)
    return torch.where(wavelengths < short, frequencies, stretched)


def _yarn_frequencies(periods: Tensor, theta: float, scaling: YarnScaling) -> Tensor:
    head_dim = 2 * len(periods)

    def pair_that_turns(times: float) -> float:
        """Which pair turns so often in the original context, as a fraction between pairs."""
        wavelength = scaling.original_max_position_embeddings / (times * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(theta))

    first, last = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    span = last - first or 0.001
    kept = 1 - ((torch.arange(len(periods), dtype=torch.float32) - first) / span).clamp(0, 1)
    return 1.0 / (scaling.factor * periods) * (1 - kept) + 1.0 / periods * kept


class Attend(Protocol):
    """Attention of a batch: what the queries of a layer read, once new keys and values are in their places."""

    def places(self, layer: int) -> Places: ...
    def __call__(self, layer: int, rule: AttentionRule, query: Tensor) -> Tensor: ...
    def latent(self, layer: int, rule: AttentionRule, heads: LatentHeads) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class SelfAttention:
    """Projections around attention. qkv stacks this rank's query, key and value heads, in this order."""

    layer: int
    rule: AttentionRule
    head_dim: int
    head_counts: list[int]
    qkv: ColumnLinear
    query_norm: RMSNorm | None
    key_norm: RMSNorm | None
    output: RowLinear

    def __call__(self, hidden: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        heads = self.qkv(hidden).view(hidden.shape[0], sum(self.head_counts), self.head_dim)
        query = self.placed(heads, rotation, attend.places(self.layer))
        return self.output(attend(self.layer, self.rule, query).flatten(1))

    def placed(self, heads: Tensor, rotation: Rotation, places: Places) -> Tensor:
        """Puts keys, normalized and rotated, and values in their places. heads [T, all heads, head_dim] -> queries."""
        if takes_rows(heads) and heads.is_contiguous() and places.values is not None:
            from models.kernels.heads import place_heads

            return place_heads(heads, self.query_norm, self.key_norm, rotation, places)
        query, key, value = torch.split(heads, self.head_counts, dim=1)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        places.put(rotation(key), value)
        return rotation(query)


@dataclass(frozen=True, slots=True)
class GatedMlp:
    """down(activation(gate(x)) * up(x)); gate_up stacks this rank's gate rows and up rows. The step is for experts."""

    gate_up: ColumnLinear
    activation: Callable[[Tensor], Tensor]
    down: RowLinear

    def __call__(self, hidden: Tensor, step: ExpertStep) -> Tensor:
        return self.down(self._gated(hidden))

    def _gated(self, hidden: Tensor) -> Tensor:
        """[T, this rank's neurons]: in one launch for few rows, in two for others."""
        weight, bias = self.gate_up.weight, self.gate_up.bias
        if isinstance(weight, Tensor) and self.activation is F.silu and bias is None and takes_few(hidden, weight):
            from parallel.kernels.linear import gated_of_few_rows

            return gated_of_few_rows(hidden, weight)
        return gated(self.gate_up(hidden), self.activation)


def gated(gate_up: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """gate_up [r, 2 * n], gate first -> activation(gate) * up, [r, n]."""
    if activation is F.silu and takes_rows(gate_up):
        from models.kernels.rows import silu_and_multiply

        return silu_and_multiply(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return activation(gate) * up
