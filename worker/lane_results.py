"""The results of all data ranks, brought together for the leader, which is a rank of the first of them.

In every rank of a stage that ends steps. A data rank samples its own rows; what the others draw has the shapes that a
plan tells of its lanes. It knows no model and no request.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from parallel.comm import Group
from worker.pending import Drawn, outcome_width, scores_width
from worker.plan import NO_LOGPROBS, Lane


def of_all_lanes(own: Drawn, lanes: Sequence[Lane], data: Group, vocabulary: int) -> Drawn:
    """What all data ranks have drawn in a step, one behind the other; own is this rank's.

    1. Every rank pads its rows to those of the rank with the most, and to the width of the widest.
    2. One all-gather of ids and log-probabilities, and one of scores if any rank has some.
    3. The padding is cut out.
    """
    if not lanes:
        return own
    wanted = [tuple(None if count == NO_LOGPROBS else count for count in lane.wanted) for lane in lanes]
    device = own.outcome.device
    logprobs = tuple(count for of_lane in wanted for count in of_lane)
    outcome = _joined(own.outcome, list(map(len, wanted)), outcome_width(logprobs, vocabulary), data, device)
    counts = [sum(count for count, _ in lane.scored) for lane in lanes]
    scores = _joined(own.scores, counts, scores_width(vocabulary), data, device) if any(counts) else None
    return Drawn(outcome, logprobs, scores, tuple(scored for lane in lanes for scored in lane.scored))


def _joined(own: Tensor | None, rows: Sequence[int], width: int, data: Group, device: torch.device) -> Tensor:
    """rows: of each rank. Returns [sum of rows, width]."""
    padded = torch.zeros(max(*rows, 1), width, dtype=torch.float64, device=device)
    if own is not None:
        padded[: len(own), : own.shape[1]] = own
    parts = data.all_gather(padded).split(len(padded))
    return torch.cat([part[:count] for part, count in zip(parts, rows, strict=True)])
