"""The files of a model directory: what the safetensors headers say, and whether everything is there and whole.

The coordinator checks a directory before anything is started; the loader finds each tensor by the same index. Only
headers are read, never weights. It knows no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path

from echelon.errors import ConfigError
from models.config import ModelConfig, read_model_config, with_prediction
from models.json_source import read_json_object
from models.stored import ELEMENT_BYTES, FLOAT8, StoredTensor
from models.tables import expert_names, parameter_table

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

Stamp = tuple[int, int]

_LENGTH_BYTES = 8
_REMEDY = "the weights are not those of this config.json: download both again"
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit


def check_model_directory(directory: Path, keep_float8: bool = False, *, predicts: bool = False) -> None:
    """Raises ConfigError, naming file and cause, unless the directory can be served, its layer for multi-token
    prediction too if it predicts."""
    check_is_directory(directory)
    config = read_model_config(directory, keep_float8=keep_float8)
    if predicts:
        config = with_prediction(config)
    read_json_object(directory / "tokenizer.json")
    index = checkpoint_index(directory)
    for parameter in parameter_table(config):
        stored = index.get(parameter.name)
        if stored is None:
            raise ConfigError(
                f"{directory}: no file holds {parameter.name}, expected with shape {parameter.shape}; {_REMEDY}",
                field="model",
            )
        if stored.shape != parameter.shape:
            raise ConfigError(
                f"{stored.file}: {parameter.name} has shape {stored.shape}, expected {parameter.shape} from "
                f"config.json; {_REMEDY}",
                field="model",
            )
        if stored.dtype not in ELEMENT_BYTES:
            raise ConfigError(
                f"{stored.file}: {parameter.name} is stored as {stored.dtype}; supported: "
                f"{', '.join(ELEMENT_BYTES)}; convert the checkpoint to one of them",
                field="model",
            )
        if parameter.block is not None and stored.dtype != FLOAT8:
            raise ConfigError(
                f"{stored.file}: {parameter.name} is stored as {stored.dtype}, and cannot stay {FLOAT8} like the "
                "others; leave --float8 kept out",
                field="float8",
            )
        if stored.dtype == FLOAT8:
            if config.quantization is None:
                raise ConfigError(
                    f"{stored.file}: {parameter.name} is stored as {FLOAT8}, but config.json has no "
                    "quantization_config that says how; download both again",
                    field="model",
                )
            config.quantization.scales(parameter.name, stored, index)
    _refuse_more_experts(config, index)


def check_is_directory(directory: Path) -> None:
    """Raises ConfigError unless a model can lie there."""
    if not directory.is_dir():
        what = "is not a directory" if directory.exists() else "does not exist"
        raise ConfigError(f"model directory {directory} {what}; give a directory in Hugging Face format", field="model")


def _refuse_more_experts(config: ModelConfig, index: Mapping[str, StoredTensor]) -> None:
    """All that the config names are there: files that have more of them are of another model."""
    keys = config.family.experts
    for number, layer in enumerate(config.layers):
        if keys is None or layer.routing is None:
            continue
        for name in expert_names(config, number, layer.routing.experts):
            if name in index:
                raise ConfigError(
                    f"{index[name].file}: holds {name}, but {keys.experts}={layer.routing.experts} in config.json; "
                    f"{_REMEDY}",
                    field="model",
                )


def model_digest(directory: Path, keep_float8: bool = False) -> str:
    """16 hexadecimal digits for config.json and the weights: names, sizes and times of their files, and their headers;
    others where 8 bit floats stay what they are.

    The weights themselves are not read, so one file that has taken another's place with its name, size, time and header
    goes unseen.
    """
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    digest.update(repr(sorted(weight_stamps(directory).items())).encode())
    for name, stored in sorted(checkpoint_index(directory).items()):
        digest.update(repr((name, stored.file.name, stored.dtype, stored.shape, stored.first_byte)).encode())
    digest.update(b"float8" * keep_float8)
    return digest.hexdigest()[:16]


def weight_stamps(directory: Path) -> dict[str, Stamp]:
    """Size in bytes and time of change in nanoseconds of each file of weights that is there, and of their index.

    Nothing is opened. Empty for a directory that is gone.
    """
    stamps: dict[str, Stamp] = {}
    for path in (*directory.glob("*.safetensors"), *directory.glob(INDEX_FILE)):
        with contextlib.suppress(FileNotFoundError):
            stat = path.stat()
            stamps[path.name] = stat.st_size, stat.st_mtime_ns
    return stamps


def checkpoint_index(directory: Path) -> Mapping[str, StoredTensor]:
    """Every tensor of the directory's weights by name, from one file or from the shards that the index names."""
    index_path, single_path = directory / INDEX_FILE, directory / SINGLE_FILE
    if not index_path.exists():
        if not single_path.exists():
            raise ConfigError(f"{directory}: no weights, expected {SINGLE_FILE} or {INDEX_FILE}")
        return read_header(single_path)
    weight_map = read_json_object(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ConfigError(f"{index_path}: weight_map must be an object of tensor name -> file name")
    headers = {file: read_header(directory / file) for file in sorted(set(weight_map.values()))}
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise ConfigError(f"{directory / file}: the tensor {name} is missing, which {INDEX_FILE} places there")
    return {name: headers[file][name] for name, file in weight_map.items()}


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file: u64 header length, JSON header, then the data it describes.

    Raises ConfigError for what is no such file, or not a whole one.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file, though {INDEX_FILE} names it; download the checkpoint again")
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(_LENGTH_BYTES)
        header_bytes = struct.unpack("<Q", start)[0] if len(start) == _LENGTH_BYTES else 0
        if not 0 < header_bytes <= _MAX_HEADER_BYTES:
            raise ConfigError(f"{path}: not a safetensors file, {file_bytes} bytes long")
        header = file.read(header_bytes)
    if len(header) < header_bytes:
        raise _truncated(path, _LENGTH_BYTES + header_bytes, file_bytes)
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        ends = [entry["data_offsets"][1] for entry in entries.values()]
        data = _LENGTH_BYTES + header_bytes
        tensors = {
            name: StoredTensor(path, entry["dtype"], tuple(entry["shape"]), data + entry["data_offsets"][0])
            for name, entry in entries.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ConfigError(f"{path}: the safetensors header is broken: {error!r}") from error
    expected_bytes = data + max(ends, default=0)
    if file_bytes < expected_bytes:
        raise _truncated(path, expected_bytes, file_bytes)
    if file_bytes > expected_bytes:
        raise ConfigError(f"{path}: {file_bytes} bytes, but its header describes {expected_bytes}; download it again")
    return tensors


def _truncated(path: Path, expected_bytes: int, file_bytes: int) -> ConfigError:
    return ConfigError(
        f"{path}: truncated, expected {expected_bytes} bytes, found {file_bytes}; download the checkpoint again"
    )
