"""Everything that can be checked before anything is started, and everything that is settled once for a cluster's life.

In the supervisor, before Ray: the model's files, the degrees, devices, ports and folders. Reads headers of weights
at most. What is wrong is told here in one sentence, in a second, rather than by a rank minutes later.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from shutil import rmtree
from typing import cast

from tokenizers import Tokenizer

from coordinator.placement import degrees_of, plan_replica
from coordinator.ray_port import reach_ray
from coordinator.supervisor.float8 import settled_float8
from coordinator.supervisor.hub import model_directory, served_name
from coordinator.supervisor.ray_head import RayHead, RayHeadConfig
from echelon.config import (
    CoordinatorConfig,
    Device,
    Dtype,
    Float8Storage,
    ServeConfig,
    flag_of,
    join_address,
    split_address,
)
from echelon.errors import ConfigError, UnavailableError
from models.config import ModelConfig, read_model_config, with_prediction
from models.files import check_is_directory, check_model_directory, model_digest
from models.json_source import read_json_object

LOCAL_HOST = "127.0.0.1"
TOKENIZER_FILE = "tokenizer.json"
MAX_FOLDER_LENGTH = 30  # Ray makes UNIX sockets far below it, and their paths end at 107 bytes
CHANGEABLE = (
    "model",
    "served_model_name",
    "tensor",
    "pipeline",
    "data",
    "expert",
    "pipeline_depth",
    "rebalance_steps",
    "redundant_experts",
    "speculation",
    "speculation_tokens",
    "spares",
    "spare_devices",
    "dtype",
    "float8",
    "max_context",
    "max_running",
    "cuda_graphs",
    "max_step_tokens",
    "gpu_memory_fraction",
    "kv_cache_tokens",
)
MIN_RAY_CPUS = 16  # Ray's count of places for ranks: later layouts may have more of them than the first


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """For the sockets, logs and temporary state of one cluster; gone afterwards."""
    base = tempfile.gettempdir()
    folder = Path(tempfile.mkdtemp(prefix="echelon-", dir=base if len(base) < MAX_FOLDER_LENGTH else "/tmp"))
    try:
        yield folder
    finally:
        rmtree(folder, ignore_errors=True)


def prepare(config: ServeConfig, folder: Path) -> tuple[CoordinatorConfig, RayHead | None]:
    """Check and settle everything. Raises ConfigError, or UnavailableError where this machine is in the way."""
    directory, model = _checked_model(config)
    device = _device(config)
    store = None if config.load_format == "random" else config.checkpoint_dir  # what is made is not kept
    dtype = _dtype(config, model, device)
    config, model = _with_float8(config, settled_float8(config, directory, device, dtype), model)
    host, port = split_address(config.address)
    if port != 0 and config.metrics_address == config.address:
        raise ConfigError(f"address and metrics-address are both {config.address}; choose two", field="metrics_address")
    public = join_address(host, _claim(host, port, "--address"))
    if config.metrics_address:
        _claim(*split_address(config.metrics_address), "--metrics-address")
    internal_host = LOCAL_HOST if not config.ray_address else _reach_ray(config.ray_address)
    settled = CoordinatorConfig.model_validate(
        config.model_dump()
        | {
            "model": directory,
            "served_model_name": config.served_model_name or served_name(config.model, directory),
            "device": device,
            "dtype": dtype,
            "max_context": _max_context(config, model),
            "address": public,
            "internal_address": join_address(internal_host, _claim(internal_host, 0, "internal address")),
            "ray_address": config.ray_address or join_address(LOCAL_HOST, _claim(LOCAL_HOST, 0, "Ray")),
            "state_dir": _writable("state-dir", config.state_dir or folder / "state"),
            "trace_dir": config.trace_dir and _writable("trace-dir", config.trace_dir),
            "checkpoint_dir": store and store.resolve(),
            "model_digest": model_digest(directory, config.keeps_float8) if store else "",
        }
    )
    plan_replica(settled, model)
    return settled, None if config.ray_address else _own_ray(settled, folder)


def prepare_change(wanted: ServeConfig, started: ServeConfig, serving: CoordinatorConfig) -> CoordinatorConfig:
    """What a cluster that was started so is to serve now; equal to what it serves if nothing has changed.

    The checks of a start, but for ports, folders and Ray, which stay. Raises as `prepare`.
    """
    fixed = [name for name in ServeConfig.model_fields if name not in CHANGEABLE]
    for name in fixed:
        now, then = getattr(wanted, name), getattr(started, name)
        if now != then:
            raise ConfigError(
                f"{flag_of(name)} is {then} while the cluster serves and cannot become {now}; only "
                f"{', '.join(map(flag_of, CHANGEABLE))} can change; start anew for the rest",
                field=name,
            )
    directory, model = _checked_model(wanted)
    if serving.device == "cuda" and _device(wanted) == "cpu":
        raise ConfigError(f"dtype={wanted.dtype} is for device=cpu, and the cluster is on cuda", field="dtype")
    dtype = _dtype(wanted, model, serving.device)
    wanted, model = _with_float8(wanted, settled_float8(wanted, directory, serving.device, dtype), model)
    settled = CoordinatorConfig.model_validate(
        serving.model_dump()
        | {name: getattr(wanted, name) for name in CHANGEABLE}
        | {
            "model": directory,
            "served_model_name": wanted.served_model_name or served_name(wanted.model, directory),
            "dtype": dtype,
            "max_context": _max_context(wanted, model),
            "model_digest": model_digest(directory, wanted.keeps_float8) if serving.checkpoint_dir else "",
        }
    )
    plan_replica(settled, model)
    return settled


def _checked_model(config: ServeConfig) -> tuple[Path, ModelConfig]:
    directory = model_directory(config.model).resolve()
    if config.load_format == "random":
        check_is_directory(directory)
    else:
        check_model_directory(directory, predicts=config.speculation == "mtp", keep_float8=config.keeps_float8)
    if config.load_format == "auto" or (directory / TOKENIZER_FILE).exists():
        _check_tokenizer(directory)
    model = read_model_config(directory, keep_float8=config.keeps_float8)
    return directory, with_prediction(model) if config.speculation == "mtp" else model


def _with_float8(config: ServeConfig, float8: Float8Storage, model: ModelConfig) -> tuple[ServeConfig, ModelConfig]:
    """Both as it was settled, for a model that was checked as config had it."""
    if float8 == config.float8:
        return config, model
    settled = config.model_copy(update={"float8": float8})
    return settled, _checked_model(settled)[1] if settled.keeps_float8 else model


def _check_tokenizer(directory: Path) -> None:
    """By the parser alone: what reads its companions too takes seconds to import, and is the coordinator's."""
    file = directory / TOKENIZER_FILE
    try:
        Tokenizer.from_file(str(file))
    except Exception as error:  # the parser raises bare Exception
        raise ConfigError(f"{file} cannot be read as a tokenizer: {error}", field="model") from error
    companion = directory / "tokenizer_config.json"
    if companion.exists():
        read_json_object(companion)


def _device(config: ServeConfig) -> Device:
    gpus = _gpus()
    if config.device == "cpu" or (config.device == "auto" and (gpus == 0 or config.dtype == "float64")):
        return "cpu"
    degrees, spare = degrees_of(config), config.spare_devices
    if degrees.ranks <= gpus < degrees.ranks + spare and config.ray_address is None:
        raise ConfigError(
            f"spare-devices={spare} beside {degrees}: {degrees.ranks} + {spare} = {degrees.ranks + spare} GPUs, and "
            f"this machine has {gpus}; lower spare-devices to {gpus - degrees.ranks} or less, lower a degree, or join "
            "a larger Ray with ray-address",
            field="spare_devices",
        )
    if gpus < degrees.ranks and config.ray_address is None:
        raise ConfigError(
            f"{degrees} need as many GPUs, this machine has {gpus}; lower a degree, join a larger Ray with "
            "ray-address, or use device=cpu",
            field=max(("tensor", "data", "pipeline", "replicas"), key=lambda name: int(getattr(degrees, name))),
        )
    return "cuda"


def _gpus() -> int:
    return sum(bool(re.fullmatch(r"nvidia\d+", entry.name)) for entry in Path("/dev").iterdir())


def _dtype(config: ServeConfig, model: ModelConfig, device: Device) -> Dtype:
    if config.dtype != "auto":
        return config.dtype
    if model.dtype == "float64" and device == "cuda":
        raise ConfigError("the checkpoint is float64, which is for device=cpu; pass --dtype bfloat16", field="dtype")
    return cast(Dtype, model.dtype)


def _max_context(config: ServeConfig, model: ModelConfig) -> int:
    limit = model.max_position_embeddings
    if config.max_context is not None and config.max_context > limit:
        raise ConfigError(
            f"max-context={config.max_context} is more than the model's max_position_embeddings={limit}; "
            f"pass --max-context {limit} or less",
            field="max_context",
        )
    return config.max_context or limit


def _writable(flag: str, given: Path) -> Path:
    """The folder, made if it is missing, by a path that means the same in every process."""
    folder = given.resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{flag} {folder} cannot be made: {error.strerror}", field=flag.replace("-", "_")) from None
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:  # permissions alone do not tell of a read-only disk
            probe.write(b"x")
    except OSError as error:
        message = f"{flag} {folder} cannot be written: {error.strerror}"
        raise ConfigError(message, field=flag.replace("-", "_")) from None
    return folder


def _claim(host: str, port: int, what: str) -> int:
    """The port if it is free, a free one for 0. Held no longer than the check: its user binds it later."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            remedy = "choose another port, or 0 for a free one"
            raise UnavailableError(f"{what}: port {port} of {host} is in use; {remedy}") from None
        raise UnavailableError(f"{what}: cannot listen on {host}:{port}: {error.strerror or error}") from None


def _reach_ray(address: str) -> str:
    try:
        return reach_ray(address)
    except OSError as error:
        raise UnavailableError(
            f"no Ray answers at --ray-address {address}: {error.strerror or error}; start one with "
            "`ray start --head`, or leave ray-address out"
        ) from None


def _own_ray(config: CoordinatorConfig, folder: Path) -> RayHead:
    host, port = split_address(config.ray_address)
    client_port = _claim(LOCAL_HOST, 0, "Ray's client port")
    num_cpus = max(os.cpu_count() or 1, degrees_of(config).ranks + config.spare_devices, MIN_RAY_CPUS)
    return RayHead(RayHeadConfig(host, port, client_port, num_cpus, folder))
