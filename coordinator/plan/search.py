"""Choosing a layout: every product of degrees over the devices, those that fit, and the best of them for a load.

Pure, for the planner. A layout that was asked for and cannot be is refused with its arithmetic and the nearest ones
that can.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from coordinator.plan.census import Census
from coordinator.plan.forecast import Forecast, forecast
from coordinator.plan.hardware import Machines
from coordinator.plan.memory import Limits, Load, StageLoad, load
from coordinator.plan.roofline import roofline
from echelon.bench.cases import Case
from echelon.errors import ConfigError
from models.cutting import check_degrees
from parallel.degrees import NAMES, Degrees

NEAREST = 3  # layouts that a refusal names


@dataclass(frozen=True, slots=True)
class Plan:
    """A layout that fits, what it holds, and what it does with the case."""

    load: Load
    forecast: Forecast

    @property
    def degrees(self) -> Degrees:
        return self.load.degrees


@dataclass(frozen=True, slots=True)
class Ranking:
    """plans: all that fit, the best first. divided: layouts that the model can be cut into, fitting memory or not."""

    plans: tuple[Plan, ...]
    divided: int


@dataclass(frozen=True, slots=True)
class Planner:
    """One question: a model, devices, limits and a load."""

    census: Census
    machines: Machines
    limits: Limits
    case: Case
    _cuts: dict[int, tuple[range, ...]] = field(default_factory=dict, compare=False, repr=False)

    def plan(self, degrees: Degrees) -> Plan:
        """The plan of a layout. Raises ConfigError with the arithmetic, and the nearest layouts that fit."""
        try:
            if degrees.ranks > self.machines.gpus:
                raise ConfigError(f"{degrees}, and there are {self.machines.gpus} GPUs", field="gpus")
            check_degrees(self.census.config, degrees)
            held = self._load(degrees)
            if not held.fits(self.limits):
                raise ConfigError(no_room(held.tightest, self.machines, self.limits), field="gpu_memory")
        except ConfigError as error:
            raise ConfigError(f"{error.message}; {self._remedy(degrees)}", field=error.field) from None
        return self._plan(held, simulated=True)

    def rank(self, fixed: Mapping[str, int], latency: bool) -> Ranking:
        """All layouts with these degrees over all devices, or over as many as any layout fits. Raises ConfigError."""
        least = math.ceil(self.census.total_bytes / self.machines.usable_bytes)
        for gpus in range(self.machines.gpus, least - 1, -1):
            divided = [degrees for degrees in self.layouts(gpus, fixed) if self._divides(degrees)]
            fitting = [held for held in map(self._load, divided) if held.fits(self.limits)]
            if fitting:
                plans = sorted((self._plan(held, simulated=False) for held in fitting), key=_order(latency))
                best = self._plan(plans[0].load, simulated=True)
                return Ranking((best, *plans[1:]), len(divided))
        raise ConfigError(self._nothing_fits(fixed), field="gpus")

    def layouts(self, ranks: int, fixed: Mapping[str, int]) -> Iterator[Degrees]:
        """Every product of exactly so many ranks. Data parallelism inside a replica is for models with experts."""
        free_data = self.census.routing is not None or "data" in fixed
        for replicas in _divisors(ranks, fixed.get("replicas")):
            for pipeline in _divisors(ranks // replicas, fixed.get("pipeline")):
                stage_ranks = ranks // replicas // pipeline
                for data in _divisors(stage_ranks, fixed.get("data")) if free_data else [1]:
                    tensor = stage_ranks // data
                    if fixed.get("tensor", tensor) != tensor:
                        continue
                    experts = _divisors(stage_ranks, fixed.get("expert")) if self._has_experts(fixed) else [1]
                    for expert in experts:
                        yield Degrees(replicas=replicas, pipeline=pipeline, data=data, tensor=tensor, expert=expert)

    def nearest(self, asked: Degrees) -> list[Degrees]:
        """Layouts that fit, those first that differ least: by factors of each degree, then in ranks."""

        def distance(degrees: Degrees) -> float:
            pairs = ((getattr(degrees, name), getattr(asked, name)) for name in NAMES)
            return sum(abs(math.log2(one / other)) for one, other in pairs)

        sizes = {min(asked.ranks, self.machines.gpus), *_divisors(self.machines.gpus, None)}
        found = [degrees for size in sorted(sizes) for degrees in self.layouts(size, {}) if self._fits(degrees)]
        return sorted(found, key=distance)[:NEAREST]

    def _has_experts(self, fixed: Mapping[str, int]) -> bool:
        return self.census.routing is not None or "expert" in fixed

    def _divides(self, degrees: Degrees) -> bool:
        try:
            check_degrees(self.census.config, degrees)
        except ConfigError:
            return False
        return True

    def _fits(self, degrees: Degrees) -> bool:
        return self._divides(degrees) and self._load(degrees).fits(self.limits)

    def _load(self, degrees: Degrees) -> Load:
        if degrees.pipeline not in self._cuts:
            self._cuts[degrees.pipeline] = self.census.cut(degrees.pipeline)
        return load(self.census, degrees, self._cuts[degrees.pipeline], self.machines, self.limits)

    def _plan(self, held: Load, simulated: bool) -> Plan:
        rates = roofline(self.census, held.degrees, self.machines)
        return Plan(held, forecast(rates, held, self.limits, self.case, simulated=simulated))

    def _remedy(self, asked: Degrees) -> str:
        found = self.nearest(asked)
        if found:
            return f"nearest that fit: {', or '.join(map(as_flags, found))}"
        return self._nothing_fits({})

    def _nothing_fits(self, fixed: Mapping[str, int]) -> str:
        """Why no layout of these devices holds the model, by the bytes of all of them together."""
        machines, census = self.machines, self.census
        weights = census.total_bytes
        room = machines.gpus * machines.usable_bytes
        asked = f" with {' '.join(f'--{name} {degree}' for name, degree in fixed.items())}" if fixed else ""
        parts = (
            f"{machines.gpus} * {gigabytes(machines.gpu.memory_bytes)} * {machines.memory_fraction:g} = "
            f"{gigabytes(room)} for {gigabytes(weights)} of weights, KV cache and steps"
        )
        if weights > room:
            least = math.ceil(weights / machines.usable_bytes)
            return f"no layout{asked} fits: {parts}; {least} such GPUs hold the weights alone"
        sizes = range(machines.gpus, 0, -1)
        loads = [self._load(d) for size in sizes for d in self.layouts(size, fixed) if self._divides(d)]
        if not loads:
            return f"no layout{asked} divides the model over {machines.gpus} GPUs; leave a degree out, or use more GPUs"
        roomiest = max(loads, key=lambda held: held.pool_tokens)
        if roomiest.pool_tokens:
            return (
                f"no layout{asked} fits: {parts}; {as_flags(roomiest.degrees)} holds requests of --max-context "
                f"{roomiest.pool_tokens} or less"
            )
        return f"no layout{asked} fits: {parts}; use more GPUs"


def no_room(stage: StageLoad, machines: Machines, limits: Limits) -> str:
    """Why one request of max_context tokens has no room on the ranks of a stage."""
    need = limits.max_context * stage.kv_bytes_per_token
    return (
        f"no room for one request of max-context {limits.max_context} on stage {stage.stage}: "
        f"{gigabytes(machines.gpu.memory_bytes)} * {machines.memory_fraction:g} - {gigabytes(stage.weight_bytes)} of "
        f"weights - {gigabytes(stage.step_bytes)} for a step leave {gigabytes(stage.room_bytes)}, and its KV cache "
        f"takes {gigabytes(need)}"
    )


def as_flags(degrees: Degrees) -> str:
    """The degrees above 1, as they are given to a command."""
    given = [(name, getattr(degrees, name)) for name in NAMES]
    return " ".join(f"--{name} {degree}" for name, degree in given if degree > 1) or "--tensor 1"


def gigabytes(count: float) -> str:
    """In GB of 10^9 bytes, as memories of GPUs are sold."""
    return f"{count / 1e9:,.1f} GB"


def _order(latency: bool) -> Callable[[Plan], tuple[float, ...]]:
    """Best first; of equals the plainer one: fewer stages, fewer data ranks, fewer ranks a replica, whole experts."""

    def key(plan: Plan) -> tuple[float, ...]:
        score = plan.forecast.total_s if latency else -plan.forecast.output_tokens_s
        d = plan.degrees
        return (float(f"{score:.4g}"), d.pipeline, d.data, d.replica_ranks, -d.expert)

    return key


def _divisors(number: int, fixed: int | None) -> list[int]:
    """All of them, or only the fixed one if it is one."""
    wanted = range(1, number + 1) if fixed is None else [fixed]
    return [divisor for divisor in wanted if number % divisor == 0]
