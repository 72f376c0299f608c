"""What `echelon bench` measures: the model's census, the layout, the device's rates, and the floor that follows.

In the user's terminal. Reads config.json alone; a device's rates come from a process of its own, or from flags.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

from coordinator.placement import degrees_of
from coordinator.plan.census import Census, take_census
from coordinator.plan.floor import Rates, floor
from echelon.bench import about
from echelon.bench.cases import Case
from echelon.config import Dtype, Float8Storage, ServeConfig, resolve_config
from echelon.errors import ConfigError, UnavailableError
from models.config import DTYPE_BYTES, ModelConfig, read_model_config
from models.cutting import check_degrees
from parallel.degrees import NAMES, Degrees

DEFAULTS: Mapping[str, object] = {"max_running": 256, "max_step_tokens": 8192}  # of bench, where serve has others
RATES_TIMEOUT_S = 180.0
ALL_REDUCE_US = 9.0
EXPECTED = "expected of rows that choose at random"
TOLD = ("max_running", "max_step_tokens", "cuda_graphs")  # flags that rows say


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """Rates by flags: bytes and FLOP a second, None to measure them."""

    read_bytes_s: float | None
    flops: float | None
    all_reduce_us: float = ALL_REDUCE_US

    def rates(self, read_bytes_s: float = 0.0, flops: float = 0.0) -> Rates:
        """These, and where there are none those that were measured."""
        return Rates(
            read_bytes_s=self.read_bytes_s or read_bytes_s,
            flops=self.flops or flops,
            all_reduce_s=self.all_reduce_us / 1e6,
        )


@dataclass(frozen=True, slots=True)
class Machine:
    """A device's rates, and what they were measured on."""

    rates: Rates
    hardware: str
    devices: int


@dataclass(frozen=True, slots=True)
class Experts:
    """distinct: of a layer in a step of decoding, on average; source: how that is known."""

    distinct: float
    source: str


@dataclass(frozen=True)
class Setting:
    """What is served, and how."""

    config: ServeConfig
    model: ModelConfig

    @property
    def directory(self) -> Path:
        """Of the model."""
        return Path(self.config.model)

    @property
    def degrees(self) -> Degrees:
        """Of the layout."""
        return degrees_of(self.config)

    @property
    def dtype(self) -> Dtype:
        """Of weights and activations."""
        return cast(Dtype, self.model.dtype) if self.config.dtype == "auto" else self.config.dtype

    @property
    def max_context(self) -> int:
        """Tokens of the longest request."""
        return self.config.max_context or self.model.max_position_embeddings

    @cached_property
    def census(self) -> Census:
        """Of the model."""
        size = DTYPE_BYTES[self.dtype]
        return take_census(self.model, size, size)

    def stored(self, float8: Float8Storage) -> Setting:
        """The same with matrices of 8 bit floats as a cluster has settled it: they are other bytes."""
        config = self.config.model_copy(update={"float8": float8})
        return Setting(config, read_model_config(self.directory, config.max_context, keep_float8=config.keeps_float8))

    def laid_out(self, degrees: Degrees) -> Setting:
        """The same model in another layout, as a cluster that runs has it."""
        return Setting(self.config.model_copy(update={name: getattr(degrees, name) for name in NAMES}), self.model)

    def about(self, machine: Machine | None, target: str | None) -> dict[str, object]:
        """What every row says of where it comes from. target: a cluster whose flags are not known."""
        found: dict[str, object] = {
            "date": about.today(),
            "model": self.directory.resolve().name,
            "layout": {name: degree for name in NAMES if (degree := getattr(self.degrees, name)) > 1},
        }
        if target is None:
            found |= {"dtype": self.dtype, "weights": self.config.load_format, "max_context": self.max_context}
            found["float8"] = self.config.float8
            found |= {name: getattr(self.config, name) for name in TOLD}
        if machine is not None and machine.hardware:
            found |= {"hardware": machine.hardware, "devices": machine.devices}
        return found | {"versions": about.versions(), "commit": about.commit()}


def settle(flags: Mapping[str, str | None]) -> Setting:
    """Checked before anything is started. Raises ConfigError."""
    config = resolve_config({name: str(value) for name, value in DEFAULTS.items()} | _given(flags))
    if config.speculation != "off":
        raise ConfigError(
            f"speculation={config.speculation}: rows are compared without it, for it depends on what is asked; leave "
            "it out",
            field="speculation",
        )
    directory = Path(config.model)
    if not (directory / "config.json").is_file():
        raise ConfigError(
            f"--model {directory} has no config.json; give a directory in Hugging Face format", field="model"
        )
    setting = Setting(config, read_model_config(directory, config.max_context, keep_float8=config.keeps_float8))
    check_degrees(setting.model, setting.degrees)
    return setting


def _given(flags: Mapping[str, str | None]) -> dict[str, str]:
    return {name: value for name, value in flags.items() if value is not None}


def measure_machine(setting: Setting, given: Given) -> Machine:
    """Takes seconds, in a process of its own that has ended by the return. Raises UnavailableError."""
    command = [sys.executable, "-m", "worker.machine_rates", setting.config.device, setting.dtype]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=RATES_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"the device's rates were not measured within {RATES_TIMEOUT_S:g} s") from None
    if told.returncode:
        last = (told.stderr.strip().splitlines() or ["no output"])[-1]
        raise UnavailableError(f"the device's rates cannot be measured: {last}; give --bandwidth and --flops")
    found = json.loads(told.stdout.splitlines()[-1])
    return Machine(given.rates(found["read_bytes_s"], found["flops"]), found["hardware"], found["devices"])


def floor_row(setting: Setting, rates: Rates, case: Case, seconds: float, experts: Experts | None) -> dict[str, object]:
    """The floor, what it is made of, and which part of the time it is, at perfect overlap and at none."""
    found = floor(setting.census, setting.degrees, case, rates, None if experts is None else experts.distinct)
    bounds = found.least_s, found.most_s
    row: dict[str, object] = {
        "floor_seconds": [round(bound, 4) for bound in bounds],
        "floor_output_tokens_per_s": [round(case.output_count / bound, 1) for bound in reversed(bounds)],
        "of_floor": [round(bound / seconds, 4) for bound in bounds],
        "floor_of": {
            "prefill_s": round(found.prefill_s, 4),
            "decode_s": round(found.decode_s, 4),
            "flop": round(found.flop),
            "read_bytes": round(found.read_bytes),
            "step_bytes": round(found.step_bytes),
            "kv_token_bytes": found.kv_token_bytes,
            "devices": setting.degrees.ranks,
            **asdict(rates),
        },
    }
    if found.distinct_experts is not None:
        source = EXPECTED if experts is None else experts.source
        row["distinct_experts"] = {"of_a_layer_in_a_step": round(found.distinct_experts, 2), "from": source}
    return row
