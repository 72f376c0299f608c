"""Multi-token prediction: one more layer that guesses the id behind the next, from the model's hidden states.

In rank processes, on the last stage, where it is asked for. Source: DeepSeek-V3 (2024), section 2.2, of which it is the
first depth. Embedding and head are the model's own. It knows the batch that the model was computed on, and no request.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.config import ModelConfig
from models.layers import Attend, RMSNorm, Rotation, Weights
from models.tables import PREDICTION_INPUT, PREDICTION_NORMS, tensor_name
from parallel.expert import ExpertStep
from parallel.tensor import ColumnLinear, VocabularyEmbedding

Layer = Callable[[Tensor, Rotation, Attend, ExpertStep], Tensor]


@dataclass(frozen=True, slots=True)
class Prediction:
    """layer(project(norm(embedding of the next id), norm(hidden state))), and the norm before the head."""

    embedding: VocabularyEmbedding
    embedding_norm: RMSNorm
    hidden_norm: RMSNorm
    project: ColumnLinear
    layer: Layer
    norm: RMSNorm

    def __call__(
        self, next_ids: Tensor, hidden: Tensor, rotation: Rotation, attend: Attend, step: ExpertStep
    ) -> Tensor:
        """next_ids [T] of the tokens behind the batch's; hidden [T, hidden], behind the model's last norm, as
        vLLM has it -> [T, hidden], before this one's."""
        embedded = self.embedding_norm(self.embedding(next_ids))
        joined = torch.cat((embedded, self.hidden_norm(hidden)), dim=-1)
        return self.layer(self.project(joined), rotation, attend, step)


def build_prediction(config: ModelConfig, weights: Weights, embedding: VocabularyEmbedding, layer: Layer) -> Prediction:
    """Around its decoder layer, which stands behind the others in the checkpoint."""

    def take(part: str) -> Tensor:
        return weights.take(tensor_name(config, part, config.num_hidden_layers))

    embedding_norm, hidden_norm, norm = (
        RMSNorm(take(part), config.rms_norm_eps, config.family.norms_from_one) for part in PREDICTION_NORMS
    )
    return Prediction(embedding, embedding_norm, hidden_norm, ColumnLinear(take(PREDICTION_INPUT)), layer, norm)
