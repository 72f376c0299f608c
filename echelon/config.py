"""What `echelon serve` is told: flags, ECHELON_* variables, a YAML file and defaults, resolved once at the CLI edge.

ServeConfig is what a user writes; one name each, as a flag `--max-context`, a variable `ECHELON_MAX_CONTEXT` and a
YAML key `max-context`. CoordinatorConfig is the same with everything settled, handed by the supervisor to each
coordinator it starts. Reads no environment and no file itself, and knows neither models nor Ray.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from echelon.errors import ConfigError

ENVIRONMENT_PREFIX = "ECHELON_"

HUB_ID = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>\w[\w./-]*))?")

Device = Literal["cpu", "cuda"]
Float8Storage = Literal["dequantised", "kept"]
Dtype = Literal["float64", "float32", "bfloat16", "float16"]
Journal = Literal["write", "fsync", "off"]

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
LeaseSeconds = Annotated[float, Field(ge=5, allow_inf_nan=False)]
BeatSeconds = Annotated[float, Field(ge=0.05, le=10)]
DrainSeconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def split_address(address: str) -> tuple[str, int]:
    """Host and port of "host:port" or "[v6 host]:port". Raises ValueError."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"must be host:port with a port from 0 to 65535, got {address!r}")
    return host.strip("[]"), int(port)


def join_address(host: str, port: int) -> str:
    """The inverse of `split_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class ServeConfig(BaseModel):
    """Each description is the flag's help."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: Path | str = Field(description="Directory of a Hugging Face checkpoint, or ORG/NAME[@REVISION] on its Hub.")
    served_model_name: str | None = Field(default=None, description="Name clients ask for; default: the model's own.")
    tensor: Count = Field(default=1, description="Ranks that split every layer.")
    pipeline: Count = Field(default=1, description="Stages that share the layers.")
    data: Count = Field(default=1, description="Groups of ranks in a replica with requests of their own.")
    expert: Count = Field(default=1, description="Groups of a stage's ranks that have different experts.")
    replicas: Count = Field(default=1, description="Copies of the model, each on ranks of its own.")
    spares: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Warm processes on each node that take over for its ranks, at most one a device."
    )
    spare_devices: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Devices held beside the ranks' own, for ranks that lose theirs or their node."
    )
    pipeline_depth: Count | None = Field(
        default=None, description="Micro-batches in the pipeline at once; default: as many as stages."
    )
    rebalance_steps: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Experts move between ranks, by their loads, every so many steps; 0: never."
    )
    speculation: Literal["off", "ngram", "mtp"] = Field(
        default="off",
        description="Guess next ids and verify them at once; ngram: from what stood there before, mtp: by the model.",
    )
    speculation_tokens: Annotated[int, Field(ge=1, le=32)] = Field(
        default=4, description="Most ids of an answer that are guessed at once, 32 at most."
    )
    redundant_experts: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Slots of each layer for copies of the experts with the most load; multiple of expert."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto is cuda where there is a GPU.")
    dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="auto is the checkpoint's; float64 on cpu only."
    )
    float8: Float8Storage | Literal["auto"] = Field(
        default="auto", description="Matrices of 8 bit floats stay so (kept) or not; auto: where that is faster."
    )
    load_format: Literal["auto", "random"] = Field(
        default="auto", description="random: weights from a fixed seed by config.json alone, to measure speed by."
    )
    address: str = Field(default="127.0.0.1:50051", description="Where clients connect; port 0 takes a free one.")
    max_context: Count | None = Field(default=None, description="Tokens of prompt and answer; default: the model's.")
    max_running: Count = Field(default=64, description="Requests in one batch, for each data rank.")
    cuda_graphs: Literal["auto", "off"] = Field(
        default="auto", description="The layers of decode steps in one launch, on cuda where kernels allow."
    )
    max_step_tokens: Count = Field(default=2048, description="Tokens of one step; longer prompts are chunked.")
    gpu_memory_fraction: Fraction = Field(default=0.9, description="Share of free memory for weights and KV cache.")
    kv_cache_tokens: Count | None = Field(
        default=None, description="Most that the KV cache holds; default: what memory allows."
    )
    state_dir: Path | None = Field(default=None, description="Journal and jobs; default: a temporary folder.")
    checkpoint_dir: Path | None = Field(
        default=None, description="Ranks keep what they hold of a model there, to start again from; default: not."
    )
    ray_address: str | None = Field(default=None, description="Join this Ray (host:port) instead of starting one.")
    resume_window_s: Seconds = Field(default=300.0, description="How long an interrupted stream can be resumed.")
    lease_s: LeaseSeconds = Field(default=30.0, description="Ranks are ended when the coordinator is gone so long.")
    heartbeat_s: BeatSeconds = Field(default=0.5, description="Interval of the ranks' heartbeats.")
    drain_timeout_s: DrainSeconds = Field(default=30.0, description="How long SIGTERM lets running requests finish.")
    max_queue_tokens: Count = Field(default=1_000_000, description="Prompt tokens that may wait for a place.")
    journal: Journal = Field(
        default="write", description="fsync survives power loss too, for a disk flush a step; off: only ranks may die."
    )
    trace_dir: Path | None = Field(default=None, description="Log every operation of every rank there; default: not.")
    metrics_address: str | None = Field(default=None, description="host:port of a Prometheus endpoint; default: none.")

    @property
    def keeps_float8(self) -> bool:
        return self.float8 == "kept"

    @field_validator("model")
    @classmethod
    def _is_path_or_hub_id(cls, value: Path | str) -> Path | str:
        return Path(value) if isinstance(value, str) and not HUB_ID.fullmatch(value) else value

    @field_validator("journal", "cuda_graphs", mode="before")
    @classmethod
    def _off_in_yaml(cls, value: object) -> object:
        """YAML takes a bare off for false."""
        return "off" if value is False else value

    @field_validator("address", "metrics_address", "ray_address")
    @classmethod
    def _has_host_and_port(cls, value: str | None) -> str | None:
        if value is not None:
            split_address(value)
        return value

    @field_validator("served_model_name")
    @classmethod
    def _is_not_blank(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("must not be empty")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.dtype == "float64" and self.device == "cuda":
            raise ValueError("dtype=float64 is for device=cpu only; use bfloat16 or float32 on cuda")
        if self.pipeline == 1 and (self.pipeline_depth or 1) > 1:
            raise ValueError(
                f"pipeline-depth={self.pipeline_depth} with pipeline=1: one stage has one micro-batch at a time; leave "
                "pipeline-depth out, or raise pipeline"
            )
        if self.heartbeat_s * 3 > self.lease_s:
            raise ValueError(f"heartbeat-s={self.heartbeat_s:g} must be at most a third of lease-s={self.lease_s:g}")
        return self


class CoordinatorConfig(ServeConfig):
    """Everything settled: what each coordinator of this supervisor gets, as one JSON line on its stdin.

    Both ports are concrete, so a successor is found where its predecessor was.
    """

    model: Path
    served_model_name: str
    device: Device
    dtype: Dtype
    float8: Float8Storage = "dequantised"
    max_context: Count
    state_dir: Path
    ray_address: str
    internal_address: str = Field(description="Where ranks dial in.")
    model_digest: str = Field(default="", description="Of the model's files as they were checked, for checkpoint_dir.")
    served: bool = Field(default=False, description="An earlier coordinator of this supervisor has served.")


def flag_of(field: str) -> str:
    """The user's spelling of a field: max_context -> max-context."""
    return field.replace("_", "-")


def resolve_config(
    flags: Mapping[str, str | None], environment: Mapping[str, str] | None = None, file_text: str = ""
) -> ServeConfig:
    """The configuration: a flag beats ECHELON_*, that beats the YAML file's text, that beats the default.

    flags are keyed by field name; None stands for a flag that was not given. Raises ConfigError naming the source.
    """
    values: dict[str, object] = {}
    sources: dict[str, str] = {}
    for name, value in _file_values(file_text).items():
        values[name], sources[name] = value, f"{flag_of(name)} of the configuration file"
    for name in ServeConfig.model_fields:
        variable = ENVIRONMENT_PREFIX + name.upper()
        if environment is not None and environment.get(variable, "") != "":
            values[name], sources[name] = environment[variable], variable
        flag = flags.get(name)
        if flag is not None:
            values[name], sources[name] = flag, f"--{flag_of(name)}"
    if "model" not in values:
        raise ConfigError(
            "no model given; pass --model DIRECTORY, a Hugging Face checkpoint, or --model ORG/NAME", field="model"
        )
    try:
        return ServeConfig.model_validate(values)
    except ValidationError as error:
        raise _config_error(error, sources) from None


def _file_values(text: str) -> dict[str, object]:
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}, column {where.column + 1}" if where else ""
        raise ConfigError(f"the configuration file is not YAML{line}: {getattr(error, 'problem', error)}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"the configuration file must hold keys and values, found a {type(content).__name__}")
    known = [flag_of(name) for name in ServeConfig.model_fields]
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            raise ConfigError(f"the configuration file has an unknown key {key!r}; {hint}", field=str(key))
    return {str(key).replace("-", "_"): value for key, value in content.items() if value is not None}


def _config_error(error: ValidationError, sources: Mapping[str, str]) -> ConfigError:
    """The first complaint, in the user's spelling."""
    first = error.errors(include_url=False)[0]
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return ConfigError(message)
    name = str(first["loc"][0])
    if first["type"] != "value_error":
        message = f"{message.replace('Input should', 'must')}, got {first['input']!r}"
    return ConfigError(f"{sources.get(name, flag_of(name))}: {message}", field=name)
