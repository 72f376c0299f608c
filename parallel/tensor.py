"""Tensor-parallel layers: each rank multiplies by its share of a matrix, and a collective makes the result whole.

In rank processes. Column layers split the output and need no collective, row layers split the input and sum; the
vocabulary is split by rows in the embedding and in the head. They know weights and a group, no model and no name.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from parallel.comm import Group
from parallel.linear import linear


@dataclass(frozen=True, slots=True)
class ColumnLinear:
    """This rank's output features of x W^T + b. weight: [features held, inputs], often several matrices stacked."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class RowLinear:
    """The sum over ranks of x W^T, plus b once. weight: [outputs, inputs held]; x holds this rank's inputs."""

    weight: Tensor
    bias: Tensor | None
    group: Group

    def __call__(self, x: Tensor) -> Tensor:
        total = self.group.all_reduce(linear(x, self.weight))
        return total if self.bias is None else total + self.bias


@dataclass(frozen=True, slots=True)
class VocabularyEmbedding:
    """Looks ids up where their rows are held. weight: [rows held, hidden]."""

    weight: Tensor
    group: Group

    def __call__(self, ids: Tensor) -> Tensor:
        rows = self.weight.shape[0]
        local = ids - self.group.rank * rows
        elsewhere = (local < 0) | (local >= rows)
        found = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return self.group.all_reduce(found.masked_fill(elsewhere.unsqueeze(-1), 0))


@dataclass(frozen=True, slots=True)
class VocabularyHead:
    """Logits of whole rows, dealt out to the ranks. weight: [rows held, hidden]; padded rows lie at the very end."""

    weight: Tensor
    vocabulary: int
    group: Group

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden [S, hidden] -> [k, vocabulary], k = ceil(S / size): rows rank * k .. of hidden, padded with zeros."""
        size = self.group.size
        rows = -(-hidden.shape[0] // size)
        padded = F.pad(hidden, (0, 0, 0, rows * size - hidden.shape[0]))
        mine = linear(padded, self.weight).view(size, rows, -1)  # every row, this rank's part of the vocabulary
        parts = self.group.all_to_all(mine)  # this rank's rows, every part of the vocabulary
        return parts.transpose(0, 1).flatten(1)[:, : self.vocabulary]
