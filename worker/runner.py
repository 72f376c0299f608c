"""Runs plans: state of the slots, one forward pass, sampling, and the ids back to the host.

One per rank, in the rank's runner thread. `launch` queues a step's work without waiting for the device, so a
caller may launch the next step before it takes the result of this one. Every rank samples its share of the rows
and gathers all ids, so ranks agree on what comes next. It must not know requests, sockets or the scheduler.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.decoder import DecoderModel
from parallel.context import ParallelContext
from worker import sampler
from worker.batch import Share, StepBatch, apply_and_build
from worker.kv_cache import KVCache
from worker.logit_rules import Allowed
from worker.matchers import Masks, Matchers
from worker.pending import PendingStep, pack
from worker.plan import NO_ID, PlanTables, StepResult
from worker.sampler import RuledRows
from worker.slots import SlotState
from worker.upload import upload_one


@dataclass(frozen=True, slots=True)
class RunnerLimits:
    """max_running slots of at most max_context tokens, in blocks of block_tokens."""

    max_running: int
    max_context: int
    block_tokens: int


class Runner:
    """Applies plans in order to one model and its cache."""

    def __init__(
        self,
        model: DecoderModel,
        kv_cache: KVCache,
        context: ParallelContext,
        limits: RunnerLimits,
        matchers: Matchers,
    ) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._context = context
        self._matchers = matchers
        self._piece_rows = sampler.piece_rows(model.config.vocab_size)
        self._state = SlotState(limits.max_running, limits.max_context, limits.block_tokens, context.device)

    def run(self, tables: PlanTables) -> StepResult:
        """Launch a plan and wait for it. Every rank returns the same."""
        return self.launch(tables).result()

    @torch.inference_mode()
    def launch(self, tables: PlanTables) -> PendingStep:
        """Queue a plan's work on the device. Of a constrained row, the id before must have been on its way."""
        assert tables.fence.epoch == self._context.epoch, "a plan of another epoch"
        tensor = self._context.tensor
        batch = apply_and_build(tables, self._state, tensor.rank, tensor.size, self._piece_rows)
        following = self._matchers.begin(tables, [row.slot for part in batch.ruled for row in part.constrained])
        sampled, scored = len(batch.logprobs), len(batch.targets)
        hidden = self._model(batch.forward, self._kv_cache) if len(tables.rows) else torch.empty(0, 0)
        masks = None if following is None else following.result()
        outcome, scores = torch.empty(0, 1), None
        if sampled:
            outcome = self._sample(hidden[:sampled], batch, masks)
            self._state.write(batch.slots, batch.positions, outcome[:, 0])
        if scored:
            scores = self._score(hidden[sampled:], batch.targets)
        constraints = self._matchers.of(batch.sampled_slots.tolist())
        pending = PendingStep(tables.step, outcome, batch.logprobs, scores, batch.scored, constraints)
        for row, constraint in constraints.items():
            constraint.drawn = (pending, row)
        return pending

    def _sample(self, hidden: Tensor, batch: StepBatch, masks: Masks | None) -> Tensor:
        """This rank's rows sampled, all ranks' rows gathered: [S, width]."""
        share = batch.share
        logits = self._model.row_logits(hidden)[: share.size]
        ids = sampler.sample(logits, batch.sampling, batch.paths, _masked(batch.ruled, masks, logits.device))
        top = sampler.logprobs_width(logits.shape[-1])
        width = 1 if all(wanted is None for wanted in batch.logprobs) else 2 + 2 * top
        outcome = torch.zeros(share.padded // self._context.tensor.size, width, dtype=torch.float64, device=ids.device)
        outcome[: share.size, 0] = ids
        if len(batch.logprob_rows):
            outcome[batch.logprob_rows, 1:] = pack(*sampler.logprobs(logits, ids, batch.logprob_rows))
        if masks is not None and masks.failed:
            constrained = [row.row for part in batch.ruled for row in part.constrained]
            failed = np.array([constrained[row] for row in masks.failed])
            outcome[upload_one(failed, outcome.device), 0] = NO_ID
        return self._context.tensor.all_gather(outcome, dim=0)[: len(batch.logprobs)]

    def _score(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Log-probabilities of the tokens that follow these, packed, in pieces that bound the logits: [C, width]."""
        group = self._context.tensor
        pieces, together = [], self._piece_rows * group.size
        for piece, wanted in zip(hidden.split(together), targets.split(together), strict=True):
            share = Share.of(len(wanted), group.rank, group.size)
            logits = self._model.row_logits(piece)[: share.size]
            rows = torch.arange(share.size, device=logits.device)
            packed = pack(*sampler.logprobs(logits, wanted[share.rows], rows))
            padded = F.pad(packed, (0, 0, 0, share.padded // group.size - share.size))
            pieces.append(group.all_gather(padded, dim=0)[: len(wanted)])
        return torch.cat(pieces)


def _masked(ruled: Sequence[RuledRows], masks: Masks | None, device: torch.device) -> Sequence[RuledRows]:
    """The rows, and what their constraints allow as the first rule; each constrained row has a mask, in order."""
    if masks is None or not len(masks.bits):
        return ruled
    bits = upload_one(masks.bits, device)
    parts, taken = [], 0
    for part in ruled:
        if part.constrained:
            places = upload_one(np.array([row.place for row in part.constrained]), device)
            allowed = Allowed(places, bits[taken : taken + len(places)])
            part = replace(part, rules=(allowed, *part.rules))
            taken += len(places)
        parts.append(part)
    return parts
