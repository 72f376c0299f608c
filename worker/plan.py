"""StepPlan and StepResult: what the leader tells every rank to run, and what comes back.

Immutable, torch-free, the same in the engine, the simulator and the runner. On the wire a plan is the protobuf
record echelon.internal.v1.StepPlan: tables of fixed width as little-endian bytes that a rank reads as they lie, and a
message for each admit with rules of no fixed size (`plan_rules.py`). Encoding lives here beside the layout it must
agree with.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from echelon.internal.link import Fence, Logprob, Sampling
from echelon.internal.v1 import control_pb2, plan_pb2
from worker.plan_rules import Rules

Int32Array = npt.NDArray[np.int32]

Records = npt.NDArray[np.void]

ADMIT = np.dtype(
    [
        ("slot", "<i4"),
        ("choice", "<i4"),
        ("seed", "<i8"),
        ("prompt_tokens", "<i4"),
        ("top_k", "<i4"),
        ("min_tokens", "<i4"),
        ("temperature", "<f8"),
        ("top_p", "<f8"),
        ("min_p", "<f8"),
        ("presence_penalty", "<f8"),
        ("frequency_penalty", "<f8"),
        ("repetition_penalty", "<f8"),
    ]
)
BLOCK_WIDTH = 3  # slot, index in the slot's block table, block id
TOLD_WIDTH = 3  # slot, first position, tokens
ROW_WIDTH = 5  # slot, first position, tokens, offset of given ids or -1, logprobs wanted (see below)
SCORED_WIDTH = 3  # index of its row, alternatives, id after the row's last or -1

DRAIN = b""  # in the stream of plans: no other comes until results have come back

NO_SAMPLE = -2  # in a row's last column: the row ends before its prompt does, nothing is sampled
NO_LOGPROBS = -1  # sampled, no log-probabilities; k >= 0: the sampled token's and the k likeliest
NO_ID = -1  # stands in a result where no id could be drawn
NON_FINITE = -2  # stands where the scores were not finite: an id was drawn, but it means nothing


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
    """Ids of positions first .. of a slot: of a cached prefix, whose keys and values are in its blocks already, or
    drafts, each the one token of a decode row of the plan, or what a prompt goes on with, where models predict."""

    slot: int
    first: int
    ids: tuple[int, ...]


class Row(NamedTuple):
    """Consecutive tokens of one slot: positions first .. first + tokens - 1. One a request a step, so it must be cheap.

    given: their ids (a prefill chunk), or None for a decode row, whose one id the slot has: the last sampled one, or a
    draft. The rows of a slot's drafts stand behind the one that they go on from.
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


class Lane(NamedTuple):
    """Of one data rank's plan, what the others must know: its tokens, whether all of them decode, and what it returns.

    wanted: the last column of its sampled rows. scored: of its scored rows, how many scores, how many alternatives.
    """

    tokens: int
    decodes: bool
    wanted: tuple[int, ...]
    scored: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step of every rank. Applied in order: admits, block changes, told ids, rows; decode rows come first.

    after: so many steps of this epoch must have returned their ids before this one, for a decode row reads the last.
    lanes: of all data ranks, in their order; empty where there is one. rebalances: experts move before it.
    captures: before it a decode step of so many rows is captured as a CUDA graph, none if 0.
    """

    fence: Fence
    step: int
    admits: tuple[Admit, ...] = ()
    blocks: tuple[tuple[int, int, int], ...] = ()
    rows: tuple[Row, ...] = ()
    told: tuple[Told, ...] = ()
    after: int = 0
    lanes: tuple[Lane, ...] = ()
    rebalances: bool = False
    captures: int = 0


@dataclass(frozen=True, slots=True)
class StepResult:
    """Ids of the plan's sampled rows in row order; logprobs beside them, None where none were asked.

    scores: of the plan's scored rows in row order, the log-probabilities of the prompt tokens that they predict.
    faults: (index among the sampled rows, why) of rows that no id could be drawn for, because the matcher of their
    constraint broke: it exceeded its limits, or the ids to go on from do not follow the grammar. Their id is NO_ID.
    non_finite: indices of sampled rows whose scores were NaN or infinite. Their id is NON_FINITE.
    drafts: of each sampled row, what the model predicts behind its id; empty where it does not.
    slot_s: what the leader's stage took for it, 0 where that was not measured.
    """

    step: int
    ids: tuple[int, ...]
    logprobs: tuple[Logprob | None, ...]
    scores: tuple[tuple[Logprob, ...], ...] = ()
    faults: tuple[tuple[int, str], ...] = ()
    non_finite: tuple[int, ...] = ()
    drafts: tuple[int, ...] = ()
    slot_s: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True)
class PlanTables:
    """A decoded plan as a rank uses it.

    admits: [admits] of dtype ADMIT. rules: of those admits that have any. blocks [B, 3], rows [R, 5], told [told, 3],
    scored [scored rows, 3], token_ids [given] and told_ids [told ids], one row's after another's: all int32.
    """

    fence: Fence
    step: int
    admits: Records
    rules: tuple[Rules, ...]
    blocks: Int32Array
    told: Int32Array
    told_ids: Int32Array
    rows: Int32Array
    scored: Int32Array
    token_ids: Int32Array
    after: int = 0
    lanes: tuple[Lane, ...] = ()
    rebalances: bool = False
    captures: int = 0


def lane_of(plan: StepPlan) -> Lane:
    """What other data ranks must know of a plan."""
    return Lane(
        tokens=sum(row.tokens for row in plan.rows),
        decodes=all(row.given is None for row in plan.rows),
        wanted=tuple(NO_LOGPROBS if row.logprobs is None else row.logprobs for row in plan.rows if row.sampled),
        scored=tuple((row.tokens - (row.next_id is None), row.scored) for row in plan.rows if row.scored is not None),
    )


def encode(plan: StepPlan) -> bytes:
    """The wire form of a plan."""
    rows: list[tuple[int, int, int, int, int]] = []
    scored: list[tuple[int, int, int]] = []
    given: list[int] = []
    for index, (slot, first, tokens, ids, sampled, logprobs, alternatives, next_id) in enumerate(plan.rows):
        wanted = NO_SAMPLE if not sampled else NO_LOGPROBS if logprobs is None else logprobs
        rows.append((slot, first, tokens, -1 if ids is None else len(given), wanted))
        if ids is not None:
            given.extend(ids)
        if alternatives is not None:
            scored.append((index, alternatives, -1 if next_id is None else next_id))
    record = plan_pb2.StepPlan(
        fence=control_pb2.Fence(term=plan.fence.term, replica=plan.fence.replica, epoch=plan.fence.epoch),
        step=plan.step,
        admits=np.array([_admit_record(admit) for admit in plan.admits], dtype=ADMIT).tobytes(),
        blocks=np.asarray(plan.blocks, dtype="<i4").tobytes(),
        rows=np.asarray(rows, dtype="<i4").tobytes(),
        token_ids=np.asarray(given, dtype="<i4").tobytes(),
        rules=[rules.message() for admit in plan.admits if (rules := Rules.of(admit.slot, admit.sampling))],
        told=np.asarray([(told.slot, told.first, len(told.ids)) for told in plan.told], dtype="<i4").tobytes(),
        told_ids=np.asarray([token for told in plan.told for token in told.ids], dtype="<i4").tobytes(),
        scored=np.asarray(scored, dtype="<i4").tobytes(),
        after=plan.after,
        lanes=[_lane_message(lane) for lane in plan.lanes],
        rebalances=plan.rebalances,
        captures=plan.captures,
    )
    return record.SerializeToString()


def decode(payload: bytes) -> PlanTables:
    """The tables of a plan read from a socket."""
    record = plan_pb2.StepPlan.FromString(payload)

    def ids(content: bytes) -> Int32Array:
        return np.frombuffer(content, dtype="<i4")

    return PlanTables(
        fence=Fence(record.fence.term, record.fence.replica, record.fence.epoch),
        step=record.step,
        admits=np.frombuffer(record.admits, dtype=ADMIT),
        rules=tuple(Rules.read(message) for message in record.rules),
        blocks=ids(record.blocks).reshape(-1, BLOCK_WIDTH),
        told=ids(record.told).reshape(-1, TOLD_WIDTH),
        told_ids=ids(record.told_ids),
        rows=ids(record.rows).reshape(-1, ROW_WIDTH),
        scored=ids(record.scored).reshape(-1, SCORED_WIDTH),
        token_ids=ids(record.token_ids),
        after=record.after,
        lanes=tuple(_lane_from(message) for message in record.lanes),
        rebalances=record.rebalances,
        captures=record.captures,
    )


def _lane_message(lane: Lane) -> plan_pb2.Lane:
    scores, alternatives = [count for count, _ in lane.scored], [wanted for _, wanted in lane.scored]
    return plan_pb2.Lane(
        tokens=lane.tokens, decodes=lane.decodes, wanted=lane.wanted, scores=scores, alternatives=alternatives
    )


def _lane_from(message: plan_pb2.Lane) -> Lane:
    scored = tuple(zip(message.scores, message.alternatives, strict=True))
    return Lane(message.tokens, message.decodes, tuple(message.wanted), scored)


def _admit_record(admit: Admit) -> tuple[float, ...]:
    """In the order of ADMIT."""
    sampling = admit.sampling
    return (
        admit.slot,
        admit.choice,
        sampling.seed,
        admit.prompt_tokens,
        sampling.top_k,
        sampling.min_tokens,
        sampling.temperature,
        sampling.top_p,
        sampling.min_p,
        sampling.presence_penalty,
        sampling.frequency_penalty,
        sampling.repetition_penalty,
    )
