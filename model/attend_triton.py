"""Attention with a bias that may need a gradient, key masks and grouped heads, in Triton.

Imported where it is used: Triton is not installed everywhere. The kernels are next door, in
`model/attend_kernels.py`.
"""

from typing import NamedTuple

import torch
import triton
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.attend_kernels import (
    Inputs,
    Rows,
    View,
    dbias_kernel,
    dkv_kernel,
    dq_kernel,
    forward_kernel,
)

Tile = tuple[int, int, int, int]  # queries, keys, warps that share them, loads in flight


class Tiles(NamedTuple):
    forward: Tile
    dq: Tile
    dkv: Tile
    dbias: Tile


TILES = {  # (bits of a number, head_dim up to) -> those of 16 bits up to 128 are tuned on an H100
    (16, 64): Tiles((64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3)),
    (16, 128): Tiles((128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 2), (64, 128, 8, 2)),
    (16, 256): Tiles((64, 32, 8, 2), (32, 32, 4, 2), (32, 32, 8, 2), (64, 32, 8, 2)),
    (32, 64): Tiles((32, 32, 4, 2), (32, 32, 4, 2), (16, 32, 4, 2), (32, 32, 4, 2)),
    (32, 128): Tiles((32, 16, 4, 2), (16, 16, 4, 1), (16, 16, 4, 1), (32, 32, 4, 2)),
    (32, 256): Tiles((32, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
}
INTERPRETED = Tiles((32, 16, 4, 1), (16, 32, 4, 1), (16, 32, 4, 1), (32, 16, 4, 1))
ROOMY = ((8, 0), (9, 0))  # A100 and H100; others get the last row, which takes under 99 KB
PROGRAMS = 512  # that dk and dv are divided among, where there are heads enough


def _view(x: Tensor | None) -> View | None:
    return None if x is None else View(x, x.stride())


def _inputs(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None) -> Inputs:
    (b, h, i, d), (_, g, j, _) = q.shape, k.shape
    bias = None if bias is None else bias.expand(b, h, i, j)
    return Inputs(*map(_view, (q, k, v, bias, mask)), i, j, h // g, d**-0.5)


def _tiles(q: Tensor) -> Tiles:
    if triton.knobs.runtime.interpret:
        return INTERPRETED
    bits, width = 8 * q.element_size(), q.shape[-1]
    if torch.cuda.get_device_capability(q.device) not in ROOMY:
        width = 256
    return next(tiles for (b, widest), tiles in TILES.items() if b == bits and width <= widest)


def _sizes(tile: Tile, d: int) -> dict[str, int]:
    m, n, warps, stages = tile
    block = max(16, triton.next_power_of_2(d))
    return {"D": d, "BLOCK_D": block, "M": m, "N": n, "num_warps": warps, "num_stages": stages}


def _dkv(x: Inputs, y: Rows, causal: bool, tile: Tile) -> list[Tensor]:
    """dk, dv [b,g,j,d]. A program sums over all heads that share keys, or over fewer where that
    would leave multiprocessors idle; the sums of those are summed here."""
    (b, g, j, d), like, tiles = x.k.data.shape, x.k.data, triton.cdiv(x.j, tile[1])
    divisors = [parts for parts in range(1, x.shared + 1) if x.shared % parts == 0]
    parts = next((n for n in divisors if b * g * n * tiles >= PROGRAMS), x.shared)
    dtype = like.dtype if parts == 1 else torch.float32
    sums = [like.new_empty(b, g * parts, j, d, dtype=dtype) for _ in range(2)]
    heads, grid = x.shared // parts, (b, tiles, g * parts)
    dkv_kernel[grid](x, y, *map(_view, sums), heads, causal, **_sizes(tile, d))
    if parts == 1:
        return sums
    return [rearrange(s, "b (g p) j d -> b g p j d", g=g).sum(2).to(like.dtype) for s in sums]


def _dbias(x: Inputs, y: Rows, causal: bool, bias: Tensor, tile: Tile) -> Tensor:
    (b, h, i, d), (bias_b, bias_h, *_) = x.q.data.shape, bias.shape
    repeated = [dim for dim, full in ((2, i), (3, x.j)) if bias.shape[dim] != full]
    dtype = torch.float32 if repeated else bias.dtype
    dbias = bias.new_empty(bias_b, bias_h, i, x.j, dtype=dtype)
    grid = (triton.cdiv(x.j, tile[1]), triton.cdiv(i, tile[0]), bias_b * bias_h)
    shares = (bias_h, b // bias_b, h // bias_h)
    dbias_kernel[grid](x, y, _view(dbias), *shares, causal, **_sizes(tile, d))
    return dbias.sum(repeated, keepdim=True).to(bias.dtype) if repeated else dbias


class _Attention(torch.autograd.Function):
    """bias has 4 dimensions here, any of which may be 1."""

    @staticmethod
    def forward(ctx, q, k, v, mask, bias, causal):
        (b, h, i, d), tile = q.shape, _tiles(q).forward
        out, lse = torch.empty_like(q), q.new_empty(b, h, i, dtype=torch.float32)
        x, grid = _inputs(q, k, v, mask, bias), (b, triton.cdiv(i, tile[0]), h)
        with torch.cuda.device_of(q):
            forward_kernel[grid](x, _view(out), _view(lse), causal, **_sizes(tile, d))
        ctx.save_for_backward(q, k, v, mask, bias, out, lse)
        ctx.causal = causal
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, mask, bias, out, lse = ctx.saved_tensors
        (b, h, i, d), tiles, causal = q.shape, _tiles(q), ctx.causal
        x, dq, delta, dbias = _inputs(q, k, v, mask, bias), *map(torch.empty_like, (q, lse)), None
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        y = Rows(*map(_view, (dout, lse, delta)))
        with torch.cuda.device_of(q):
            grid = (b, triton.cdiv(i, tiles.dq[0]), h)
            dq_kernel[grid](x, y, _view(out), _view(dq), causal, **_sizes(tiles.dq, d))
            dk, dv = _dkv(x, y, causal, tiles.dkv)
            if ctx.needs_input_grad[4]:
                dbias = _dbias(x, y, causal, bias, tiles.dbias)
        return dq, dk, dv, None, dbias, None


def attend_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """softmax(q k^T / sqrt(d) + attn_bias) v, with gradients for q, k, v and attn_bias.

    q [b,h,i,d]; k, v [b,g,j,d], g dividing h; mask [b,j] bool, True = may be attended; attn_bias of
    any float type, broadcastable to [b,h,i,j], -inf = may not be attended. causal: query n sees key
    m iff m <= n + (j - i). Returns [b,h,i,d], zeros where a query has nothing to attend, laid out
    in memory as q is. ValueError: q is neither fp16, bf16 nor fp32, or wider than 256, or not on a
    GPU.
    """
    assert q.shape[1] % k.shape[1] == 0
    if q.shape[-1] > 256 or q.element_size() > 4:
        raise ValueError(
            "attention.backend=triton takes fp16, bf16 or fp32 and a head_dim up to 256, not "
            f"{str(q.dtype).removeprefix('torch.')} and {q.shape[-1]}; use auto"
        )
    if not (q.is_cuda or triton.knobs.runtime.interpret):
        raise ValueError(f"attention.backend=triton needs a GPU, q is on {q.device}; use auto")
    k, v = k.to(q.dtype), v.to(q.dtype)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if mask is not None:
        mask = q.new_zeros(mask.shape, dtype=torch.float32).masked_fill_(~mask, float("-inf"))
    if attn_bias is not None:
        attn_bias = attn_bias[(None,) * (4 - attn_bias.ndim)]
        if attn_bias.stride(-1) > 1:  # [i,j,h] seen as [h,i,j]: its rows would be read slowly
            attn_bias = attn_bias.contiguous()
    return _Attention.apply(q, k, v, mask, attn_bias, causal)
