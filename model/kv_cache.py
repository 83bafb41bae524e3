"""Keys and values of the tokens seen so far: preallocated once, owned by whoever generates."""

from copy import copy

import torch
from torch import Tensor


class KVCache:
    """One k and one v tensor [B,G,max_length,D] per layer; the first `length` places are filled."""

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        num_kv_heads: int,
        max_length: int,
        head_dim: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        shape = (batch_size, num_kv_heads, max_length, head_dim)
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(num_layers)]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(num_layers)]
        self.length = 0
        self.max_length = max_length

    @property
    def dtype(self) -> torch.dtype:
        return self.k[0].dtype

    @property
    def device(self) -> torch.device:
        return self.k[0].device

    @property
    def head_dim(self) -> int:
        return self.k[0].shape[-1]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v [B,G,T,D] after the filled places; return views of all of them [B,G,J,D]."""
        end = self.length + k.shape[2]
        assert end <= self.max_length, f"cache of {self.max_length} cannot hold {end} tokens"
        self.k[layer][:, :, self.length : end] = k
        self.v[layer][:, :, self.length : end] = v
        return self.k[layer][:, :, :end], self.v[layer][:, :, :end]

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these, [B] bool."""
        self.k = [k[rows] for k in self.k]
        self.v = [v[rows] for v in self.v]

    def first_rows(self, num: int) -> "KVCache":
        """Those rows of this one, with a length of its own."""
        part = copy(self)
        part.k, part.v = [k[:num] for k in self.k], [v[:num] for v in self.v]
        return part

    def advance(self, num_tokens: int) -> None:
        """Count `num_tokens` as filled, once every layer has stored them."""
        self.length += num_tokens
