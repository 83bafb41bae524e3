"""The one transformer: pre-norm, RMSNorm, rotary positions, gated feed-forward, no biases.

It maps embeddings to hidden states and knows nothing of tokens, stages, files or Accelerate.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import ModelConfig
from model.attend import Attend, Segments
from model.backends import AttentionChoice
from model.fused import (
    EPS,
    PLAIN,
    Kernels,
    fork,
    linear,
    make_kernels,
    rotate_heads,
    swiglu_linear,
)
from model.kv_cache import KVCache


def rotary_frequencies(head_dim: int, base: float, device: torch.device) -> Tensor:
    """Radians per position of each pair: [D/2]."""
    return base ** -(torch.arange(0, head_dim, 2, device=device).float() / head_dim)


def rotary_angles(positions: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """positions [B,T] -> cos, sin [B,T,1,D/2] of the rotary embedding (Su et al. 2021)."""
    frequencies = rotary_frequencies(head_dim, base, positions.device)
    angles = positions[:, :, None, None].float() * frequencies  # [B,T,1,D/2]
    return angles.cos(), angles.sin()


class HeadNorm(nn.Module):
    """RMSNorm with gains on each query and each key (Henry et al. 2020); values pass."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.num_kv = config.num_kv_heads
        self.q_gain = nn.Parameter(torch.ones(config.head_dim))
        self.k_gain = nn.Parameter(torch.ones(config.head_dim))

    def forward(self, qkv: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """qkv [B,T,H+2G,D] and its factor scale [B,T,1] -> the same two; computed in fp32."""
        sizes = [qkv.shape[2] - 2 * self.num_kv, self.num_kv, self.num_kv]
        q, k, v = (qkv.float() * scale[..., None]).split(sizes, dim=2)
        pairs = ((q, self.q_gain), (k, self.k_gain))  # gains are in bf16 where they are sharded
        q, k = (F.rms_norm(x, gain.shape, gain.float()) for x, gain in pairs)
        return torch.cat([q, k, v], dim=2).type_as(qkv), torch.ones_like(scale)


class Attention(nn.Module):
    """Projections and rotary positions around `Attend`."""

    def __init__(self, config: ModelConfig, attend: Attend, layer: int):
        super().__init__()
        self.layer, self.head_dim, self.num_kv = layer, config.head_dim, config.num_kv_heads
        inner, shared = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.to_qkv = nn.Linear(config.dim, inner + 2 * shared, bias=False)
        self.to_out = nn.Linear(inner, config.dim, bias=False)
        self.norm = HeadNorm(config) if config.qk_norm else None
        self.attend = attend

    def forward(
        self,
        onto: Tensor | None,
        x: Tensor,
        scale: Tensor,
        angles: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        kv_cache: KVCache | None = None,
        segments: Segments | None = None,
        kernels: Kernels = PLAIN,
    ) -> Tensor:
        """x scale normalised [b,t,dim] -> what it adds to `onto`, added to it if there."""
        qkv = linear(x, self.to_qkv.weight).unflatten(-1, (-1, self.head_dim))  # [b,t,h+2g,d]
        if self.norm is not None:
            qkv, scale = self.norm(qkv, scale)
        q, k, v = rotate_heads(qkv, scale, angles, self.num_kv, kernels)
        # views: nothing is copied to another order of axes, here or on the way back
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [b,h|g,t,d]
        if kv_cache is not None:
            k, v = kv_cache.update(self.layer, k, v)  # [b,g,t,d] -> [b,g,j,d]
        out = self.attend(q, k, v, mask, segments=segments)
        # [b,h,t,d] -> [b,t,(h d)]
        return linear(out.transpose(1, 2).flatten(2), self.to_out.weight, onto)


class FeedForward(nn.Module):
    """Gated feed-forward, SwiGLU (Shazeer 2020)."""

    def __init__(self, dim: int, ff_dim: int):
        super().__init__()
        self.to_gate_value = nn.Linear(dim, 2 * ff_dim, bias=False)
        self.to_out = nn.Linear(ff_dim, dim, bias=False)

    def forward(
        self, onto: Tensor | None, x: Tensor, scale: Tensor, kernels: Kernels = PLAIN
    ) -> Tensor:
        """As `Attention.forward`."""
        gate_value = linear(x, self.to_gate_value.weight)  # [b,t,2f]
        return swiglu_linear(gate_value, scale, self.to_out.weight, onto, kernels)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, attend: Attend, layer: int):
        super().__init__()
        ff_dim = config.ff_dim or 64 * math.ceil(config.dim * 8 / 3 / 64)
        self.attention = Attention(config, attend, layer)
        self.feed_forward = FeedForward(config.dim, ff_dim)
        self.dropout = config.dropout
        self.kernels = PLAIN

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], *context: Any) -> Tensor:
        """The residual stream [B,T,dim] -> the same.

        context: mask, kv_cache and segments of `Transformer.forward`.
        """
        x = self.add(x, self.attention, angles, *context)
        return self.add(x, self.feed_forward)

    def add(self, x: Tensor, branch: nn.Module, *context: Any) -> Tensor:
        """x + branch(x normalised): by the branch's last product, if nothing is dropped."""
        copy, x, scale = fork(x, self.kernels)
        if self.dropout and self.training:
            added = branch(None, x, scale, *context, kernels=self.kernels)
            return copy + F.dropout(added, self.dropout)
        return branch(copy, x, scale, *context, kernels=self.kernels)


class Transformer(nn.Module):
    """A stack of causal blocks and a final norm.

    | parameter              | initialised from                      |
    |------------------------|---------------------------------------|
    | to_qkv, to_gate_value  | normal(0, 0.02)                       |
    | to_out (both)          | normal(0, 0.02 / sqrt(2 num_layers))  |
    | gains of qk_norm       | 1                                     |

    The scaled `to_out` keeps the variance of the residual stream near that of its input at any
    depth (GPT-2).
    """

    def __init__(self, config: ModelConfig, attention: AttentionChoice | None = None):
        super().__init__()
        if config.num_heads % config.num_kv_heads:
            raise ValueError(
                f"model.num_heads={config.num_heads} is not a multiple of "
                f"model.num_kv_heads={config.num_kv_heads}"
            )
        if config.head_dim % 2:
            raise ValueError(f"model.head_dim={config.head_dim}: rotary positions need it even")
        self.config, self.attention = config, attention
        fused = attention is None or attention.backends != ("einsum",)
        attend = Attend(config.dropout, causal=True, flash=fused, choice=attention)
        self.blocks = nn.ModuleList(Block(config, attend, n) for n in range(config.num_layers))
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                depth = 2 * config.num_layers if name.endswith("to_out") else 1
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(depth))

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        mask: Tensor | None = None,
        kv_cache: KVCache | None = None,
        segments: Segments | None = None,
    ) -> Tensor:
        """x [B,T,dim], positions [B|1,T] -> hidden [B,T,dim].

        mask [B,J], True = a real token, over cached and new tokens alike; None = all are real.
        segments: B is 1, and the row holds several clips.
        Under autocast the residual stream is of its dtype too: in fp32 it moves twice the bytes.
        """
        x = x.to(self.dtype)
        angles = rotary_angles(positions, self.config.head_dim, self.config.rotary_base)
        for block in self.blocks:
            x = block(x, angles, mask, kv_cache, segments)
        if kv_cache is not None:
            kv_cache.advance(x.shape[1])
        return F.rms_norm(x, x.shape[-1:], eps=EPS)

    def use_kernels(self, name: str) -> None:
        """What `choose_kernels` chose, in every block."""
        kernels = make_kernels(name)
        for block in self.blocks:
            block.kernels = kernels

    def make_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache on this model's device, in its dtype."""
        c, device = self.config, self.blocks[0].attention.to_out.weight.device
        return KVCache(
            c.num_layers, batch_size, c.num_kv_heads, max_length, c.head_dim, device, self.dtype
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the residual stream: autocast's where it is active, else the weights'."""
        weight = self.blocks[0].attention.to_out.weight
        kind = weight.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype

    def flops_per_token(self, sequence_length: float) -> float:
        """Training FLOPs per token: 6 x parameters + 6 x layers x inner width x sequence.

        Two for each multiply-add, three passes (forward, and backward twice); attention's term
        counts a causal mask's half. Embeddings and heads are not counted.
        """
        num_parameters = sum(p.numel() for p in self.parameters())
        inner = self.config.num_heads * self.config.head_dim
        return 6 * num_parameters + 6 * self.config.num_layers * inner * sequence_length
