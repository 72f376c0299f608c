"""Loads a rank's share of a checkpoint, and reads nothing else of it.

In every rank. The parameter table says which parts of each tensor this rank holds; the model says which resident
tensor takes it. The directory was checked by the coordinator before.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from torch import Tensor

from models.config import ModelConfig
from models.decoder import DecoderModel
from models.files import checkpoint_index
from models.parameter import Parameter
from models.stored import ELEMENT_BYTES, FLOAT8
from models.tables import held_parameters, is_of_prediction, parameter_table
from parallel.context import ParallelContext
from parallel.degrees import Place
from parallel.sharding import region_shape
from worker.parts import Part, Scales, plain_parts, scaled_parts
from worker.weight_file import WeightFile, read_buffer

Progress = Callable[[int, int], None]


class SourceShare:
    """What a rank reads of a checkpoint, tensor by tensor as they lie in the files. Raises ConfigError.

    A quantised tensor is read with those of its scales that cover what the rank holds, unless it stays quantised: then
    these are tensors of their own.
    """

    def __init__(self, config: ModelConfig, directory: Path, place: Place) -> None:
        self._index = checkpoint_index(directory)
        self._place = place
        self._quantization = config.quantization
        self._parameters = sorted(held_parameters(config, place), key=self._where)

    @property
    def parameters(self) -> Sequence[Parameter]:
        """In the order of `tensors`."""
        return self._parameters

    @property
    def total_bytes(self) -> int:
        """As the files store them."""
        return sum(self._bytes(parameter) for parameter in self._parameters)

    def tensors(self, buffer: Tensor) -> Iterator[tuple[Parameter, Iterator[Part]]]:
        """Each with its rows, some at a time; all go through the buffer. Raises OSError."""
        for path, parameters in itertools.groupby(self._parameters, lambda parameter: self._where(parameter)[0]):
            with WeightFile(path, buffer) as file:
                for parameter in parameters:
                    yield parameter, self._parts(file, parameter, buffer)

    def _parts(self, file: WeightFile, parameter: Parameter, buffer: Tensor) -> Iterator[Part]:
        stored, scales = self._index[parameter.name], self._scales(parameter)
        for region in parameter.held_regions(self._place):
            if scales is None:
                yield from plain_parts(file, stored, region)
                continue
            with contextlib.ExitStack() as opened:
                own = scales.stored.file == stored.file
                grid = scales.read(
                    file if own else opened.enter_context(WeightFile(scales.stored.file, buffer)), region
                )
            yield from scaled_parts(file, stored, region, grid, scales)

    def _scales(self, parameter: Parameter) -> Scales | None:
        stored = self._index[parameter.name]
        if stored.dtype != FLOAT8 or parameter.block is not None:
            return None
        assert self._quantization is not None, f"{parameter.name} is quantised, and its checkpoint was checked"
        found = self._quantization.scales(parameter.name, stored, self._index)
        return Scales(found, self._quantization.blocks(stored.shape))

    def _bytes(self, parameter: Parameter) -> int:
        regions, scales = parameter.held_regions(self._place), self._scales(parameter)
        numbers = sum(math.prod(region_shape(region)) for region in regions)
        own_bytes = numbers * ELEMENT_BYTES[self._index[parameter.name].dtype]
        return own_bytes + (0 if scales is None else sum(map(scales.read_bytes, regions)))

    def _where(self, parameter: Parameter) -> tuple[Path, int]:
        stored = self._index[parameter.name]
        return stored.file, stored.first_byte


def left_in_files(config: ModelConfig, directory: Path) -> str:
    """What is known there and not read by any rank, in words for the event log; nothing where nothing is.

    Of layers for multi-token prediction: those that are not computed, and copies of the embedding and of the head.
    """
    if not config.prediction_layers:
        return ""
    unread = checkpoint_index(directory).keys() - {parameter.name for parameter in parameter_table(config)}
    left = sum(is_of_prediction(config, name) for name in unread)
    return f"{left} tensors of {config.prediction_layers} layers for multi-token prediction" if left else ""


def load_weights(
    model: DecoderModel, config: ModelConfig, directory: Path, context: ParallelContext, progress: Progress
) -> int:
    """Fills every tensor of the model, converted to its dtype; returns the bytes read from the files.

    progress(loaded_bytes, total_bytes) is called after each tensor, counting bytes as the files store them.
    """
    share = SourceShare(config, directory, context.place)
    loaded_bytes, total_bytes = 0, share.total_bytes
    for parameter, parts in share.tensors(read_buffer(context.device)):
        unfilled = model.shards[parameter.name]
        for part in parts:
            rows = part.meant(unfilled.device)
            unfilled[: len(rows)].copy_(rows)
            unfilled = unfilled[len(rows) :]
            loaded_bytes += part.bytes
        unfilled.zero_()  # the vocabulary's padding
        progress(loaded_bytes, total_bytes)
    assert loaded_bytes == total_bytes, f"read {loaded_bytes} of {total_bytes} bytes"
    return loaded_bytes
