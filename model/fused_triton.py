"""The pieces of `model/fused.py` as Triton kernels: everything is read once and written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.fused import EPS, Kernels

WIDTH = 1024  # elements that a program of `_swiglu` takes


@triton.jit
def _fork(x, copy, scale, dim, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    at, inside = row.to(tl.int64) * dim + column, column < dim
    read = tl.load(x + at, inside, 0.0)
    tl.store(copy + at, read, inside)
    wide = read.to(tl.float32)
    tl.store(scale + row, tl.rsqrt(tl.sum(wide * wide) / dim + eps))


@triton.jit
def _fork_backward(d_copy, d_x, x, scale, out, dim, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    at, inside = row.to(tl.int64) * dim + column, column < dim
    d = tl.load(d_x + at, inside, 0.0).to(tl.float32)
    wide = tl.load(x + at, inside, 0.0).to(tl.float32)
    s = tl.load(scale + row)
    d -= wide * (tl.sum(d * wide) * s * s / dim)
    tl.store(out + at, d + tl.load(d_copy + at, inside, 0.0).to(tl.float32), inside)


@triton.jit
def _swiglu(gate_value, scale, product, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at = gate_value + row * 2 * width + column
    s = tl.load(scale + row)
    gate = tl.load(at, inside, 0.0).to(tl.float32) * s
    value = tl.load(at + width, inside, 0.0).to(tl.float32) * s
    tl.store(product + row * width + column, gate * tl.sigmoid(gate) * value, inside)


@triton.jit
def _swiglu_backward(
    d_product, gate_value, scale, d_gate_value, product, width, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at, to = row * 2 * width + column, row * width + column
    s = tl.load(scale + row)
    gate = tl.load(gate_value + at, inside, 0.0).to(tl.float32) * s
    value = tl.load(gate_value + at + width, inside, 0.0).to(tl.float32) * s
    d = tl.load(d_product + to, inside, 0.0).to(tl.float32)
    opened = tl.sigmoid(gate)
    silu = gate * opened
    tl.store(d_gate_value + at, s * d * value * (opened + silu * (1 - opened)), inside)
    tl.store(d_gate_value + at + width, s * d * silu, inside)
    tl.store(product + to, silu * value, inside)


@triton.jit
def _turn(x, out, scale, cos, sin, num, half, HEADS: tl.constexpr, PAIRS: tl.constexpr):
    """num heads of 2 half numbers, one after another at x, turned, times scale, to out."""
    head, pair = tl.arange(0, HEADS)[:, None], tl.arange(0, PAIRS)[None, :]
    at, inside = head * 2 * half + pair, (head < num) & (pair < half)
    a = tl.load(x + at, inside, 0.0).to(tl.float32) * scale  # [HEADS,PAIRS]
    b = tl.load(x + at + half, inside, 0.0).to(tl.float32) * scale
    tl.store(out + at, a * cos - b * sin, inside)
    tl.store(out + at + half, a * sin + b * cos, inside)


@triton.jit
def _rotate(
    qkv, q, k, v, scale, cos, sin, num_angles, num_q, num_kv, half,
    BACK: tl.constexpr, Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """A row of qkv into rows of q, k, v; with BACK a row of qkv's gradient from theirs."""
    row = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, PAIRS)
    angle = row % num_angles * half + pair
    c = tl.load(cos + angle, pair < half, 0.0)[None, :]
    s = tl.load(sin + angle, pair < half, 0.0)[None, :]
    by = tl.load(scale + row)
    qkv += row * (num_q + 2 * num_kv) * 2 * half
    q += row * num_q * 2 * half
    k += row * num_kv * 2 * half
    v += row * num_kv * 2 * half
    of_k = qkv + num_q * 2 * half
    of_v = of_k + num_kv * 2 * half
    if BACK:
        _turn(q, qkv, by, c, -s, num_q, half, Q_HEADS, PAIRS)
        _turn(k, of_k, by, c, -s, num_kv, half, KV_HEADS, PAIRS)
        _turn(v, of_v, by, 1.0, 0.0, num_kv, half, KV_HEADS, PAIRS)
    else:
        _turn(qkv, q, by, c, s, num_q, half, Q_HEADS, PAIRS)
        _turn(of_k, k, by, c, s, num_kv, half, KV_HEADS, PAIRS)
        _turn(of_v, v, by, 1.0, 0.0, num_kv, half, KV_HEADS, PAIRS)


def fork(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    copy, scale = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    block = triton.next_power_of_2(x.shape[-1])
    _fork[(scale.numel(),)](x, copy, scale, x.shape[-1], EPS, BLOCK=block)
    return copy, scale


def fork_backward(d_copy: Tensor, d_x: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    d_copy, d_x, x = d_copy.contiguous(), d_x.contiguous(), x.contiguous()
    out, dim = torch.empty_like(x), x.shape[-1]
    block = triton.next_power_of_2(dim)
    _fork_backward[(scale.numel(),)](d_copy, d_x, x, scale, out, dim, BLOCK=block)
    return out


def _halves(gate_value: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """An empty [N,F] for gate_value [N,2F], and the programs that fill it."""
    *shape, both = gate_value.shape
    product = gate_value.new_empty(*shape, both // 2)
    return product, (gate_value.numel() // both, triton.cdiv(both // 2, WIDTH))


def swiglu(gate_value: Tensor, scale: Tensor) -> Tensor:
    product, grid = _halves(gate_value)
    _swiglu[grid](gate_value.contiguous(), scale, product, product.shape[-1], BLOCK=WIDTH)
    return product


def swiglu_backward(d_product: Tensor, gate_value: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    product, grid = _halves(gate_value)
    d_product, gate_value = d_product.contiguous(), gate_value.contiguous()
    d_gate_value, width = torch.empty_like(gate_value), product.shape[-1]
    _swiglu_backward[grid](d_product, gate_value, scale, d_gate_value, product, width, BLOCK=WIDTH)
    return d_gate_value, product


def _launch_rotate(
    qkv: Tensor, heads: tuple[Tensor, ...], scale: Tensor, cos: Tensor, sin: Tensor, back: bool
) -> None:
    """qkv [B,T,H+2G,D] -> heads: q, k, v; or back. All but the angles contiguous."""
    (B, T, num_q, D), num_kv = heads[0].shape, heads[1].shape[2]
    _rotate[(B * T,)](
        qkv, *heads, scale, cos.contiguous(), sin.contiguous(), cos.shape[0] * T, num_q, num_kv,
        D // 2, BACK=back, Q_HEADS=triton.next_power_of_2(num_q),
        KV_HEADS=triton.next_power_of_2(num_kv), PAIRS=triton.next_power_of_2(D // 2),
        num_warps=2,  # so that a thread has 8 numbers of 16 heads of 64: one load
    )  # fmt: skip


def rotate(
    qkv: Tensor, scale: Tensor, cos: Tensor, sin: Tensor, num_kv: int
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, heads, D = qkv.shape
    q, k, v = (qkv.new_empty(B, T, num, D) for num in (heads - 2 * num_kv, num_kv, num_kv))
    _launch_rotate(qkv.contiguous(), (q, k, v), scale, cos, sin, back=False)
    return q, k, v


def rotate_backward(
    d_q: Tensor, d_k: Tensor, d_v: Tensor, scale: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    B, T, num_q, D = d_q.shape
    d_qkv = d_q.new_empty(B, T, num_q + 2 * d_k.shape[2], D)
    heads = (d_q.contiguous(), d_k.contiguous(), d_v.contiguous())
    _launch_rotate(d_qkv, heads, scale, cos, sin, back=True)
    return d_qkv


TRITON = Kernels(fork, fork_backward, swiglu, swiglu_backward, rotate, rotate_backward)
