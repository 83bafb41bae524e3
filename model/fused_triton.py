"""The pieces of `model/fused.py` as Triton kernels: everything is read once and written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.fused import EPS, Kernels

WIDTH = 1024  # elements that a program of `_swiglu` takes


@triton.jit
def _add_norm(x, y, total, normed, scale, dim, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    at, inside = row.to(tl.int64) * dim + column, column < dim
    s = tl.load(x + at, inside, 0.0).to(tl.float32) + tl.load(y + at, inside, 0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(s * s) / dim + eps)
    tl.store(total + at, s, inside)
    tl.store(normed + at, s * r, inside)
    tl.store(scale + row, r)


@triton.jit
def _add_norm_backward(d_sum, d_normed, normed, scale, out, dim, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    at, inside = row.to(tl.int64) * dim + column, column < dim
    d = tl.load(d_normed + at, inside, 0.0).to(tl.float32)
    n = tl.load(normed + at, inside, 0.0).to(tl.float32)
    d = (d - n * (tl.sum(d * n) / dim)) * tl.load(scale + row)
    tl.store(out + at, d + tl.load(d_sum + at, inside, 0.0).to(tl.float32), inside)


@triton.jit
def _swiglu(gate_value, product, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at = gate_value + row * 2 * width + column
    gate = tl.load(at, inside, 0.0).to(tl.float32)
    value = tl.load(at + width, inside, 0.0).to(tl.float32)
    tl.store(product + row * width + column, gate * tl.sigmoid(gate) * value, inside)


@triton.jit
def _swiglu_backward(d_product, gate_value, d_gate_value, product, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at, to = row * 2 * width + column, row * width + column
    gate = tl.load(gate_value + at, inside, 0.0).to(tl.float32)
    value = tl.load(gate_value + at + width, inside, 0.0).to(tl.float32)
    d = tl.load(d_product + to, inside, 0.0).to(tl.float32)
    opened = tl.sigmoid(gate)
    silu = gate * opened
    tl.store(d_gate_value + at, d * value * (opened + silu * (1 - opened)), inside)
    tl.store(d_gate_value + at + width, d * silu, inside)
    tl.store(product + to, silu * value, inside)


@triton.jit
def _turn(x, out, cos, sin, num, half, HEADS: tl.constexpr, PAIRS: tl.constexpr):
    """num heads of 2 half numbers, one after another at x, turned and written to out."""
    head, pair = tl.arange(0, HEADS)[:, None], tl.arange(0, PAIRS)[None, :]
    at, inside = head * 2 * half + pair, (head < num) & (pair < half)
    a = tl.load(x + at, inside, 0.0).to(tl.float32)  # [HEADS,PAIRS]
    b = tl.load(x + at + half, inside, 0.0).to(tl.float32)
    tl.store(out + at, a * cos - b * sin, inside)
    tl.store(out + at + half, a * sin + b * cos, inside)


@triton.jit
def _rotate(
    qkv, q, k, v, cos, sin, num_angles, num_q, num_kv, half,
    BACK: tl.constexpr, Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """A row of qkv into rows of q, k, v; with BACK a row of qkv's gradient from theirs."""
    row = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, PAIRS)
    angle = row % num_angles * half + pair
    c = tl.load(cos + angle, pair < half, 0.0)[None, :]
    s = tl.load(sin + angle, pair < half, 0.0)[None, :]
    qkv += row * (num_q + 2 * num_kv) * 2 * half
    q += row * num_q * 2 * half
    k += row * num_kv * 2 * half
    v += row * num_kv * 2 * half
    of_k = qkv + num_q * 2 * half
    of_v = of_k + num_kv * 2 * half
    if BACK:
        _turn(q, qkv, c, -s, num_q, half, Q_HEADS, PAIRS)
        _turn(k, of_k, c, -s, num_kv, half, KV_HEADS, PAIRS)
        _turn(v, of_v, 1.0, 0.0, num_kv, half, KV_HEADS, PAIRS)
    else:
        _turn(qkv, q, c, s, num_q, half, Q_HEADS, PAIRS)
        _turn(of_k, k, c, s, num_kv, half, KV_HEADS, PAIRS)
        _turn(of_v, v, 1.0, 0.0, num_kv, half, KV_HEADS, PAIRS)


def add_norm(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, y = x.contiguous(), y.to(x.dtype).contiguous()
    total, normed = torch.empty_like(x), torch.empty_like(x)
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(x.shape[-1])
    _add_norm[(scale.numel(),)](x, y, total, normed, scale, x.shape[-1], EPS, BLOCK=block)
    return total, normed, scale


def add_norm_backward(d_sum: Tensor, d_normed: Tensor, normed: Tensor, scale: Tensor) -> Tensor:
    d_sum, d_normed, out = d_sum.contiguous(), d_normed.contiguous(), torch.empty_like(normed)
    dim = normed.shape[-1]
    block = triton.next_power_of_2(dim)
    _add_norm_backward[(scale.numel(),)](d_sum, d_normed, normed, scale, out, dim, BLOCK=block)
    return out


def _halves(gate_value: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """An empty [N,F] for gate_value [N,2F], and the programs that fill it."""
    *shape, both = gate_value.shape
    product = gate_value.new_empty(*shape, both // 2)
    return product, (gate_value.numel() // both, triton.cdiv(both // 2, WIDTH))


def swiglu(gate_value: Tensor) -> Tensor:
    product, grid = _halves(gate_value)
    _swiglu[grid](gate_value.contiguous(), product, product.shape[-1], BLOCK=WIDTH)
    return product


def swiglu_backward(d_product: Tensor, gate_value: Tensor) -> tuple[Tensor, Tensor]:
    product, grid = _halves(gate_value)
    gate_value, d_gate_value = gate_value.contiguous(), torch.empty_like(gate_value)
    _swiglu_backward[grid](
        d_product.contiguous(), gate_value, d_gate_value, product, product.shape[-1], BLOCK=WIDTH
    )
    return d_gate_value, product


def _launch_rotate(
    qkv: Tensor, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, back: bool
) -> None:
    """qkv [B,T,H+2G,D] -> q, k, v; or back. cos, sin [B|1,T,1,D/2]. All but angles contiguous."""
    (B, T, num_q, D), num_kv = q.shape, k.shape[2]
    _rotate[(B * T,)](
        qkv, q, k, v, cos.contiguous(), sin.contiguous(), cos.shape[0] * T, num_q, num_kv, D // 2,
        BACK=back, Q_HEADS=triton.next_power_of_2(num_q),
        KV_HEADS=triton.next_power_of_2(num_kv), PAIRS=triton.next_power_of_2(D // 2),
        num_warps=2,  # so that a thread has 8 numbers of 16 heads of 64: one load
    )  # fmt: skip


def rotate(qkv: Tensor, cos: Tensor, sin: Tensor, num_kv: int) -> tuple[Tensor, Tensor, Tensor]:
    B, T, heads, D = qkv.shape
    q, k, v = (qkv.new_empty(B, T, num, D) for num in (heads - 2 * num_kv, num_kv, num_kv))
    _launch_rotate(qkv.contiguous(), q, k, v, cos, sin, back=False)
    return q, k, v


def rotate_backward(d_q: Tensor, d_k: Tensor, d_v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    d_q, d_k, d_v = d_q.contiguous(), d_k.contiguous(), d_v.contiguous()
    B, T, num_q, D = d_q.shape
    d_qkv = d_q.new_empty(B, T, num_q + 2 * d_k.shape[2], D)
    _launch_rotate(d_qkv, d_q, d_k, d_v, cos, sin, back=True)
    return d_qkv


TRITON = Kernels(add_norm, add_norm_backward, swiglu, swiglu_backward, rotate, rotate_backward)
