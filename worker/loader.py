"""Loads a rank's share of a checkpoint, and reads nothing else of it.

In every rank. The parameter table says which parts of each tensor this rank holds; the model says which resident
tensor takes it. The directory was checked by the coordinator before.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from torch import Tensor

from models.config import ModelConfig
from models.decoder import DecoderModel
from models.files import ELEMENT_BYTES, checkpoint_index
from models.tables import Parameter, held_parameters
from parallel.context import ParallelContext
from parallel.degrees import Place
from parallel.sharding import region_shape
from worker.weight_file import WeightFile, read_buffer

Progress = Callable[[int, int], None]


class SourceShare:
    """What a rank reads of a checkpoint, tensor by tensor as they lie in the files. Raises ConfigError."""

    def __init__(self, config: ModelConfig, directory: Path, place: Place) -> None:
        self._index = checkpoint_index(directory)
        self._place = place
        self._parameters = sorted(held_parameters(config, place), key=self._where)

    @property
    def parameters(self) -> Sequence[Parameter]:
        """In the order of `tensors`."""
        return self._parameters

    @property
    def total_bytes(self) -> int:
        """As the files store them."""
        return sum(
            math.prod(region_shape(region)) * ELEMENT_BYTES[self._index[parameter.name].dtype]
            for parameter in self._parameters
            for region in parameter.held_regions(self._place)
        )

    def tensors(self, buffer: Tensor) -> Iterator[tuple[Parameter, Iterator[Tensor]]]:
        """Each with its rows, some at a time, as stored; all go through the buffer. Raises OSError."""
        for path, parameters in itertools.groupby(self._parameters, lambda parameter: self._where(parameter)[0]):
            with WeightFile(path, buffer) as file:
                for parameter in parameters:
                    yield parameter, self._parts(file, parameter)

    def _parts(self, file: WeightFile, parameter: Parameter) -> Iterator[Tensor]:
        for region in parameter.held_regions(self._place):
            yield from file.parts(self._index[parameter.name], region)

    def _where(self, parameter: Parameter) -> tuple[Path, int]:
        stored = self._index[parameter.name]
        return stored.file, stored.first_byte


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
            unfilled[: len(part)].copy_(part)
            unfilled = unfilled[len(part) :]
            loaded_bytes += part.nbytes
        unfilled.zero_()  # the vocabulary's padding
        progress(loaded_bytes, total_bytes)
    assert loaded_bytes == total_bytes, f"read {loaded_bytes} of {total_bytes} bytes"
    return loaded_bytes
