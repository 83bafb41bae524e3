"""A decoding step in Triton: what one new place for each clip takes, five or six launches a layer.

With one query a clip every weight and every key is read once and used a few times, so a step is as
fast as memory is read and as kernels are few. Hence norms, gates and residuals are computed where
the products are, and the keys of one clip are divided among many programs (flash-decoding, Dao et
al. 2023), whose parts `_merge` puts together. Lengths are read on the GPU: nothing here depends on
a number that the host knows, so a step can be captured as a CUDA graph and replayed at any length.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from model.fused import EPS
from model.fused_triton import swiglu

# Clips up to so many -> their rows in a tile, outputs, inputs at a time, warps, loads in flight of
# `_product`; half as many inputs in fp32. More clips fill cuBLAS's tiles.
TILES = {
    1: (1, 8, 512, 4, 3),
    16: (16, 16, 128, 4, 4),
    32: (32, 16, 128, 4, 4),
    64: (64, 16, 128, 4, 4),
}
KEYS = (64, 4, 2)  # at a time (half in fp32), warps, loads in flight of `_attend`
SPLITS = 16  # programs that share the keys of a clip, if there are programs too few
PROGRAMS = 256  # enough of them
HEAD_EPS = tl.constexpr(torch.finfo(torch.float32).eps)  # that F.rms_norm takes in `HeadNorm`


@triton.jit
def _product(
    x, weight, out, num_rows, num_outputs, num_inputs, eps,
    NORM: tl.constexpr, GATED: tl.constexpr, ADD: tl.constexpr,
    B: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """out [b,n] = (or +=) x [b,k] weight [n,k]^T. NORM: of x divided by its RMS. GATED: weight
    [2n,k] gives gates and values, of which out is silu(gate) value."""
    row = tl.program_id(1) * B + tl.arange(0, B)
    column = tl.program_id(0) * N + tl.arange(0, N)
    wanted, there = column < num_outputs, row < num_rows
    at_x = x + row[:, None].to(tl.int64) * num_inputs
    at_w = weight + column[:, None].to(tl.int64) * num_inputs
    of_values = num_outputs.to(tl.int64) * num_inputs
    # one row is no matrix: its products are summed where they are, in the end
    shape: tl.constexpr = [N, K] if B == 1 else [B, N]
    total, values = tl.zeros(shape, tl.float32), tl.zeros(shape, tl.float32)
    squares = tl.zeros([B, K], tl.float32)
    for begin in range(0, num_inputs, K):
        k = begin + tl.arange(0, K)
        inside = (k < num_inputs)[None, :]
        read = tl.load(at_x + k[None, :], there[:, None] & inside, 0.0)  # [B,K]
        w = tl.load(at_w + k[None, :], wanted[:, None] & inside, 0.0)  # [N,K]
        wide = read.to(tl.float32)
        if NORM:
            squares += wide * wide
        if B == 1:
            total += wide * w.to(tl.float32)
        else:
            total = tl.dot(read, w.T, total, input_precision="ieee")
        if GATED:
            w = tl.load(at_w + of_values + k[None, :], wanted[:, None] & inside, 0.0)
            if B == 1:
                values += wide * w.to(tl.float32)
            else:
                values = tl.dot(read, w.T, values, input_precision="ieee")
    if B == 1:
        total, values = tl.sum(total, axis=1)[None, :], tl.sum(values, axis=1)[None, :]
    if NORM:
        scale = tl.rsqrt(tl.sum(squares, axis=1) / num_inputs + eps)[:, None]
        total *= scale
        values *= scale
    if GATED:
        total = total * tl.sigmoid(total) * values
    to = out + row[:, None].to(tl.int64) * num_outputs + column[None, :]
    both = there[:, None] & wanted[None, :]
    if ADD:
        total += tl.load(to, both, 0.0).to(tl.float32)
    tl.store(to, total, both)


@triton.jit
def _turned(at, gains, cos, sin, half, inside, NORM: tl.constexpr):
    """Heads at `at` [M,HALF], in halves, by their angles; NORM: each divided by its RMS first."""
    a = tl.load(at, inside, 0.0).to(tl.float32)
    b = tl.load(at + half, inside, 0.0).to(tl.float32)
    if NORM:
        pair = tl.arange(0, a.shape[1])
        scale = tl.rsqrt(tl.sum(a * a + b * b, axis=1) / (2 * half) + HEAD_EPS)[:, None]
        a *= scale * tl.load(gains + pair, pair < half, 0.0).to(tl.float32)[None, :]
        b *= scale * tl.load(gains + half + pair, pair < half, 0.0).to(tl.float32)[None, :]
    return a * cos - b * sin, a * sin + b * cos


@triton.jit
def _keep(new_k, new_v, k, v, gains, cos, sin, place, half, NORM: tl.constexpr, HALF: tl.constexpr):
    """The new key, turned, and value, as the cache now has them at `place`: halves [1,HALF] of the
    one, [2*HALF] of the other."""
    pair, d = tl.arange(0, HALF)[None, :], tl.arange(0, 2 * HALF)
    k1, k2 = _turned(new_k + pair, gains, cos, sin, half, pair < half, NORM)
    k1, k2 = k1.to(k.dtype.element_ty), k2.to(k.dtype.element_ty)
    value = tl.load(new_v + d, d < 2 * half, 0.0)
    tl.store(k + place * 2 * half + pair, k1, pair < half)
    tl.store(k + place * 2 * half + half + pair, k2, pair < half)
    tl.store(v + place * 2 * half + d, value, d < 2 * half)
    return k1, k2, value


@triton.jit
def _attend(
    qkv, cos, sin, q_gain, k_gain, cache_k, cache_v, place, first, out, lse,
    num_kv, shared, half, capacity, scale,
    NORM: tl.constexpr, PARTS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """The heads that share keys, over a part of those keys; the last part has the new one, which it
    also writes to the cache. PARTS > 1: parts of the output, each with its log-sum."""
    group, part = tl.program_id(0), tl.program_id(1)
    clip, g = group // num_kv, group % num_kv
    length, begin = tl.load(place).to(tl.int32), tl.load(first + clip).to(tl.int32)
    each = tl.cdiv(tl.maximum(length - begin, 0), PARTS)
    begin += part * each
    end = tl.minimum(begin + each, length)
    head, pair, d = tl.arange(0, M), tl.arange(0, HALF), tl.arange(0, 2 * HALF)
    in_q = (head < shared)[:, None] & (pair < half)[None, :]
    c = tl.load(cos + clip * half + pair, pair < half, 0.0)[None, :]
    s = tl.load(sin + clip * half + pair, pair < half, 0.0)[None, :]
    width = 2 * half
    row = qkv + clip.to(tl.int64) * (num_kv * (shared + 2)) * width
    at_q = row + (g * shared + head)[:, None] * width + pair[None, :]
    q1, q2 = _turned(at_q, q_gain, c, s, half, in_q, NORM)
    q1, q2 = (q1 * scale).to(cache_k.dtype.element_ty), (q2 * scale).to(cache_k.dtype.element_ty)
    k = cache_k + group.to(tl.int64) * capacity * width
    v = cache_v + group.to(tl.int64) * capacity * width
    most = tl.full([M], float("-inf"), tl.float32)
    weight = tl.zeros([M], tl.float32)
    total = tl.zeros([M, 2 * HALF], tl.float32)
    if part == PARTS - 1:  # the new key: of no tile, for nobody else has it yet
        new = row + (num_kv * shared + g) * width
        k1, k2, value = _keep(
            new, new + num_kv * width, k, v, k_gain, c, s, length, half, NORM, HALF
        )
        both = q1.to(tl.float32) * k1.to(tl.float32) + q2.to(tl.float32) * k2.to(tl.float32)
        most, weight = tl.sum(both, axis=1), weight + 1
        total += value.to(tl.float32)[None, :]
    for at in range(begin, end, N):
        j = at + tl.arange(0, N)
        seen = j < end
        in_k, in_v = seen[:, None] & (pair < half)[None, :], seen[:, None] & (d < width)[None, :]
        at_k = k + j[:, None] * width + pair[None, :]
        k1, k2 = tl.load(at_k, in_k, 0.0), tl.load(at_k + half, in_k, 0.0)  # [N,HALF]
        values = tl.load(v + j[:, None] * width + d[None, :], in_v, 0.0)  # [N,2*HALF]
        scores = tl.dot(q1, k1.T, input_precision="ieee")
        scores = tl.dot(q2, k2.T, scores, input_precision="ieee")  # [M,N]
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, axis=1))
        fade, weights = tl.exp(most - higher), tl.exp(scores - higher[:, None])
        weight = weight * fade + tl.sum(weights, axis=1)
        total = tl.dot(
            weights.to(values.dtype), values, total * fade[:, None], input_precision="ieee"
        )
        most = higher
    total /= tl.where(weight > 0, weight, 1.0)[:, None]  # a part may have no keys
    at = (group * PARTS + part) * shared + head
    inside = (head < shared)[:, None] & (d < width)[None, :]
    tl.store(out + at[:, None].to(tl.int64) * width + d[None, :], total, inside)
    if PARTS > 1:
        logs = tl.where(weight > 0, most + tl.log(weight), float("-inf"))
        tl.store(lse + at, logs, head < shared)


@triton.jit
def _merge(parts, lse, out, shared, width, PARTS: tl.constexpr, M: tl.constexpr, D: tl.constexpr):
    """parts [group,PARTS,shared,width], each of keys of its own, into out [group,shared,width]."""
    group, head, d = tl.program_id(0), tl.arange(0, M), tl.arange(0, D)
    some = head < shared
    inside = some[:, None] & (d < width)[None, :]
    most = tl.full([M], float("-inf"), tl.float32)
    for part in range(PARTS):
        most = tl.maximum(most, tl.load(lse + (group * PARTS + part) * shared + head, some, 0.0))
    total, weight = tl.zeros([M, D], tl.float32), tl.zeros([M], tl.float32)
    for part in range(PARTS):
        at = (group * PARTS + part) * shared + head
        w = tl.exp(tl.load(lse + at, some, 0.0) - most)
        weight += w
        read = tl.load(parts + at[:, None].to(tl.int64) * width + d[None, :], inside, 0.0)
        total += w[:, None] * read
    to = out + (group * shared + head)[:, None].to(tl.int64) * width + d[None, :]
    tl.store(to, total / weight[:, None], inside)


def _few(x: Tensor) -> bool:
    return len(x) <= max(TILES)


def _launch(x: Tensor, weight: Tensor, out: Tensor, gated: bool, norm: bool, add: bool) -> Tensor:
    (B, num_inputs), num_outputs = x.shape, out.shape[1]
    rows, columns, inputs, warps, stages = next(tile for most, tile in TILES.items() if most >= B)
    inputs = min(inputs // (x.element_size() // 2), max(16, triton.next_power_of_2(num_inputs)))
    grid = (triton.cdiv(num_outputs, columns), triton.cdiv(B, rows))
    _product[grid](
        x, weight, out, B, num_outputs, num_inputs, EPS, NORM=norm, GATED=gated, ADD=add,
        B=rows, N=columns, K=inputs, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def norm_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [B,C] divided by its root mean square, weight [N,C] -> [B,N]."""
    if not _few(x):
        return F.linear(F.rms_norm(x, x.shape[-1:], eps=EPS), weight)
    out = x.new_empty(x.shape[0], weight.shape[0])
    return _launch(x, weight, out, gated=False, norm=True, add=False)


def norm_swiglu(x: Tensor, weight: Tensor) -> Tensor:
    """x [B,C] divided by its root mean square, gates and values weight [2F,C] -> [B,F]."""
    if not _few(x):
        gate_value = F.linear(F.rms_norm(x, x.shape[-1:], eps=EPS), weight)
        return swiglu(gate_value, gate_value.new_ones(len(x), 1, dtype=torch.float32))
    out = x.new_empty(x.shape[0], weight.shape[0] // 2)
    return _launch(x, weight, out, gated=True, norm=True, add=False)


def add_linear(onto: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """onto [B,C] += x [B,F] weight [C,F]^T, in place."""
    if not _few(x):
        return onto.addmm_(x, weight.mT)
    return _launch(x, weight, onto, gated=False, norm=False, add=True)


def attend_new(
    qkv: Tensor,
    angles: tuple[Tensor, Tensor],
    gains: tuple[Tensor, Tensor] | None,
    cache: tuple[Tensor, Tensor],
    place: Tensor,
    first: Tensor,
) -> Tensor:
    """qkv [B,H+2G,D] of a new place, cos and sin [B,D/2] -> attention [B,H*D].

    cache: k, v [B,G,J,D], whose places from first [B] on, before `place` [1], the queries see; the
    new key and value become its place `place`. gains: of queries and keys, where they are
    normalised. Integers are int32 or int64, on the device.
    """
    k, v = cache
    (B, G, capacity, D), (_, heads, _) = k.shape, qkv.shape
    num_heads = heads - 2 * G
    shared, half = num_heads // G, D // 2
    parts = max(1, min(SPLITS, triton.next_power_of_2(triton.cdiv(PROGRAMS, B * G))))
    out = qkv.new_empty(B, num_heads * D)
    pieces = out if parts == 1 else qkv.new_empty(B * G, parts, shared, D, dtype=torch.float32)
    lse = pieces if parts == 1 else pieces.new_empty(B * G, parts, shared)
    keys, warps, stages = KEYS[0] // (qkv.element_size() // 2), *KEYS[1:]
    M, HALF = max(16, triton.next_power_of_2(shared)), max(16, triton.next_power_of_2(half))
    _attend[(B * G, parts)](
        qkv, *angles, *(gains or (qkv, qkv)), k, v, place, first, pieces, lse,
        G, shared, half, capacity, D**-0.5,
        NORM=gains is not None, PARTS=parts, M=M, N=keys, HALF=HALF,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if parts > 1:
        _merge[(B * G,)](pieces, lse, out, shared, D, PARTS=parts, M=M, D=2 * HALF)
    return out
