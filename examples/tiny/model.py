"""The tiny model: decoder layers, and one more that predicts the token after the next; its losses and its logits.

Parameters are named as the layers here need them; `export.py` gives them their published names. Source: DeepSeek-V3
(2024), section 2.2 for the prediction, transformers' MtpModel for which hidden states it is given. It knows no file.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.tiny.layers import MLP, Attention, Mixture, Norm, linear, rotation_of
from examples.tiny.shape import Shape

INITIAL_DEVIATION = 0.02


class Losses(NamedTuple):
    """Mean cross-entropies in nats: of the next token, and of the one behind it. choices: [routed layers, experts]."""

    next: Tensor
    second: Tensor
    choices: Tensor


class Layer(nn.Module):
    """Attention and an MLP or experts, each behind a norm and beside a residual."""

    def __init__(self, shape: Shape, *, routed: bool) -> None:
        super().__init__()
        self.input_layernorm = Norm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = Norm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = Mixture(shape) if routed else MLP(shape.hidden_size, shape.intermediate_size)

    def forward(self, x: Tensor, rotation: Tensor) -> tuple[Tensor, list[Tensor]]:
        """x [B, T, hidden] -> the same shape, and the choices of its experts, if it has any."""
        x = x + self.self_attn(self.input_layernorm(x), rotation)
        inputs = self.post_attention_layernorm(x)
        if isinstance(self.mlp, Mixture):
            outputs, choices = self.mlp(inputs)
            return x + outputs, [choices]
        return x + self.mlp(inputs), []


class Prediction(nn.Module):
    """The layer for multi-token prediction: from hidden states and the next tokens' embeddings to hidden states that
    the model's own head reads."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.enorm = Norm(shape.hidden_size, shape.rms_norm_eps)
        self.hnorm = Norm(shape.hidden_size, shape.rms_norm_eps)
        self.eh_proj = linear(2 * shape.hidden_size, shape.hidden_size)
        self.layer = Layer(shape, routed=True)
        self.norm = Norm(shape.hidden_size, shape.rms_norm_eps)

    def forward(self, hidden: Tensor, embedded: Tensor, rotation: Tensor) -> tuple[Tensor, list[Tensor]]:
        """hidden [B, T, hidden] behind the model's last norm, embedded of the tokens behind them -> hidden states."""
        joined = self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(hidden)), -1))
        out, choices = self.layer(joined, rotation)
        return self.norm(out), choices


class TinyModel(nn.Module):
    """The head is the embedding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocab_size, shape.hidden_size)
        routed = [layer >= shape.first_k_dense_replace for layer in range(shape.layers)]
        self.layers = nn.ModuleList(Layer(shape, routed=each) for each in routed)
        self.norm = Norm(shape.hidden_size, shape.rms_norm_eps)
        self.prediction = Prediction(shape)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Noise, smaller where a projection ends in the residual stream; the same for the same seed."""
        random = torch.Generator().manual_seed(seed)
        narrow = INITIAL_DEVIATION / math.sqrt(2 * self.shape.layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                noise = torch.randn(parameter.shape, generator=random)
                parameter.copy_(noise * (narrow if into_residual else INITIAL_DEVIATION))

    @property
    def mixtures(self) -> list[Mixture]:
        """Every layer's experts, that of the prediction last."""
        return [module for module in self.modules() if isinstance(module, Mixture)]

    def forward(self, tokens: Tensor) -> Losses:
        """tokens [B, T + 2] int64: T predictions of the next token, and T of the one behind it."""
        inputs, following, second = tokens[:, :-2], tokens[:, 1:-1], tokens[:, 2:]
        rotation = rotation_of(self.shape, inputs.shape[1], tokens.device)
        hidden, choices = self.hidden(inputs, rotation)
        drafted, more = self.prediction(hidden, self.embedding(following), rotation)
        return Losses(
            F.cross_entropy(self.logits(hidden).flatten(0, 1).float(), following.flatten()),
            F.cross_entropy(self.logits(drafted).flatten(0, 1).float(), second.flatten()),
            torch.stack(choices + more),
        )

    def hidden(self, tokens: Tensor, rotation: Tensor) -> tuple[Tensor, list[Tensor]]:
        """tokens [B, T] -> hidden states behind the last norm [B, T, hidden], and choices by layer."""
        x: Tensor = self.embedding(tokens)
        choices: list[Tensor] = []
        for layer in self.layers:
            x, chosen = layer(x, rotation)
            choices += chosen
        return self.norm(x), choices

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden] -> [..., vocabulary]."""
        return F.linear(hidden, self.embedding.weight)

    def both_logits(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [B, T] -> of the next token [B, T, vocabulary], and of the one behind it [B, T - 1, vocabulary]."""
        rotation = rotation_of(self.shape, tokens.shape[1], tokens.device)
        hidden, _ = self.hidden(tokens, rotation)
        drafted, _ = self.prediction(hidden[:, :-1], self.embedding(tokens[:, 1:]), rotation[:, :-1])
        return self.logits(hidden), self.logits(drafted)
