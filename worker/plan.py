"""StepPlan and StepResult: what the leader tells every rank to run, and what comes back.

Immutable, torch-free, the same in the engine, the simulator and the runner. On the wire a plan is the protobuf
record echelon.internal.v1.StepPlan whose tables are little-endian int32, so a rank copies them to its device
as they are. Encoding lives here beside the layout it must agree with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from echelon.internal.link import Fence, Logprob, Sampling
from echelon.internal.v1 import control_pb2, plan_pb2

Int32Array = npt.NDArray[np.int32]

ADMIT_WIDTH = 7  # slot, choice, seed low, seed high, temperature bits, top_p bits, top_k
BLOCK_WIDTH = 3  # slot, index in the slot's block table, block id
ROW_WIDTH = 5  # slot, first position, tokens, offset of given ids or -1, logprobs wanted (see below)

NO_SAMPLE = -2  # in a row's last column: the row ends before its prompt does, nothing is sampled
NO_LOGPROBS = -1  # sampled, no log-probabilities; k >= 0: the sampled token's and the k likeliest


@dataclass(frozen=True, slots=True)
class Admit:
    """A choice takes a slot of the device-resident state. Noise is keyed by (seed, choice, position).

    Ids from position prompt_tokens on are generated ones: what penalties, bad words and a grammar look at.
    """

    slot: int
    choice: int
    prompt_tokens: int
    sampling: Sampling


class Told(NamedTuple):
    """Ids of positions first .. of a slot whose keys and values are in its blocks already: a cached prefix."""

    slot: int
    first: int
    ids: tuple[int, ...]


class Row(NamedTuple):
    """Consecutive tokens of one slot: positions first .. first + tokens - 1. One a request a step, so it must be cheap.

    given: their ids (a prefill chunk), or None for a decode row, whose one id is the slot's last sampled one.
    sampled: draw the id of position first + tokens. logprobs: None, or how many alternatives beside its own.
    scored: None, or how many alternatives beside the log-probability of each token of the prompt that follows one of
    these: given[1:], and next_id unless the prompt ends here.
    """

    slot: int
    first: int
    tokens: int
    given: tuple[int, ...] | None
    sampled: bool
    logprobs: int | None = None
    scored: int | None = None
    next_id: int | None = None


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step of every rank. Applied in order: admits, block changes, told ids, rows; decode rows come first."""

    fence: Fence
    step: int
    admits: tuple[Admit, ...] = ()
    blocks: tuple[tuple[int, int, int], ...] = ()
    rows: tuple[Row, ...] = ()
    told: tuple[Told, ...] = ()


@dataclass(frozen=True, slots=True)
class StepResult:
    """Ids of the plan's sampled rows in row order; logprobs beside them, None where none were asked.

    scores: of the plan's scored rows in row order, the log-probabilities of the prompt tokens that they predict.
    """

    step: int
    ids: tuple[int, ...]
    logprobs: tuple[Logprob | None, ...]
    scores: tuple[tuple[Logprob, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class PlanTables:
    """A decoded plan as a rank uses it: admits [A, 7], blocks [B, 3], rows [R, 5], token_ids [given], all int32."""

    fence: Fence
    step: int
    admits: Int32Array
    blocks: Int32Array
    rows: Int32Array
    token_ids: Int32Array


def encode(plan: StepPlan) -> bytes:
    """The wire form of a plan."""
    rows: list[tuple[int, int, int, int, int]] = []
    given: list[int] = []
    for row in plan.rows:
        wanted = NO_SAMPLE if not row.sampled else NO_LOGPROBS if row.logprobs is None else row.logprobs
        rows.append((row.slot, row.first, row.tokens, -1 if row.given is None else len(given), wanted))
        if row.given is not None:
            given.extend(row.given)
    record = plan_pb2.StepPlan(
        fence=control_pb2.Fence(term=plan.fence.term, replica=plan.fence.replica, epoch=plan.fence.epoch),
        step=plan.step,
        admits=_admit_table(plan.admits).tobytes(),
        blocks=np.asarray(plan.blocks, dtype="<i4").tobytes(),
        rows=np.asarray(rows, dtype="<i4").tobytes(),
        token_ids=np.asarray(given, dtype="<i4").tobytes(),
    )
    return record.SerializeToString()


def decode(payload: bytes) -> PlanTables:
    """The tables of a plan read from a socket."""
    record = plan_pb2.StepPlan.FromString(payload)

    def table(content: bytes, width: int) -> Int32Array:
        return np.frombuffer(content, dtype="<i4").reshape(-1, width)

    return PlanTables(
        fence=Fence(record.fence.term, record.fence.replica, record.fence.epoch),
        step=record.step,
        admits=table(record.admits, ADMIT_WIDTH),
        blocks=table(record.blocks, BLOCK_WIDTH),
        rows=table(record.rows, ROW_WIDTH),
        token_ids=np.frombuffer(record.token_ids, dtype="<i4"),
    )


def _admit_table(admits: tuple[Admit, ...]) -> Int32Array:
    """[admits, ADMIT_WIDTH]; floats travel as their float32 bits, the seed as two halves."""
    table = np.zeros((len(admits), ADMIT_WIDTH), dtype="<i4")
    for index, admit in enumerate(admits):
        sampling = admit.sampling
        seed = sampling.seed & 0xFFFF_FFFF_FFFF_FFFF
        table[index, :2] = admit.slot, admit.choice
        table[index, 2:4] = np.array([seed & 0xFFFF_FFFF, seed >> 32], dtype="<u4").view("<i4")
        table[index, 4:6] = np.array([sampling.temperature, sampling.top_p], dtype="<f4").view("<i4")
        table[index, 6] = sampling.top_k
    return table
