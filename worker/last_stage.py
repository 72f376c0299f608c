"""What the last stage does behind its layers: ids of the sampled rows, drafts behind them, and scores of prompts.

In each of its ranks' runner threads; everything is queued on the device and nothing waited for. Every rank samples its
share of the rows and gathers all ids, so that ranks agree on what comes next; of rows that are all greedy each finds
the best of its part of the vocabulary. It knows no plan and no other stage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.batch import ForwardBatch
from models.decoder import DecoderModel
from parallel.context import ParallelContext
from worker import sampler
from worker.batch import Share, StepBatch
from worker.kv_cache import KVCache
from worker.logit_rules import Allowed
from worker.matchers import Masks
from worker.pending import DRAFT, ID, NO_DRAFT, SCORES, Drawn, nothing_drawn, outcome_width, pack
from worker.plan import NO_ID, NON_FINITE
from worker.sampler import RuledRows
from worker.slots import SlotState
from worker.upload import upload_one


class LastStage:
    """Draws over one stage's model, cache and slots."""

    def __init__(self, model: DecoderModel, kv_cache: KVCache, state: SlotState, context: ParallelContext) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._state = state
        self._context = context
        self.piece_rows = sampler.piece_rows(model.config.vocab_size)

    def draw(self, hidden: Tensor | None, batch: StepBatch, masks: Masks | None) -> Drawn:
        """Ids of the sampled rows, which go into the history too, and scores. hidden [T, hidden], of the last layer."""
        drawn, scores = nothing_drawn(self._context.device).outcome, None
        sampled, scored = len(batch.logprobs), len(batch.targets)
        assert isinstance(batch.forward, ForwardBatch), "a graph ends with its logits"
        rows = hidden if hidden is None else self._model.sampled(batch.forward, hidden)
        if rows is not None and sampled:
            drawn = self._sample(self._model.part_logits(rows[:sampled]), batch, masks)
        if rows is not None and scored:
            scores = self._score(rows[sampled:], batch.targets)
        if hidden is not None and self._model.prediction is not None:
            next_ids = self._state.history[batch.token_slots, batch.forward.positions + 1].long()
            normalized = self._model.normalized(hidden)
            predicted = self._model.predict(batch.forward, self._kv_cache, normalized, next_ids)
            drawn[:, DRAFT] = self._drafts(predicted, batch)
        return Drawn(drawn, batch.logprobs, scores, batch.scored)

    def draw_ended(
        self, part: Tensor, greedy: Tensor, batch: StepBatch, masks: Masks | None, predict: Callable[[], Tensor]
    ) -> Drawn:
        """Of rows that a graph has computed, all of them sampled: part [S, rows held] of their logits, which it has
        left, and greedy [S, 2], their outcome if all are greedy, as its history has them already. predict: what the
        model predicts behind the ids that were drawn, [S, hidden]."""
        outcome = greedy.clone() if batch.greedy else self._sample(part, batch, masks)
        if self._model.prediction is not None:
            outcome[:, DRAFT] = self._drafts(predict(), batch)
        return Drawn(outcome, batch.logprobs)

    def greedy(self, part: Tensor) -> Tensor:
        """part [S, rows held] -> [S, 2], an outcome without scores: of every row the likeliest id."""
        assert self._model.head is not None, "the last stage has the head"
        outcome = torch.full((len(part), SCORES), NO_DRAFT, dtype=torch.float64, device=part.device)
        outcome[:, ID] = self._model.head.greedy(part)
        return outcome

    def _drafts(self, predicted: Tensor, batch: StepBatch) -> Tensor:
        """What may be drawn behind the sampled rows' ids, on the noise that will be there, though without rules: [S].

        predicted [S + C, hidden], as the model makes it; every rank of the stage takes part in that, with rows or not.
        """
        share, sampled = batch.share, len(batch.logprobs)
        if not sampled:
            return predicted.new_empty(0)
        logits = self._model.row_logits(predicted[:sampled])[: share.size]
        later = replace(batch.sampling, position=batch.sampling.position + 1)
        unruled = [replace(part, rules=()) for part in batch.ruled]
        drafts = torch.zeros(share.padded // self._context.tensor.size, dtype=torch.float64, device=logits.device)
        drafts[: share.size] = sampler.sample(logits, later, batch.paths, unruled).ids
        return self._context.tensor.all_gather(drafts)[:sampled]

    def _sample(self, part: Tensor, batch: StepBatch, masks: Masks | None) -> Tensor:
        """part [S, rows held]: this rank's part of the logits of all rows. Of every row what is drawn: [S, width]."""
        assert self._model.head is not None, "the last stage has the head"
        outcome = self.greedy(part) if batch.greedy else self._sample_share(self._model.head.dealt(part), batch, masks)
        self._state.write(batch.slots, batch.positions, outcome[:, ID])
        return outcome

    def _sample_share(self, logits: Tensor, batch: StepBatch, masks: Masks | None) -> Tensor:
        """This rank's rows sampled, all ranks' rows gathered: [S, width]. logits [share and more, vocabulary]."""
        share = batch.share
        logits = logits[: share.size]
        ids, finite = sampler.sample(logits, batch.sampling, batch.paths, _masked(batch.ruled, masks, logits.device))
        width = outcome_width(batch.logprobs, logits.shape[-1])
        outcome = torch.zeros(share.padded // self._context.tensor.size, width, dtype=torch.float64, device=ids.device)
        outcome[:, DRAFT] = NO_DRAFT
        outcome[: share.size, ID] = ids
        if len(batch.logprob_rows):
            outcome[batch.logprob_rows, SCORES:] = pack(*sampler.logprobs(logits, ids, batch.logprob_rows))
        outcome[: share.size, ID].masked_fill_(~finite, NON_FINITE)
        if masks is not None and masks.failed:
            constrained = [row.row for part in batch.ruled for row in part.constrained]
            failed = np.array([constrained[row] for row in masks.failed])
            outcome[upload_one(failed, outcome.device), ID] = NO_ID
        return self._context.tensor.all_gather(outcome)[: len(batch.logprobs)]

    def _score(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Log-probabilities of the tokens that follow these, packed, in pieces that bound the logits: [C, width]."""
        group = self._context.tensor
        pieces, together = [], self.piece_rows * group.size
        for piece, wanted in zip(hidden.split(together), targets.split(together), strict=True):
            share = Share.of(len(wanted), group.rank, group.size)
            logits = self._model.row_logits(piece)[: share.size]
            rows = torch.arange(share.size, device=logits.device)
            packed = pack(*sampler.logprobs(logits, wanted[share.rows], rows))
            padded = F.pad(packed, (0, 0, 0, share.padded // group.size - share.size))
            pieces.append(group.all_gather(padded)[: len(wanted)])
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
