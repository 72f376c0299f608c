"""What a model predicts behind the ids that a step has drawn, as drafts for the next one.

In the runner of each rank of the last stage, where speculation is by `mtp`. Every rank samples its share of the rows,
as it does for the ids themselves. It must not know requests, or what becomes of a draft.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from models.decoder import DecoderModel
from parallel.context import ParallelContext
from worker import sampler
from worker.batch import StepBatch


def draw_drafts(model: DecoderModel, context: ParallelContext, predicted: Tensor, batch: StepBatch) -> Tensor:
    """What may be drawn behind the sampled rows' ids, on the noise that will be there, though without rules: [S].

    predicted [S + C, hidden], as DecoderModel.predict makes it. Every rank of the tensor group must call it.
    """
    share, sampled = batch.share, len(batch.logprobs)
    if not sampled:
        return predicted.new_empty(0)
    logits = model.row_logits(predicted[:sampled])[: share.size]
    later = replace(batch.sampling, position=batch.sampling.position + 1)
    unruled = [replace(part, rules=()) for part in batch.ruled]
    drafts = torch.zeros(share.padded // context.tensor.size, dtype=torch.float64, device=logits.device)
    drafts[: share.size] = sampler.sample(logits, later, batch.paths, unruled)
    return context.tensor.all_gather(drafts, dim=0)[:sampled]
