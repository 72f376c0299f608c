"""The layers of the tiny model, for training: latent attention, gated MLPs, and experts with a balanced router.

What is computed is what transformers' deepseek_v3 and Echelon compute; how is simpler, for here whole sequences pass
and nothing is cached. Source: DeepSeek-V3 (2024), sections 2.1.1 and 2.1.2. It knows no loss and no file.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.tiny.shape import Shape

LATENT_EPSILON = 1e-6  # of the norms between projections, whatever rms_norm_eps says
_LEAST_SUM = 1e-20


class Norm(nn.Module):
    """RMSNorm, in float32."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> the same shape and dtype."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return self.weight * wide.to(x.dtype)


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class Attention(nn.Module):
    """Multi-head latent attention over whole sequences, causal."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape, heads = shape, shape.num_attention_heads
        self.q_a_proj = linear(shape.hidden_size, shape.q_lora_rank)
        self.q_a_layernorm = Norm(shape.q_lora_rank, LATENT_EPSILON)
        self.q_b_proj = linear(shape.q_lora_rank, heads * shape.head_dim)
        self.kv_a_proj_with_mqa = linear(shape.hidden_size, shape.kv_lora_rank + shape.qk_rope_head_dim)
        self.kv_a_layernorm = Norm(shape.kv_lora_rank, LATENT_EPSILON)
        self.kv_b_proj = linear(shape.kv_lora_rank, heads * (shape.qk_nope_head_dim + shape.v_head_dim))
        self.o_proj = linear(heads * shape.v_head_dim, shape.hidden_size)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        """x [B, T, hidden]; rotation: cosines and sines [2, T, qk_rope_head_dim / 2] -> [B, T, hidden]."""
        shape, (batch, length, _) = self.shape, x.shape
        parts = [shape.qk_nope_head_dim, shape.qk_rope_head_dim]
        query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).view(batch, length, -1, shape.head_dim)
        plain, turning = query.transpose(1, 2).split(parts, -1)
        compressed, key = self.kv_a_proj_with_mqa(x).split([shape.kv_lora_rank, shape.qk_rope_head_dim], -1)
        made = self.kv_b_proj(self.kv_a_layernorm(compressed)).view(batch, length, shape.num_attention_heads, -1)
        plain_key, value = made.transpose(1, 2).split([shape.qk_nope_head_dim, shape.v_head_dim], -1)
        rotated_key = rotated(key.unsqueeze(1), rotation).expand(-1, shape.num_attention_heads, -1, -1)
        queries = torch.cat((plain, rotated(turning, rotation)), -1)
        keys = torch.cat((plain_key, rotated_key), -1)
        # As wide as keys: the fused kernels want heads of one width.
        values = F.pad(value, (0, max(0, shape.head_dim - shape.v_head_dim)))
        read = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)[..., : shape.v_head_dim]
        out: Tensor = self.o_proj(read.transpose(1, 2).reshape(batch, length, -1))
        return out


def rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """Pairs of neighbours turned by their position's angles: [..., T, size] -> the same shape and dtype."""
    cosines, sines = rotation
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cosines - odd * sines, odd * cosines + even * sines), -1)
    return turned.flatten(-2).to(x.dtype)


def rotation_of(shape: Shape, length: int, device: torch.device) -> Tensor:
    """Cosines and sines of positions 0 to length - 1: [2, length, qk_rope_head_dim / 2] float32."""
    powers = torch.arange(0, shape.qk_rope_head_dim, 2, device=device).float() / shape.qk_rope_head_dim
    angles = torch.arange(length, device=device).float()[:, None] / shape.rope_theta**powers
    return torch.stack((angles.cos(), angles.sin()))


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden: int, neurons: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = linear(hidden, neurons), linear(hidden, neurons)
        self.down_proj = linear(neurons, hidden)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Mixture(nn.Module):
    """Experts, of which a token passes through its best and the shared one; the shared one is the last block.

    One MLP with the neurons of all of them: a token's share of an expert, 0 for most, multiplies that one's neurons.
    correction is added to scores for the choice alone; `balance` moves it, no gradient does. choices: how often each
    expert was chosen in the last forward, by expert.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.gate = nn.Parameter(torch.empty(shape.n_routed_experts, shape.hidden_size))
        self.correction: Tensor
        self.register_buffer("correction", torch.zeros(shape.n_routed_experts))
        self.experts = MLP(shape.hidden_size, (shape.n_routed_experts + 1) * shape.moe_intermediate_size)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, T, hidden] -> the same shape, and choices [experts] float32."""
        shares, choices = self.shares(x)
        inner = F.silu(self.experts.gate_proj(x)) * self.experts.up_proj(x)
        inner = inner.unflatten(-1, (self.shape.n_routed_experts + 1, -1)) * shares.unsqueeze(-1).to(inner.dtype)
        return self.experts.down_proj(inner.flatten(-2)), choices

    def shares(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, experts + 1] float32, the last ones 1, and choices."""
        with torch.autocast(x.device.type, enabled=False):
            scores = F.linear(x.float(), self.gate.float()).sigmoid()
        best = (scores + self.correction).topk(self.shape.num_experts_per_tok, -1)[1]
        chosen = torch.zeros_like(scores).scatter(-1, best, 1.0)
        shares = scores * chosen
        shares = shares / (shares.sum(-1, keepdim=True) + _LEAST_SUM)
        return torch.cat((shares, torch.ones_like(shares[..., :1])), -1), chosen.flatten(0, -2).sum(0)

    @torch.no_grad()
    def balance(self, choices: Tensor, rate: float) -> None:
        """Make experts that were chosen less than the mean likelier, and others less. DeepSeek-V3, section 2.1.2."""
        self.correction.add_(torch.sign(choices.mean() - choices), alpha=rate)
