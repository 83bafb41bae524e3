"""The one transformer: pre-norm, RMSNorm, rotary positions, gated feed-forward, no biases.

It maps embeddings to hidden states and knows nothing of tokens, stages, files or Accelerate.
"""

import math
import os
import shutil
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from configs.schema import ModelConfig
from model.attend import Attend, AttentionChoice, Segments
from model.kv_cache import KVCache


def choose_compile(wanted: bool, device_type: str) -> tuple[bool, str]:
    """Whether to compile the blocks, and why. ValueError: asked for, but what it takes is not
    installed."""
    if not wanted:
        return False, "as configured; a long run on a GPU gains by train.compile=true"
    if device_type == "cuda":
        lacks = None if find_spec("triton") else "triton"
    else:
        lacks = None if shutil.which(os.environ.get("CXX") or "g++") else "a C++ compiler"
    if lacks:
        raise ValueError(f"train.compile=true needs {lacks}; install it or set train.compile=false")
    return True, "as configured"


def rotary_angles(positions: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """positions [B,T] -> cos, sin [B,T,1,D/2] of the rotary embedding (Su et al. 2021)."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    angles = positions[:, :, None, None].float() * base**-exponents  # [B,T,1,D/2]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pairs (x[..., d], x[..., d + D/2]) of q or k [B,T,H,D] by their angles."""
    cos, sin = angles
    a, b = x.float().chunk(2, dim=-1)  # each [B,T,H,D/2]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).type_as(x)


class RMSNorm(nn.RMSNorm):
    """Computed in fp32, returned in the dtype of x."""

    def forward(self, x: Tensor) -> Tensor:
        gains = self.weight.float()  # gathered in bf16 where they are sharded
        return F.rms_norm(x.float(), self.normalized_shape, gains, self.eps).type_as(x)


class Attention(nn.Module):
    """Projections and rotary positions around `Attend`."""

    def __init__(self, config: ModelConfig, attend: Attend, layer: int):
        super().__init__()
        self.layer, self.num_heads, self.head_dim = layer, config.num_heads, config.head_dim
        inner, shared = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.to_q = nn.Linear(config.dim, inner, bias=False)
        self.to_kv = nn.Linear(config.dim, 2 * shared, bias=False)
        self.to_out = nn.Linear(inner, config.dim, bias=False)
        self.q_norm = RMSNorm(config.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim) if config.qk_norm else nn.Identity()
        self.attend = attend

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        kv_cache: KVCache | None = None,
        segments: Segments | None = None,
    ) -> Tensor:
        q = rearrange(self.to_q(x), "b t (h d) -> b t h d", d=self.head_dim)
        k, v = rearrange(self.to_kv(x), "b t (s g d) -> s b t g d", s=2, d=self.head_dim)
        q, k = rotate(self.q_norm(q), angles), rotate(self.k_norm(k), angles)
        # views: nothing is copied to another order of axes, here or on the way back
        q, k, v = (rearrange(x, "b t h d -> b h t d") for x in (q, k, v))
        if kv_cache is not None:
            k, v = kv_cache.update(self.layer, k, v)  # [b,g,t,d] -> [b,g,j,d]
        out = self.attend(q, k, v, mask, segments=segments)
        return self.to_out(rearrange(out, "b h t d -> b t (h d)"))


class FeedForward(nn.Module):
    """Gated feed-forward, SwiGLU (Shazeer 2020)."""

    def __init__(self, dim: int, ff_dim: int):
        super().__init__()
        self.to_gate_value = nn.Linear(dim, 2 * ff_dim, bias=False)
        self.to_out = nn.Linear(ff_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.to_gate_value(x).chunk(2, dim=-1)  # each [b,t,ff_dim]
        return self.to_out(F.silu(gate) * value)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, attend: Attend, layer: int):
        super().__init__()
        ff_dim = config.ff_dim or 64 * math.ceil(config.dim * 8 / 3 / 64)
        self.attention_norm = RMSNorm(config.dim)
        self.attention = Attention(config, attend, layer)
        self.feed_forward_norm = RMSNorm(config.dim)
        self.feed_forward = FeedForward(config.dim, ff_dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        kv_cache: KVCache | None = None,
        segments: Segments | None = None,
    ) -> Tensor:
        y = self.attention(self.attention_norm(x), angles, mask, kv_cache, segments)
        x = x + self.dropout(y)
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class Transformer(nn.Module):
    """A stack of causal blocks and a final norm.

    | parameter                     | initialised from                      |
    |-------------------------------|---------------------------------------|
    | to_q, to_kv, to_gate_value    | normal(0, 0.02)                       |
    | to_out (both)                 | normal(0, 0.02 / sqrt(2 num_layers))  |
    | RMSNorm weights               | 1                                     |

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
        self.norm = RMSNorm(config.dim)
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
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        angles = rotary_angles(positions, self.config.head_dim, self.config.rotary_base)
        for block in self.blocks:
            x = block(x, angles, mask, kv_cache, segments)
        if kv_cache is not None:
            kv_cache.advance(x.shape[1])
        return self.norm(x)

    def compile_blocks(self) -> None:
        """Compile each block in place. They share one graph, so it takes seconds at any depth.

        The whole stack as one graph took ten times as long and its step 6 % longer (H100, 24
        layers): inductor then recomputes more in the backward pass.
        """
        for block in self.blocks:
            block.compile()

    def make_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache on this model's device, in its dtype (or autocast's, where active)."""
        weight = self.norm.weight
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        c = self.config
        return KVCache(
            c.num_layers, batch_size, c.num_kv_heads, max_length, c.head_dim, weight.device, dtype
        )

    def flops_per_token(self, sequence_length: float) -> float:
        """Training FLOPs per token: 6 x parameters + 6 x layers x inner width x sequence.

        Two for each multiply-add, three passes (forward, and backward twice); attention's term
        counts a causal mask's half. Embeddings and heads are not counted.
        """
        num_parameters = sum(p.numel() for p in self.parameters())
        inner = self.config.num_heads * self.config.head_dim
        return 6 * num_parameters + 6 * self.config.num_layers * inner * sequence_length
