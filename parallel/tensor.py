"""Tensor-parallel layers: each rank multiplies by its share of a matrix, and a collective makes the result whole.

In rank processes. Column layers split the output and need no collective, row layers split the input and sum; the
vocabulary is split by rows in the embedding and in the head. They know weights and a group, no model and no name.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from parallel.comm import Group
from parallel.float8 import Matrix
from parallel.largest import largest, winners
from parallel.linear import linear


@dataclass(frozen=True, slots=True)
class ColumnLinear:
    """This rank's output features of x W^T + b. weight: [features held, inputs], often several matrices stacked."""

    weight: Matrix
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class RowLinear:
    """The sum over ranks of x W^T, plus b once. weight: [outputs, inputs held]; x holds this rank's inputs."""

    weight: Matrix
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
    """Logits: each rank computes those of its part of the vocabulary, of all rows. weight: [rows held, hidden]; padded
    rows lie at the very end. What is done to logits between `part` and the others must treat each by itself.
    """

    weight: Tensor
    vocabulary: int
    group: Group

    def part(self, hidden: Tensor) -> Tensor:
        """hidden [S, hidden] -> [S, rows held]: every row, this rank's part of the vocabulary."""
        return linear(hidden, self.weight)

    def dealt(self, part: Tensor) -> Tensor:
        """part [S, rows held] of every rank -> [k, vocabulary], k = ceil(S / size): rows rank * k .. of all, whole;
        behind the last of all come zeros."""
        size = self.group.size
        rows = -(-part.shape[0] // size)
        if surplus := rows * size - part.shape[0]:
            part = F.pad(part, (0, 0, 0, surplus))
        parts = self.group.all_to_all(part.view(size, rows, -1))
        return parts.transpose(0, 1).flatten(1)[:, : self.vocabulary]

    def greedy(self, part: Tensor) -> Tensor:
        """part [S, rows held] of every rank -> [S] float64 on every rank: the id of each row's largest logit, the
        lowest among equals; NOT_FINITE for a row that has one that is not finite."""
        first_id = self.group.rank * self.weight.shape[0]
        found = largest(part, first_id, self.vocabulary - first_id)
        return winners(self.group.all_gather(found), self.group.size)
