"""Runs plans: state of the slots, one forward pass, sampling, and the ids back to the host.

One per rank, in the rank's runner thread. `launch` queues a step's work without waiting for the device, so a
caller may launch the next step before it takes the result of this one. Every rank samples its share of the rows
and gathers all ids, so ranks agree on what comes next. It must not know requests, sockets or the scheduler.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from echelon.internal.link import Logprob
from models.decoder import DecoderModel
from parallel.context import ParallelContext
from worker import sampler
from worker.batch import SlotState, StepBatch, apply_and_build
from worker.kv_cache import KVCache
from worker.plan import PlanTables, StepResult


@dataclass(frozen=True, slots=True)
class RunnerLimits:
    """max_running slots of at most max_context tokens, in blocks of block_tokens."""

    max_running: int
    max_context: int
    block_tokens: int


class PendingStep:
    """A step that was launched. outcome [sampled rows, 1 or more] float64: see `Runner`'s packing."""

    def __init__(self, step: int, logprobs: tuple[int | None, ...], outcome: Tensor) -> None:
        self._step = step
        self._logprobs = logprobs
        self._copied: torch.cuda.Event | None = None
        self._outcome = outcome
        if outcome.device.type == "cuda":
            self._outcome = torch.empty_like(outcome, device="cpu", pin_memory=True)
            self._outcome.copy_(outcome, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def result(self) -> StepResult:
        """Waits for the device to reach the end of the step."""
        if self._copied is not None:
            self._copied.synchronize()
        rows = self._outcome.tolist()
        return StepResult(
            step=self._step,
            ids=tuple(int(row[0]) for row in rows),
            logprobs=tuple(_unpack(row, wanted) for row, wanted in zip(rows, self._logprobs, strict=True)),
        )


class Runner:
    """Applies plans in order to one model and its cache.

    A step's outcome is one float64 tensor, so that one gather and one copy to the host carry it: a row holds its id
    (exact below 2^53) and, if any row of the step asked for log-probabilities, its own, the likeliest ids and theirs.
    """

    def __init__(self, model: DecoderModel, kv_cache: KVCache, context: ParallelContext, limits: RunnerLimits) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._context = context
        self._block_tokens = limits.block_tokens
        blocks_per_slot = -(-limits.max_context // limits.block_tokens)
        self._state = SlotState(limits.max_running, blocks_per_slot, context.device)

    def run(self, tables: PlanTables) -> StepResult:
        """Launch a plan and wait for it. Every rank returns the same."""
        return self.launch(tables).result()

    @torch.inference_mode()
    def launch(self, tables: PlanTables) -> PendingStep:
        """Queue a plan's work on the device."""
        assert tables.fence.epoch == self._context.epoch, "a plan of another epoch"
        tensor = self._context.tensor
        batch = apply_and_build(tables, self._state, self._block_tokens, tensor.rank, tensor.size)
        if not len(tables.rows):
            return PendingStep(tables.step, (), torch.empty(0, 1))
        hidden = self._model(batch.forward, self._kv_cache)
        if not batch.logprobs:
            return PendingStep(tables.step, (), torch.empty(0, 1))
        outcome = self._sample(self._model.row_logits(hidden), batch)
        self._state.last_ids[batch.slots] = outcome[:, 0].long()
        return PendingStep(tables.step, batch.logprobs, outcome)

    def _sample(self, logits: Tensor, batch: StepBatch) -> Tensor:
        """This rank's rows sampled, all ranks' rows gathered: [S, width]."""
        share = batch.share
        logits = logits[: share.size]
        ids = sampler.sample(logits, batch.sampling, batch.paths)
        top = sampler.logprobs_width(logits.shape[-1])
        width = 1 if all(wanted is None for wanted in batch.logprobs) else 2 + 2 * top
        outcome = torch.zeros(share.padded // self._context.tensor.size, width, dtype=torch.float64, device=ids.device)
        outcome[: share.size, 0] = ids
        if len(batch.logprob_rows):
            own, top_ids, top_logprobs = sampler.logprobs(logits, ids, batch.logprob_rows)
            parts = (own[:, None].double(), top_ids.double(), top_logprobs.double())
            outcome[batch.logprob_rows, 1:] = torch.cat(parts, dim=1)
        return self._context.tensor.all_gather(outcome, dim=0)[: len(batch.logprobs)]


def _unpack(row: list[float], wanted: int | None) -> Logprob | None:
    """A row of the outcome as asked: the `wanted` likeliest, the lower id first among equals."""
    if wanted is None:
        return None
    top = (len(row) - 2) // 2
    pairs = sorted(zip(row[2 : 2 + top], row[2 + top :], strict=True), key=lambda pair: (-pair[1], pair[0]))[:wanted]
    return Logprob(row[1], tuple(int(token) for token, _ in pairs), tuple(value for _, value in pairs))
