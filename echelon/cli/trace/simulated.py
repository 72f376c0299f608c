"""What `echelon trace --simulate` is told, and the timeline that follows from it.

In the user's terminal. Pure: "stages=4,microbatches=8,costs=1/1/2/1" in, a schedule and its timeline out; everything
that cannot be is refused with its key. It draws nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from echelon.errors import ConfigError
from parallel import schedule as schedules
from parallel.schedule import Kind, Op, Schedule
from parallel.timeline import DeadlockError, Timeline, simulate

KINDS = {  # schedule -> its name in a heading
    "inference": "1F1B at inference",
    "1f1b": "1F1B in training",
    "gpipe": "GPipe",
    "interleaved": "interleaved 1F1B",
}
MAX_OPERATIONS = 100_000


@dataclass(frozen=True, slots=True)
class Simulation:
    """What is simulated. Numbers left at 0 are chosen in `parse`.

    costs: seconds of a forward on each stage, or one for all. slots: factors for micro-batches in turn. back: seconds
    of a B for each second of the F, in training. latency: seconds between stages. queue: outputs that may lie between
    two stages, 0: no bound. cohorts take turns; depth: micro-batches in flight at the first stage.
    """

    schedule: str = "inference"
    stages: int = 4
    microbatches: int = 8
    costs: tuple[float, ...] = (1.0,)
    slots: tuple[float, ...] = (1.0,)
    back: float = 2.0
    latency: float = 0.0
    queue: int = 0
    chunks: int = 1
    cohorts: int = 0
    depth: int = 0

    @property
    def name(self) -> str:
        """For a heading."""
        return KINDS[self.schedule] + (f", {self.chunks} chunks a rank" if self.chunks > 1 else "")

    @property
    def trains(self) -> bool:
        """Whether B is a backward pass."""
        return self.schedule != "inference"

    @property
    def equal(self) -> bool:
        """Whether the closed form of the bubble holds: equal costs everywhere, and always something to do."""
        busy = self.trains or min(self.cohorts, self.depth) >= self.stages
        return busy and len({*self.costs}) == len({*self.slots}) == 1 and not self.latency

    def plan(self) -> Schedule:
        """The operations of each stage."""
        match self.schedule:
            case "gpipe":
                return schedules.gpipe(self.stages, self.microbatches)
            case "1f1b":
                return schedules.one_f_one_b(self.stages, self.microbatches)
            case "interleaved":
                return schedules.interleaved(self.stages, self.microbatches, self.chunks)
            case _:
                afters = (max(0, m - self.cohorts + 1) for m in range(self.microbatches))
                return schedules.inference(self.stages, afters, self.depth)

    def cost_s(self, stage: int, op: Op) -> float:
        """Seconds of an operation; a chunk is its share of the rank's layers."""
        forward_s = self.costs[stage % len(self.costs)] * self.slots[op.microbatch % len(self.slots)] / self.chunks
        return forward_s if op.kind is Kind.FORWARD else forward_s * self.back if self.trains else 0.0

    def run(self) -> Timeline:
        """The timeline. Raises ConfigError where the queues are too short for the schedule."""
        try:
            return simulate(self.plan(), self.cost_s, latency_s=self.latency, queue_length=self.queue or None)
        except DeadlockError as error:
            message = f"queue={self.queue} deadlocks {self.schedule}: {error}; give it longer queues"
            raise ConfigError(message, field="queue") from error


def parse(text: str) -> Simulation:
    """The simulation that "key=value,..." asks for. Raises ConfigError."""
    given: dict[str, str] = {}
    for part in text.replace(" ", "").split(","):
        key, equals, value = part.partition("=")
        if not equals or key not in FIELDS:
            raise ConfigError(
                f"simulate: expected KEY=VALUE with a key of {', '.join(FIELDS)}; got {part!r}", field=key
            )
        if key in given:
            raise ConfigError(f"simulate: {key} is given twice", field=key)
        given[key] = value
    kind = given.get("schedule", "inference")
    if kind not in KINDS:
        raise ConfigError(f"simulate: schedule must be one of {', '.join(KINDS)}; got {kind!r}", field="schedule")
    count = {key: _count(given, key) for key in FIELDS if FIELDS[key] == "int"}
    seconds = {key: _numbers(given, key) for key in FIELDS if FIELDS[key] == "tuple[float, ...]"}
    number = {key: _numbers(given, key, least=0.0) for key in ("back", "latency")}
    defaults = Simulation()
    return _checked(
        Simulation(
            schedule=kind,
            stages=(stages := count["stages"] or defaults.stages),
            microbatches=count["microbatches"] or defaults.microbatches,
            costs=seconds["costs"] or defaults.costs,
            slots=seconds["slots"] or defaults.slots,
            back=number["back"][0] if number["back"] else defaults.back,
            latency=number["latency"][0] if number["latency"] else defaults.latency,
            queue=count["queue"],
            chunks=count["chunks"] or (2 if kind == "interleaved" else 1),
            cohorts=(cohorts := count["cohorts"] or stages),
            depth=count["depth"] or max(stages, cohorts),
        )
    )


FIELDS: Mapping[str, str] = {field.name: str(field.type) for field in fields(Simulation)}


def _checked(simulation: Simulation) -> Simulation:
    stages, microbatches, chunks = simulation.stages, simulation.microbatches, simulation.chunks
    if (count := 2 * stages * microbatches * chunks) > MAX_OPERATIONS:
        raise ConfigError(
            f"simulate: 2 * stages {stages} * microbatches {microbatches} * chunks {chunks} = {count} operations; "
            f"at most {MAX_OPERATIONS}",
            field="microbatches",
        )
    if len(simulation.costs) not in (1, stages):
        raise ConfigError(
            f"simulate: {len(simulation.costs)} costs for stages={stages}: give 1 or {stages}", field="costs"
        )
    if simulation.schedule == "interleaved" and (chunks < 2 or microbatches % stages):
        raise ConfigError(
            f"simulate: interleaved needs chunks of at least 2 and microbatches divisible by stages; got "
            f"chunks={chunks}, microbatches={microbatches}, stages={stages}",
            field="microbatches",
        )
    if simulation.schedule != "interleaved" and chunks != 1:
        raise ConfigError(f"simulate: chunks={chunks} needs schedule=interleaved", field="chunks")
    return simulation


def _count(given: Mapping[str, str], key: str) -> int:
    """An integer of at least 1; 0 if it was not given."""
    if key not in given:
        return 0
    try:
        value = int(given[key])
    except ValueError:
        value = 0
    if value < 1:
        raise ConfigError(f"simulate: {key} must be an integer >= 1, got {given[key]!r}", field=key)
    return value


def _numbers(given: Mapping[str, str], key: str, least: float | None = None) -> tuple[float, ...]:
    """Numbers divided by slashes, above 0 or at least `least`; none if not given."""
    try:
        values = tuple(float(value) for value in given[key].split("/")) if key in given else ()
    except ValueError:
        values = (math.nan,)
    if not all(math.isfinite(value) and (value > 0 if least is None else value >= least) for value in values):
        bound = "> 0" if least is None else f">= {least:g}"
        raise ConfigError(f"simulate: {key} must be a number {bound}, got {given[key]!r}", field=key)
    return values
