"""Weights of no training: a pure function of a tensor's name and the place of a number in it.

In every rank, in place of the loader, to measure speed by. A rank makes the parts that it holds, on its device, without
the rest, so every layout has the same model, bit for bit, and so has a rank that comes back. Reads no file.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from models.config import ModelConfig
from models.decoder import DecoderModel
from models.parameter import Parameter
from models.tables import held_parameters
from parallel.context import ParallelContext
from parallel.sharding import Region, Shape, region_shape
from worker.loader import Progress
from worker.noise import random_bits

SEED = 0
STANDARD_DEVIATION = 0.02  # initializer_range of most published models
ELEMENTS_AT_ONCE = 1 << 22
_FIELD = (1 << 16) - 1
_FIELDS = (0, 16, 32, 48)  # of the 64 bits of a number
_FIELD_DEVIATION = math.sqrt(((_FIELD + 1) ** 2 - 1) / 12)  # of one that is uniform from 0 to _FIELD


def fill_randomly(model: DecoderModel, config: ModelConfig, context: ParallelContext, progress: Progress) -> int:
    """Fills every tensor of the model and returns their bytes; progress(filled_bytes, total_bytes) after each."""
    parameters = held_parameters(config, context.place)
    norm = 0.0 if config.family.norms_from_one else 1.0
    filled_bytes, total_bytes = 0, sum(model.shards[parameter.name].nbytes for parameter in parameters)
    for parameter in parameters:
        held = unfilled = model.shards[parameter.name]
        for region in parameter.held_regions(context.place):
            for rows in _rows(parameter, region, norm, held.device):
                unfilled[: len(rows)].copy_(rows)
                unfilled = unfilled[len(rows) :]
        unfilled.zero_()  # the vocabulary's padding
        filled_bytes += held.nbytes
        progress(filled_bytes, total_bytes)
    return filled_bytes


def _rows(parameter: Parameter, region: Region, norm: float, device: torch.device) -> Iterator[Tensor]:
    """Of a region, some at a time."""
    if len(parameter.shape) == 1 and parameter.name.endswith(".weight"):  # all else of one dim is a bias
        yield torch.full(region_shape(region), norm, device=device)
        return
    key = torch.tensor(_key(parameter.name), device=device)
    most = max(1, ELEMENTS_AT_ONCE // math.prod(region_shape(region)[1:]))
    rows, *rest = region
    for first in range(rows.start, rows.stop, most):
        part = slice(first, min(first + most, rows.stop))
        yield nearly_normal(key, elements(parameter.shape, (part, *rest), device))


def nearly_normal(key: Tensor, places: Tensor) -> Tensor:
    """Of standard deviation 0.02, in float64: the sum of four uniform numbers of 16 bits (Irwin-Hall), so at most 3.5
    deviations from 0. Sums of integers and one product round alike on every device, as logarithms do not."""
    bits = random_bits(key, places)
    total = torch.zeros_like(bits)
    for shift in _FIELDS:
        total += (bits >> shift) & _FIELD
    middle, deviation = len(_FIELDS) * _FIELD // 2, _FIELD_DEVIATION * math.sqrt(len(_FIELDS))
    return (total - middle).to(torch.float64) * (STANDARD_DEVIATION / deviation)


def elements(shape: Shape, region: Region, device: torch.device) -> Tensor:
    """The place of each number of a region in the whole tensor, its last dim fastest: int64 of the region's shape."""
    places = torch.zeros((), dtype=torch.int64, device=device)
    for dim, part in enumerate(region):
        stride = math.prod(shape[dim + 1 :])
        own = torch.arange(part.start, part.stop, device=device) * stride
        places = places.unsqueeze(-1) + own
    return places


def _key(name: str) -> int:
    digest = hashlib.sha256(f"{SEED} {name}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)
