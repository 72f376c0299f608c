"""Runs plans on one stage: state of the slots, its part of the forward pass, sampling, and the ids back to the host.

One per rank, in the rank's runner thread. `forward` and `back` queue work without waiting for the device, so a caller
may launch the next step before it takes the result of this one. It must not know requests, sockets or the scheduler,
nor how ids are drawn.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from models.batch import ForwardBatch
from models.decoder import DecoderModel
from models.expert_balance import rebalance_experts
from models.tables import held_layers
from parallel.comm import Channel
from parallel.context import ParallelContext
from worker import non_finite
from worker.batch import DecodeRows, StepBatch, apply_and_build
from worker.cuda_capture import Capture
from worker.decode_graphs import DecodeGraphs
from worker.greedy_batch import greedy_batch
from worker.kv_cache import KVCache
from worker.lane_results import of_all_lanes
from worker.last_stage import LastStage
from worker.later_graphs import Later, LaterGraphs
from worker.matchers import Masks, Matchers
from worker.non_finite import Sampled
from worker.op_clock import OpClock, Span
from worker.pending import (
    ID,
    SCORES,
    Drawn,
    PendingStep,
    Queued,
    nothing_drawn,
    outcome_width,
    scores_width,
)
from worker.plan import PlanTables, StepResult
from worker.slots import SlotState
from worker.upload import Downloads


@dataclass(frozen=True, slots=True)
class RunnerLimits:
    """max_running slots of at most max_context tokens, in blocks of block_tokens."""

    max_running: int
    max_context: int
    block_tokens: int


@dataclass(frozen=True, slots=True)
class _Out:
    """A step that has gone forward and whose sampled ids have not travelled. drawn: None on the first stage."""

    step: int
    batch: StepBatch
    span: Span
    drawn: Drawn | None


class Runner:
    """Applies plans in order to one stage's model and its cache."""

    def __init__(
        self,
        model: DecoderModel,
        kv_cache: KVCache,
        context: ParallelContext,
        limits: RunnerLimits,
        matchers: Matchers,
    ) -> None:
        self.model = model
        self._kv_cache = kv_cache
        self._context = context
        self._matchers = matchers
        # One slot more than requests have, for rows that fill a graph.
        self._state = SlotState(limits.max_running + 1, limits.max_context, limits.block_tokens, context.device)
        self._last = LastStage(model, kv_cache, self._state, context) if context.place.last_stage else None
        self._graphs: DecodeGraphs | None = None
        self._later: LaterGraphs | None = None
        self._out: deque[_Out] = deque()
        self._downloads = Downloads(context.device)
        self.clock = OpClock(context.device)

    def capture_graphs(self, capture: Capture, sizes: Sequence[int]) -> None:
        """From now on a graph computes each step of decode rows that one of these numbers of rows has room for. Every
        rank of the stages must do the same, with no step on its way; the cache must be padded."""
        self._padded_graphs().capture(capture, sizes)

    def capture_later(self, capture: Capture, sizes: Sequence[int], told: Callable[[Later], None]) -> None:
        """The same, but each size when a plan says so; until then steps are launched eagerly."""
        self._later = LaterGraphs(self._padded_graphs(), capture, sizes, self._context, told)

    def reset_graphs(self) -> None:
        """Before groups are closed; no step is run afterwards."""
        if self._graphs is not None:
            self._graphs.reset()

    def run(self, tables: PlanTables) -> StepResult:
        """One plan by itself, waited for. Every rank of the stages must do the same."""
        pending = self.forward(tables).pending
        if self._out:
            pending = self.back().pending or pending
        assert pending is not None, "either forward or back ends a step"
        return pending.result()

    @torch.inference_mode()
    def forward(self, tables: PlanTables) -> Queued:
        """Queue a plan's forward pass through this stage. On the first of several the step ends with its way back.

        Of a constrained row, the id before must have been on its way.
        """
        assert tables.fence.epoch == self._context.epoch, "a plan of another epoch"
        tensor, last = self._context.tensor, self._last
        if tables.rebalances:
            rebalance_experts(self.model, self._context)
        if tables.captures and self._later is not None:
            self._later.before_step(tables.captures)
        graph_rows = 0 if self._graphs is None else self._graphs.rows_for(tables)
        batch = None
        if last is not None and self.model.prediction is None:
            batch = greedy_batch(tables, self._state, graph_rows)
        if batch is None:
            piece_rows = 0 if last is None else last.piece_rows
            batch = apply_and_build(tables, self._state, tensor.rank, tensor.size, piece_rows, graph_rows)
        constrained = [row.slot for part in batch.ruled for row in part.constrained]
        following = self._matchers.begin(tables, constrained) if last is not None else None
        computes = bool(len(tables.rows) or tables.lanes)  # one without rows meets the others at the experts
        hidden = self._receive(batch) if computes else None
        started = self.clock.mark()
        if computes:
            hidden = self._compute(batch.forward, hidden)
        if last is None:
            return self._pass_on(tables.step, batch, hidden, Span(started, self.clock.mark()))
        drawn = self._draw(last, hidden, batch, None if following is None else following.result())
        span = Span(started, self.clock.mark())
        constraints = self._matchers.of(batch.sampled_slots.tolist())
        own = Sampled(drawn.outcome, batch.slots, batch.positions)
        pending = PendingStep(tables.step, drawn, self._downloads, constraints, span, own)
        for row, constraint in constraints.items():
            constraint.drawn = (pending, row)
        if self._context.returned is not None:
            self._out.append(_Out(tables.step, batch, span, drawn))
        elif batch.lanes:
            pending = PendingStep(tables.step, self._of_all_lanes(drawn, batch), self._downloads, span=span, own=own)
        return Queued(tables.step, span, pending)

    @torch.inference_mode()
    def back(self) -> Queued:
        """The sampled ids of the oldest step that is out travel from the last stage to the first, and end it there."""
        channel, out = self._context.returned, self._out.popleft()
        assert channel is not None, "a stage alone has its ids at once"
        return self._send_back(channel, out) if self._context.place.last_stage else self._take_back(channel, out)

    def tell_non_finite(self, pending: PendingStep, result: StepResult) -> None:
        """Which layer it began in, to the log, if the step has rows that are not finite: its leader ends them next."""
        place = self._context.place
        if result.non_finite and pending.own is not None and place.tensor_rank == 0:
            first_layer = held_layers(self.model.config, place).start
            non_finite.tell(result.step, pending.own, self._state, self._kv_cache, first_layer)

    def _padded_graphs(self) -> DecodeGraphs:
        if self._graphs is None:
            self._graphs = DecodeGraphs(self.model, self._kv_cache, self._state, self._context, self._last)
        return self._graphs

    def _compute(self, rows: ForwardBatch | DecodeRows, hidden: Tensor | None) -> Tensor:
        """What DecoderModel makes of them."""
        if isinstance(rows, ForwardBatch):
            return self.model.through(rows, self._kv_cache, hidden)
        assert self._graphs is not None, "rows of a graph"
        return self._graphs.replay(rows, hidden)

    def _draw(self, last: LastStage, hidden: Tensor | None, batch: StepBatch, masks: Masks | None) -> Drawn:
        if isinstance(batch.forward, ForwardBatch):
            return last.draw(hidden, batch, masks)
        assert self._graphs is not None, "rows of a graph"
        predict = partial(self._graphs.predict, batch.forward)
        return last.draw_ended(*self._graphs.ended(batch.forward), batch, masks, predict)

    # Between stages.

    def _receive(self, batch: StepBatch) -> Tensor | None:
        """What the stage before has made of the batch; None on the first."""
        channel = self._context.received
        if channel is None:
            return None
        shape = batch.forward.tokens, self.model.config.hidden_size
        if not shape[0]:
            return torch.empty(shape, dtype=self._context.dtype, device=self._context.device)
        return channel.receive(shape, self._context.dtype)

    def _pass_on(self, step: int, batch: StepBatch, hidden: Tensor | None, span: Span) -> Queued:
        assert self._context.sent is not None, "a stage that is not the last has one behind it"
        if hidden is not None and len(hidden):
            self._context.sent.send(hidden)
        if not self._context.place.first_stage:
            nothing = nothing_drawn(self._context.device)
            return Queued(step, span, PendingStep(step, nothing, self._downloads, span=span))
        self._out.append(_Out(step, batch, span, None))
        return Queued(step, span)

    def _send_back(self, channel: Channel, out: _Out) -> Queued:
        """At least one row, so that the first stage knows when the step has passed them all."""
        started = self.clock.mark()
        assert out.drawn is not None, "the last stage has sampled"
        nothing = torch.zeros(1, SCORES, dtype=torch.float64, device=self._context.device)
        channel.send(out.drawn.outcome if len(out.drawn.outcome) else nothing)
        if out.drawn.scores is not None:
            channel.send(out.drawn.scores)
        return Queued(out.step, Span(started, self.clock.mark()))

    def _take_back(self, channel: Channel, out: _Out) -> Queued:
        """To wait for them is no part of the operation."""
        batch, vocabulary = out.batch, self.model.config.vocab_size
        sampled, scored = len(batch.logprobs), len(batch.targets)
        width = outcome_width(batch.logprobs, vocabulary)
        outcome = channel.receive((max(sampled, 1), width), torch.float64)[:sampled]
        scores = channel.receive((scored, scores_width(vocabulary)), torch.float64) if scored else None
        started = self.clock.mark()
        # A slot may have a new owner by now. What is written here is the id that its next decode row reads, and steps
        # come back in order, so what an earlier owner still had on the way is overwritten before it is read.
        self._state.write(batch.slots, batch.positions, outcome[:, ID])
        drawn = Drawn(outcome, batch.logprobs, scores, batch.scored)
        own = Sampled(outcome, batch.slots, batch.positions)
        pending = PendingStep(out.step, self._of_all_lanes(drawn, batch), self._downloads, span=out.span, own=own)
        return Queued(out.step, Span(started, self.clock.mark()), pending)

    def _of_all_lanes(self, drawn: Drawn, batch: StepBatch) -> Drawn:
        return of_all_lanes(drawn, batch.lanes, self._context.data, self.model.config.vocab_size)
