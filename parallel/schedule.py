"""The pipeline schedule: which operation a stage runs next, decided by counts and the stream of plans alone.

Pure and torch-free: the engine and the ranks call `next_op` online, planner and tests unroll it into static lists.
F is a micro-batch (a prefill chunk, a decode cohort) going forward through a stage. B, without a backward pass, is the
return of its sampled tokens from the last stage to the first; in training B is its backward pass. It knows no clock,
tensor or process group: how long operations take is the business of timeline.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple

NO_RETURNS = 0  # limit of an inner stage at inference: tokens go from the last stage to the first, past it


class Kind(StrEnum):
    """What a stage does with a micro-batch."""

    FORWARD = "F"
    BACK = "B"


class Op(NamedTuple):
    """One operation of one stage. microbatch counts from 0; chunk is the virtual stage, where a rank holds several."""

    kind: Kind
    microbatch: int
    chunk: int = 0

    def __str__(self) -> str:
        return f"{self.kind}({self.microbatch}{f'.{self.chunk}' if self.chunk else ''})"


@dataclass(frozen=True, slots=True)
class StageState:
    """Where one stage stands. Counts suffice, because micro-batches pass every edge in order.

    limit: how many micro-batches may be forwarded and not yet back, or NO_RETURNS. pending: one entry for each
    micro-batch announced and not yet forwarded, the number of returns it needs before it, which is 1 + the latest
    micro-batch whose sampled tokens it reads, or 0. draining: no other is coming, so what is out comes back.
    """

    limit: int
    pending: tuple[int, ...] = ()
    draining: bool = False
    forwarded: int = 0
    returned: int = 0

    @property
    def in_flight(self) -> int:
        """Micro-batches forwarded and not yet back."""
        return self.forwarded - self.returned

    def announce(self, after: int = 0) -> StageState:
        """The plan stream has another micro-batch, to go forward once `after` micro-batches have returned."""
        microbatch = self.forwarded + len(self.pending)
        assert 0 <= after <= microbatch, f"micro-batch {microbatch} needs {after} returns; only earlier ones can return"
        return replace(self, pending=(*self.pending, after), draining=False)

    def drain(self) -> StageState:
        """The plan stream pauses: what is in flight returns."""
        return replace(self, draining=True)

    def offering(self, ready: bool) -> StageState:
        """The leader's own view: a micro-batch can be planned now, or none and it waits for what is in flight."""
        return replace(self, pending=(0,) if ready else (), draining=not ready)

    def apply(self, op: Op) -> StageState:
        """The state after an operation that next_op gave."""
        if op.kind is Kind.FORWARD:
            return replace(self, pending=self.pending[1:], forwarded=self.forwarded + 1)
        return replace(self, returned=self.returned + 1)


def next_op(state: StageState) -> Op | None:
    """One forward, one back: what the stage does next, or None to wait for the plan stream.

    1. As many micro-batches out as may be: take one back.
    2. One is announced: forward it; take one back first if it reads tokens that have not returned.
    3. None is announced: wait; take back what is out if the stream says that none will come.

    No step asks what has arrived, so a stage's operations follow from the plan stream alone, whatever the timing, and
    a return that has not arrived is waited for. Four stages and four cohorts, limit 4 on the first stage, each
    micro-batch reading the tokens of the one four before it:

        time      0  1  2  3  4  5  6  7
        stage 0   F0 F1 F2 F3 F4 F5 F6 F7      B0, the tokens of 0 coming in, stands between F3 and F4
        stage 1      F0 F1 F2 F3 F4 F5 F6
        stage 2         F0 F1 F2 F3 F4 F5
        stage 3            F0 F1 F2 F3 F4      each F is followed by its B, the tokens going out

    Sources: 1F1B is PipeDream-Flush (Narayanan et al. 2021, "Memory-Efficient Pipeline-Parallel DNN Training", 3.1)
    in Megatron-LM's form (Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters", 2.2).
    That a schedule keeps its forward-only form as a case of the same rule follows DualPipe (DeepSeek-V3, 3.2.1).
    """
    forward, back = Op(Kind.FORWARD, state.forwarded), Op(Kind.BACK, state.returned)
    if state.limit == NO_RETURNS:
        return forward if state.pending else None
    if state.in_flight == state.limit:
        return back
    if state.pending:
        return forward if state.pending[0] <= state.returned else back
    return back if state.draining and state.in_flight else None


def stage_state(stage: int, stages: int, depth: int) -> StageState:
    """A stage at the start of an epoch of inference; depth is stages, or one more to hide the way of the tokens.

    The last stage sends each micro-batch's tokens at once. The leader decides on plans with a state of its own,
    StageState(stages + 1), so that a plan is always ahead of the device.
    """
    assert 0 <= stage < stages, f"stage {stage} of {stages}"
    assert depth >= 1, f"depth {depth} must be at least 1"
    if stage == stages - 1:
        return StageState(1)
    return StageState(depth if stage == 0 else NO_RETURNS)


def unroll(state: StageState) -> tuple[Op, ...]:
    """Every operation until the rule says wait."""
    ops: list[Op] = []
    while op := next_op(state):
        ops.append(op)
        state = state.apply(op)
    return tuple(ops)


class Source(NamedTuple):
    """Where an operation's input comes from."""

    stage: int
    op: Op


@dataclass(frozen=True, slots=True)
class Schedule:
    """The operations of each stage in order, [stages][operations]. trains: B is a backward pass of every stage."""

    name: str
    microbatches: int
    ops: tuple[tuple[Op, ...], ...]
    chunks: int = 1
    trains: bool = False

    @property
    def stages(self) -> int:
        """How many ranks the pipeline has."""
        return len(self.ops)

    def source(self, stage: int, op: Op) -> Source | None:
        """The operation whose output this one takes in; None if it starts the micro-batch."""
        last = self.stages - 1
        if op.kind is Kind.FORWARD:
            if stage > 0:
                return Source(stage - 1, op)
            return Source(last, op._replace(chunk=op.chunk - 1)) if op.chunk else None
        if not self.trains and stage < last:
            return Source(last, op)
        if stage < last:
            return Source(stage + 1, op)
        if op.chunk < self.chunks - 1:
            return Source(0, op._replace(chunk=op.chunk + 1))
        return Source(last, op._replace(kind=Kind.FORWARD))


def inference(stages: int, afters: Iterable[int], depth: int) -> Schedule:
    """What next_op makes of a stream of micro-batches that is then drained; afters as in StageState.pending."""
    after = tuple(afters)

    def announced(stage: int) -> StageState:
        state = stage_state(stage, stages, depth)
        for returns in after:
            state = state.announce(returns)
        return state.drain()

    return Schedule("inference", len(after), tuple(unroll(announced(stage)) for stage in range(stages)))


def decode_rounds(stages: int, cohorts: int, rounds: int, depth: int) -> Schedule:
    """Cohorts that take turns, each reading the tokens of its own last round: the steady state of decoding."""
    assert cohorts >= 1 and rounds >= 1, f"{cohorts} cohorts, {rounds} rounds"
    return inference(stages, (max(0, m - cohorts + 1) for m in range(cohorts * rounds)), depth)


def gpipe(stages: int, microbatches: int) -> Schedule:
    """All forward, then all back: every micro-batch's activations are held (Huang et al. 2019, "GPipe", figure 2c).

        stage 0   F0 F1 F2 F3                   B0 B1 B2 B3
        stage 1      F0 F1 F2 F3             B0 B1 B2 B3
        stage 2         F0 F1 F2 F3       B0 B1 B2 B3
        stage 3            F0 F1 F2 F3 B0 B1 B2 B3

    Unlike GPipe's figure, micro-batches come back oldest first, as every edge here is a queue.
    """
    ops = tuple(unroll(_all_announced(microbatches, microbatches)) for _ in range(stages))
    return Schedule("gpipe", microbatches, ops, trains=True)


def one_f_one_b(stages: int, microbatches: int) -> Schedule:
    """1F1B with a backward pass: stage s holds the activations of at most stages - s micro-batches.

        stage 0   F0 F1 F2 F3          B0 F4 B1 F5 B2    B3    B4    B5
        stage 1      F0 F1 F2       B0 F3 B1 F4 B2 F5 B3    B4    B5
        stage 2         F0 F1    B0 F2 B1 F3 B2 F4 B3 F5 B4    B5
        stage 3            F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5

    The bubble is GPipe's; the memory does not grow with the micro-batches. Sources: see next_op.
    """
    ops = tuple(unroll(_all_announced(microbatches, stages - stage)) for stage in range(stages))
    return Schedule("1f1b", microbatches, ops, trains=True)


def interleaved(stages: int, microbatches: int, chunks: int) -> Schedule:
    """1F1B over `chunks` virtual stages a rank: rank s holds virtual stages s, s + stages, ..., the bubble shrinks.

    1. Number the forwards of a rank k = 0, 1, ...: groups of `stages` micro-batches pass chunk 0, then chunk 1, ...
    2. Number the backs likewise, from the last chunk to the first.
    3. Run the same rule over these numbers. The first back of stage s comes from all chunks behind it, and both ways
       through the stages behind it: limit 2 (stages - s - 1) + (chunks - 1) stages + 1.

    Needs microbatches divisible by stages. Source: Megatron-LM's interleaved 1F1B, see next_op.
    """
    assert chunks >= 2, f"{chunks} chunks a rank interleave nothing: use one_f_one_b"
    assert microbatches % stages == 0, f"{microbatches} micro-batches do not come in groups of {stages} stages"

    def named(op: Op) -> Op:
        group, place = divmod(op.microbatch, stages * chunks)
        chunk, index = divmod(place, stages)
        return Op(op.kind, group * stages + index, chunk if op.kind is Kind.FORWARD else chunks - 1 - chunk)

    def limit(stage: int) -> int:
        return 2 * (stages - stage - 1) + (chunks - 1) * stages + 1

    ops = (unroll(_all_announced(microbatches * chunks, limit(stage))) for stage in range(stages))
    return Schedule("interleaved", microbatches, tuple(tuple(map(named, row)) for row in ops), chunks, trains=True)


def _all_announced(microbatches: int, limit: int) -> StageState:
    assert microbatches >= 1, f"{microbatches} micro-batches"
    return StageState(limit, pending=(0,) * microbatches, draining=True)
