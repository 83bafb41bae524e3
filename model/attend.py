"""Scaled dot-product attention for multi-query and grouped heads: one specification, fast backends.

`Attend` holds no parameters. Its einsum path is the specification; its fused path asks PyTorch's
kernels for the same numbers. Which kernels may run is decided once (`model/backends.py`) and never
changes the maths.

The rule that peers get wrong: under `causal`, query i sees key j iff j <= i + (k_len - q_len), so a
query that comes after a key/value cache sees the whole cache. PyTorch's `is_causal` aligns to the
upper left instead and is therefore used only where q_len == k_len.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, einsum, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from model.backends import AttentionChoice, resolve

KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Segments:
    """Clips one after another in a row of M places, each of which attends to itself alone.

    `lengths` of the clips, which make M, none more than `longest`; `bounds` [n + 1] int32, where
    each begins, on the device. (A GPU reads the last two alone.)
    """

    lengths: tuple[int, ...]
    bounds: Tensor
    longest: int


class Attend(nn.Module):
    """softmax(q k^T / sqrt(d) + attn_bias) v over the keys each query may see.

    Args:
        dropout: probability of dropping an attention weight, in training mode only.
        causal: query i sees key j iff j <= i + (k_len - q_len).
        flash: False = einsum, the specification; True = PyTorch's fused kernels, same maths.
        choice: what `select_backends` resolved at start-up; None resolves at the first call.
    """

    def __init__(
        self,
        dropout: float = 0.0,
        causal: bool = False,
        flash: bool = False,
        choice: AttentionChoice | None = None,
    ):
        super().__init__()
        self.dropout = dropout
        self.causal = causal
        self.flash = flash
        self.choice = choice

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        attn_bias: Tensor | None = None,
        segments: Segments | None = None,
    ) -> Tensor:
        """q [b,h,i,d]; k, v [b,j,d] (one head shared by all) or [b,g,j,d], g dividing h.

        mask [b,j], True = may be attended; attn_bias broadcastable to [b,h,i,j], added to the
        scaled scores. Returns [b,h,i,d]. A query with nothing to attend gets zeros. segments: b is
        1, i is j, no mask or bias, and each segment is a call of its own.
        """
        if k.ndim == 3:
            k, v = (rearrange(t, "b j d -> b 1 j d") for t in (k, v))
        if q.shape[1] % k.shape[1]:
            raise ValueError(f"{q.shape[1]} query heads cannot share {k.shape[1]} key/value heads")
        if segments is not None:
            assert mask is None
            assert attn_bias is None
            return self._segments(q, k, v, segments)
        attend = self._fused if self.flash else self._einsum
        return attend(q, k, v, mask, attn_bias)

    def _segments(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        """One call for each segment; on a GPU one of the flash kernel for all."""
        if not q.is_cuda:
            pieces = zip(*(x.split(segments.lengths, dim=2) for x in (q, k, v)), strict=True)
            return torch.cat([self(*piece) for piece in pieces], dim=2)
        q, k, v = (rearrange(x, "1 h m d -> m h d") for x in (q, k, v))
        ends, sizes = (segments.bounds, segments.bounds), [segments.longest] * 2
        dropout = self.dropout if self.training else 0.0
        flash = torch.ops.aten._flash_attention_forward  # varlen_attn is this without dropout
        out = flash(q, k, v, *ends, *sizes, dropout, self.causal, False)[0]
        return rearrange(out, "m h d -> 1 h m d")

    def _einsum(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, attn_bias: Tensor | None
    ) -> Tensor:
        g, scale = k.shape[1], q.shape[-1] ** -0.5
        q = rearrange(q, "b (g r) i d -> b g r i d", g=g)  # r query heads share each k/v head
        scores = einsum("b g r i d, b g j d -> b g r i j", q, k) * scale
        scores = rearrange(scores, "b g r i j -> b (g r) i j").float()
        if attn_bias is not None:
            scores = scores + attn_bias
        allowed = _allowed(q, k, self.causal, mask, attn_bias)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
        weights = scores.softmax(dim=-1)
        if allowed is not None:  # also turns a row with nothing to attend into zeros
            weights = weights.masked_fill(~allowed, 0.0)
        weights = F.dropout(weights, self.dropout, self.training).to(v.dtype)
        weights = rearrange(weights, "b (g r) i j -> b g r i j", g=g)
        out = einsum("b g r i j, b g j d -> b g r i d", weights, v)
        return rearrange(out, "b g r i d -> b (g r) i d")

    def _fused(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, attn_bias: Tensor | None
    ) -> Tensor:
        backends = self._backends(q, mask, attn_bias)
        if backends == ("triton",):
            from model.attend_triton import attend_triton  # here: not every machine has Triton

            assert not (self.dropout and self.training), "no dropout there: select_backends says so"
            return attend_triton(q, k, v, mask, attn_bias, self.causal)
        if backends == ("cudnn",) and k.shape[2] == 1:  # its kernel takes no single key
            k, v, mask, attn_bias = _with_masked_key(k, v, mask, attn_bias)
        b, h, i, _ = q.shape
        g, j = k.shape[1], k.shape[2]
        if self.causal and i > j and mask is None and attn_bias is None:
            # The first i - j queries come before every key; the others are the case q_len == k_len.
            return F.pad(self._fused(q[:, :, i - j :], k, v, None, None), (0, 0, i - j, 0))
        causal = self.causal and i > 1  # a single last query sees every key
        # Two ways to share keys without repeating them: heads as rows of one product (reads k and v
        # once; the math kernel would copy views), or stride-0 views, which the others read as is.
        as_rows = g < h and (i == 1 or backends[0] == "math")
        options = {"dropout_p": self.dropout if self.training else 0.0}
        attn_mask = alive = None
        if mask is None and attn_bias is None and (not causal or (i == j and not as_rows)):
            options["is_causal"] = causal
        elif mask is None and attn_bias is None and i < j and _has_lower_right(backends, q):
            options["attn_mask"] = causal_lower_right(i, j)
        else:
            attn_mask, alive = _explicit_mask(q, k, causal, mask, attn_bias)
        if g < h:
            share = _heads_as_rows if as_rows else _heads_as_views
            q, k, v, attn_mask = share(q, k, v, attn_mask)
        if attn_mask is not None:
            options["attn_mask"] = attn_mask
        with _only(backends, q):
            out = F.scaled_dot_product_attention(q, k, v, **options)
        out = out.reshape(b, h, i, v.shape[-1])  # [b,g,(r i),d] or [(b g),r,i,d] -> [b,h,i,d]
        return out if alive is None else out.masked_fill(~alive, 0.0)

    def _backends(
        self, q: Tensor, mask: Tensor | None, attn_bias: Tensor | None
    ) -> tuple[str, ...]:
        """The resolved order, less what this call rules out."""
        if self.choice is None:
            self.choice = resolve(q.device, q.dtype, q.shape[-1], has_dropout=self.dropout > 0)
        backends = self.choice.backends
        if len(backends) > 1 and q.shape[2] == 1:
            # A decode step has a new k_len each time; cuDNN would build a new plan for each.
            backends = tuple(name for name in backends if name != "cudnn")
        if len(backends) > 1 and "triton" in backends:
            plain = mask is None and attn_bias is None
            if not plain and q.shape[2] > 1 and not (self.dropout and self.training):
                return ("triton",)
            backends = tuple(name for name in backends if name != "triton")
        if backends == ("flash",) and q.is_cuda and (mask is not None or attn_bias is not None):
            raise ValueError(
                "attention.backend=flash takes no mask or bias, this call has one; use auto"
            )
        return backends


def _only(backends: tuple[str, ...], q: Tensor) -> AbstractContextManager:
    """PyTorch shall use these kernels, in this order. On a CPU both, flash first, are its own
    choice: being told so would take as long as the attention of a short decoding step."""
    if not q.is_cuda and backends == ("flash", "math"):
        return nullcontext()
    return sdpa_kernel([KERNELS[name] for name in backends], set_priority=True)


def _with_masked_key(
    k: Tensor, v: Tensor, mask: Tensor | None, attn_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """k, v [b,g,j,d] with one more key before the others, which nobody may attend."""
    mask = k.new_ones(k.shape[0], k.shape[2], dtype=torch.bool) if mask is None else mask
    k, v, mask = F.pad(k, (0, 0, 1, 0)), F.pad(v, (0, 0, 1, 0)), F.pad(mask, (1, 0))
    return k, v, mask, None if attn_bias is None else F.pad(torch.atleast_1d(attn_bias), (1, 0))


Shared = tuple[Tensor, Tensor, Tensor, Tensor | None]


def _heads_as_rows(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None) -> Shared:
    """The r heads that share keys become query rows: q [b,h,i,d] -> [b,g,(r i),d], mask alike."""
    g, r = k.shape[1], q.shape[1] // k.shape[1]
    q = q.reshape(q.shape[0], g, -1, q.shape[-1])  # [b,(g r),i,d] -> [b,g,(r i),d]
    if attn_mask is not None and attn_mask.shape[1] == 1:
        attn_mask = repeat(attn_mask, "b 1 i j -> b 1 (r i) j", r=r)
    elif attn_mask is not None:
        attn_mask = rearrange(attn_mask, "b (g r) i j -> b g (r i) j", g=g)
    return q, k, v, attn_mask


def _heads_as_views(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None) -> Shared:
    """k, v [b,g,j,d] -> [(b g),r,j,d] with stride 0 over r; q and mask follow as [(b g),r,i,.]."""
    b, h = q.shape[:2]
    g, r = k.shape[1], h // k.shape[1]
    q = rearrange(q, "b (g r) i d -> (b g) r i d", g=g)
    k, v = (t.reshape(b * g, 1, *t.shape[2:]).expand(b * g, r, *t.shape[2:]) for t in (k, v))
    if attn_mask is not None and g > 1:
        attn_mask = attn_mask.expand(b, h if attn_mask.shape[1] == h else g, -1, -1)
        attn_mask = rearrange(attn_mask, "b (g r) i j -> (b g) r i j", g=g)
    return q, k, v, attn_mask


def _has_lower_right(backends: tuple[str, ...], q: Tensor) -> bool:
    return q.is_cuda and not {"flash", "efficient"}.isdisjoint(backends)


def _allowed(
    q: Tensor, k: Tensor, causal: bool, mask: Tensor | None, attn_bias: Tensor | None
) -> Tensor | None:
    """Which pairs may attend: bool, broadcastable to [b,h,i,j]; None = all of them."""
    i, j = q.shape[-2], k.shape[-2]
    allowed = None
    if causal:
        allowed = torch.ones(i, j, dtype=torch.bool, device=q.device).tril(j - i)[None, None]
    if mask is not None:
        keys = rearrange(mask, "b j -> b 1 1 j")
        allowed = keys if allowed is None else allowed & keys
    if attn_bias is not None:
        finite = ~torch.isneginf(attn_bias)
        finite = finite.expand(*[1] * (4 - finite.ndim), *finite.shape)
        allowed = finite if allowed is None else allowed & finite
    return allowed


def _explicit_mask(
    q: Tensor, k: Tensor, causal: bool, mask: Tensor | None, attn_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(attn_mask for SDPA [b|1,h|1,i,j], alive [b|1,h|1,i,1]).

    Kernels disagree on rows with nothing to attend (zeros or NaN), so such rows attend everything
    here and the caller zeroes them: no kernel ever sees one, forward or backward.
    """
    allowed = _allowed(q, k, causal, mask, attn_bias)
    allowed = allowed.expand(*allowed.shape[:2], q.shape[2], k.shape[2])
    alive = allowed.any(dim=-1, keepdim=True)
    if attn_bias is None:
        return allowed | ~alive, alive
    bias = attn_bias.to(q.dtype).masked_fill(~allowed, float("-inf"))
    return bias.masked_fill(~alive, 0.0), alive
