"""Loads a rank's share of a checkpoint, and reads nothing else of it.

In every rank. The parameter table says which parts of each tensor this rank holds; the model says which resident
tensor takes it. The directory was checked by the coordinator before.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from models.config import ModelConfig
from models.decoder import DecoderModel
from models.files import ELEMENT_BYTES, checkpoint_index
from models.tables import Parameter, held_parameters
from parallel.context import ParallelContext
from parallel.sharding import region_shape
from worker.weight_file import WeightFile, read_buffer

Progress = Callable[[int, int], None]


def load_weights(
    model: DecoderModel, config: ModelConfig, directory: Path, context: ParallelContext, progress: Progress
) -> int:
    """Fills every tensor of the model, converted to its dtype; returns the bytes read from the files.

    progress(loaded_bytes, total_bytes) is called after each tensor, counting bytes as the files store them.
    """
    index = checkpoint_index(directory)
    held = held_parameters(config, context.place)
    by_file: dict[Path, list[Parameter]] = defaultdict(list)
    total_bytes = 0
    for parameter in held:
        stored = index[parameter.name]
        by_file[stored.file].append(parameter)
        for region in parameter.held_regions(context.place):
            total_bytes += math.prod(region_shape(region)) * ELEMENT_BYTES[stored.dtype]
    loaded_bytes, buffer = 0, read_buffer(context.device)
    for path, parameters in by_file.items():
        with WeightFile(path, buffer) as file:
            for parameter in sorted(parameters, key=lambda parameter: index[parameter.name].first_byte):
                unfilled = model.shards[parameter.name]
                for region in parameter.held_regions(context.place):
                    for part in file.parts(index[parameter.name], region):
                        unfilled[: len(part)].copy_(part)
                        unfilled = unfilled[len(part) :]
                        loaded_bytes += part.nbytes
                unfilled.zero_()  # the vocabulary's padding
                progress(loaded_bytes, total_bytes)
    assert loaded_bytes == total_bytes, f"read {loaded_bytes} of {total_bytes} bytes"
    return loaded_bytes
