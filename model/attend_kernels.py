"""The Triton kernels of `model/attend_triton.py`, which launches them.

FlashAttention-2 (Dao 2023): scores exist a tile at a time, the forward pass keeps the logarithm of
each row's sum of weights, and the backward pass computes the weights anew from it. A bias and its
gradient are read and written where they are, however many rows and heads share them. No atomics:
the same inputs give the same bits.

Letters are those of `Attend`: q [b,h,i,d], k and v [b,g,j,d]. In a kernel M queries and N keys make
a tile; m and n are their positions, `head` is a query head.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

LOG2_E = constexpr(1.4426950408889634)  # GPUs raise 2 to a power, not e


class View(NamedTuple):
    """A tensor and its strides; one of 0 repeats numbers without a copy."""

    data: Tensor
    stride: tuple[int, ...]


class Inputs(NamedTuple):
    """What all kernels read. Each is compiled anew for a bias [b,h,i,j] or mask [b,j] of None.

    The mask is 0 or -inf: loads of single bytes would not be made ahead of their use.
    """

    q: View
    k: View
    v: View
    bias: View | None
    mask: View | None
    i: int
    j: int
    shared: int  # query heads for each key/value head
    scale: float


class Rows(NamedTuple):
    """What the backward kernels know of each query: dout [b,h,i,d], lse and delta [b,h,i]."""

    dout: View
    lse: View
    delta: View


@triton.jit
def _origin(x, b, head):
    """Address of [b,head,0,0]. In 64 bits: b h i j may exceed 2**31."""
    return x.data + b.to(tl.int64) * x.stride[0] + head.to(tl.int64) * x.stride[1]


@triton.jit
def _addresses(x, b, head, rows, length, D: constexpr, BLOCK_D: constexpr):
    """Those of rows of [b,head,length,D] as [rows,BLOCK_D], and which of them are inside."""
    column = tl.arange(0, BLOCK_D)[None, :]
    at = _origin(x, b, head) + rows.to(tl.int64)[:, None] * x.stride[2] + column
    inside = rows[:, None] < length
    if D < BLOCK_D:
        inside &= column < D
    return at, inside


@triton.jit
def _load(x, b, head, rows, length, D: constexpr, BLOCK_D: constexpr):
    at, inside = _addresses(x, b, head, rows, length, D, BLOCK_D)
    return tl.load(at, inside, 0.0)


@triton.jit
def _store(x, b, head, rows, length, value, D: constexpr, BLOCK_D: constexpr):
    at, inside = _addresses(x, b, head, rows, length, D, BLOCK_D)
    tl.store(at, value.to(x.data.dtype.element_ty), inside)


@triton.jit
def _products(x, y):
    """x [M,D], y [N,D] -> [M,N] in fp32."""
    return tl.dot(x, tl.trans(y), input_precision="ieee")


@triton.jit
def _offsets(x, b, head, m, n, CAUSAL: constexpr, EDGE: constexpr):
    """What is added to scaled products [M,N]: the bias, and -inf for keys that may not be attended.
    EDGE: some keys are beyond the last one, or hidden from some of these queries."""
    m, n, offsets = m[:, None], n[None, :], 0.0
    if x.bias is not None:
        row = tl.minimum(m, x.i - 1).to(tl.int64)  # beyond the last: unused, cheaper than a mask
        at = _origin(x.bias, b, head) + row * x.bias.stride[2] + n * x.bias.stride[3]
        offsets = tl.load(at, n < x.j, 0.0).to(tl.float32) if EDGE else tl.load(at).to(tl.float32)
    if EDGE:
        seen = n < x.j
        if CAUSAL:
            seen &= n <= m + (x.j - x.i)
        offsets = tl.where(seen, offsets, float("-inf"))
    return offsets


@triton.jit
def _mask(x, b, n):
    """What is added to the scores of keys n: 0 or -inf."""
    return tl.load(x.mask.data + b.to(tl.int64) * x.mask.stride[0] + n, n < x.j, 0.0)


@triton.jit
def _scores(x, q, k, offsets, b, n):
    """Logarithms of the weights [M,N] before they are normalised."""
    scores = _products(q, k) * x.scale + offsets
    if x.mask is not None:
        scores += _mask(x, b, n)[None, :]
    return scores


@triton.jit
def _keys_seen(x, first, CAUSAL: constexpr, M: constexpr, N: constexpr):
    """(whole, end) for the M queries from `first`: all see every key before `whole`, a multiple of
    N; none sees a key from `end` on."""
    whole, end = x.j, x.j
    if CAUSAL:
        hidden = first + x.j - x.i + 1  # the first key that the first query does not see
        whole = tl.minimum(tl.maximum(hidden, 0), x.j)
        end = tl.minimum(tl.maximum(hidden + M - 1, 0), x.j)
    return whole // N * N, end


@triton.jit
def _queries_seeing(x, first, CAUSAL: constexpr, M: constexpr, N: constexpr):
    """(begin, whole) for the N keys from `first`: no query before `begin` sees any, all from
    `whole` on see every one; both are multiples of M, or there are no queries from them on."""
    begin, whole = 0, 0
    if CAUSAL:
        sees = first - (x.j - x.i)  # the first query that sees the first key
        begin = tl.maximum(sees, 0) // M * M
        whole = (tl.maximum(sees + N - 1, 0) + M - 1) // M * M
    return begin, tl.minimum(tl.where(first + N > x.j, x.i, whole), x.i)


@triton.jit
def forward_kernel(
    x, out, lse, CAUSAL: constexpr, D: constexpr, BLOCK_D: constexpr, M: constexpr, N: constexpr
):
    """out [b,h,i,d]; lse [b,h,i], the base-2 logarithm of each row's sum of weights, is inf where
    there is nothing to attend: then the backward pass finds weights of 0.

    Programs (b, queries, h): what shares a bias runs side by side, the longest rows come first.
    """
    b, head = tl.program_id(0), tl.program_id(2)
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * M
    m = first + tl.arange(0, M)
    q = _load(x.q, b, head, m, x.i, D, BLOCK_D)
    peak = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    values = tl.zeros((M, BLOCK_D), tl.float32)
    whole, end = _keys_seen(x, first, CAUSAL, M, N)
    for EDGE in tl.static_range(2):
        for start in range(whole if EDGE else 0, end if EDGE else whole, N):
            n = start + tl.arange(0, N)
            k = _load(x.k, b, head // x.shared, n, x.j, D, BLOCK_D)
            v = _load(x.v, b, head // x.shared, n, x.j, D, BLOCK_D)
            offsets = _offsets(x, b, head, m, n, CAUSAL, EDGE)
            scores = _scores(x, q, k, offsets, b, n)
            higher = tl.maximum(peak, tl.max(scores, 1) * LOG2_E)
            base = tl.where(higher == float("-inf"), 0.0, higher)  # inf - inf is not a number
            weights = tl.exp2(scores * LOG2_E - base[:, None])
            decay = tl.exp2(peak - base)
            total = total * decay + tl.sum(weights, 1)
            values = tl.dot(weights.to(v.dtype), v, values * decay[:, None], input_precision="ieee")
            peak = higher
    alive = total > 0
    total = tl.where(alive, total, 1.0)
    _store(out, b, head, m, x.i, values / total[:, None], D, BLOCK_D)
    log_total = tl.where(alive, peak + tl.log2(total), float("inf"))
    tl.store(_origin(lse, b, head) + m, log_total, m < x.i)


@triton.jit
def dq_kernel(
    x, y, out, dq, CAUSAL: constexpr, D: constexpr, BLOCK_D: constexpr, M: constexpr, N: constexpr
):
    """dq [b,h,i,d], and for the kernels after it y.delta, the rows' sums of out * dout.

    Programs as in `forward_kernel`.
    """
    b, head = tl.program_id(0), tl.program_id(2)
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * M
    m = first + tl.arange(0, M)
    q = _load(x.q, b, head, m, x.i, D, BLOCK_D)
    do = _load(y.dout, b, head, m, x.i, D, BLOCK_D)
    o = _load(out, b, head, m, x.i, D, BLOCK_D)
    lse = tl.load(_origin(y.lse, b, head) + m, m < x.i, float("inf"))
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(_origin(y.delta, b, head) + m, delta, m < x.i)
    total = tl.zeros((M, BLOCK_D), tl.float32)
    whole, end = _keys_seen(x, first, CAUSAL, M, N)
    for EDGE in tl.static_range(2):
        for start in range(whole if EDGE else 0, end if EDGE else whole, N):
            n = start + tl.arange(0, N)
            k = _load(x.k, b, head // x.shared, n, x.j, D, BLOCK_D)
            v = _load(x.v, b, head // x.shared, n, x.j, D, BLOCK_D)
            offsets = _offsets(x, b, head, m, n, CAUSAL, EDGE)
            scores = _scores(x, q, k, offsets, b, n)
            weights = tl.exp2(scores * LOG2_E - lse[:, None])
            dscores = weights * (_products(do, v) - delta[:, None])
            total = tl.dot(dscores.to(k.dtype), k, total, input_precision="ieee")
    _store(dq, b, head, m, x.i, total * x.scale, D, BLOCK_D)


@triton.jit
def dkv_kernel(
    x, y, dk, dv, heads,
    CAUSAL: constexpr, D: constexpr, BLOCK_D: constexpr, M: constexpr, N: constexpr,
):  # fmt: skip
    """dk, dv [b,h/heads,j,d], each summed over `heads` query heads.

    Programs (b, keys, h/heads): the keys that most queries see come first. Tiles are [M,N], and
    weights are turned for the last products: a bias read as [N,M] costs more than that.
    """
    b, part = tl.program_id(0), tl.program_id(2)
    first = tl.program_id(1) * N
    n = first + tl.arange(0, N)
    k = _load(x.k, b, part * heads // x.shared, n, x.j, D, BLOCK_D)
    v = _load(x.v, b, part * heads // x.shared, n, x.j, D, BLOCK_D)
    k_total = tl.zeros((N, BLOCK_D), tl.float32)
    v_total = tl.zeros((N, BLOCK_D), tl.float32)
    begin, whole = _queries_seeing(x, first, CAUSAL, M, N)
    for each in range(heads):
        head = part * heads + each
        for EDGE in tl.static_range(2):
            for start in range(begin if EDGE else whole, whole if EDGE else x.i, M):
                m = start + tl.arange(0, M)
                q = _load(x.q, b, head, m, x.i, D, BLOCK_D)
                do = _load(y.dout, b, head, m, x.i, D, BLOCK_D)
                lse = tl.load(_origin(y.lse, b, head) + m, m < x.i, float("inf"))
                delta = tl.load(_origin(y.delta, b, head) + m, m < x.i, 0.0)
                offsets = _offsets(x, b, head, m, n, CAUSAL, EDGE)
                scores = _products(q, k) * x.scale + offsets
                weights = tl.exp2(scores * LOG2_E - lse[:, None])
                turned = tl.trans(weights.to(do.dtype))
                v_total = tl.dot(turned, do, v_total, input_precision="ieee")
                dscores = weights * (_products(do, v) - delta[:, None])
                turned = tl.trans(dscores.to(q.dtype))
                k_total = tl.dot(turned, q, k_total, input_precision="ieee")
    if x.mask is not None:  # what hidden keys have gathered concerns no other key: dropped once
        shown = _mask(x, b, n)[:, None] == 0
        k_total, v_total = tl.where(shown, k_total, 0.0), tl.where(shown, v_total, 0.0)
    _store(dk, b, part, n, x.j, k_total * x.scale, D, BLOCK_D)
    _store(dv, b, part, n, x.j, v_total, D, BLOCK_D)


@triton.jit
def dbias_kernel(
    x, y, dbias, heads, same_b, same_h,
    CAUSAL: constexpr, D: constexpr, BLOCK_D: constexpr, M: constexpr, N: constexpr,
):  # fmt: skip
    """dbias [b/same_b,heads,i,j], each number summed over same_b rows of a batch x same_h heads.

    Programs (keys, queries, b/same_b x heads); those of keys that no query sees write zeros.
    """
    first_n, first_m = tl.program_id(0) * N, tl.program_id(1) * M
    n, m = first_n + tl.arange(0, N), first_m + tl.arange(0, M)
    bias_b, bias_h = tl.program_id(2) // heads, tl.program_id(2) % heads
    begin, _ = _queries_seeing(x, first_n, CAUSAL, M, N)
    offsets = _offsets(x, bias_b, bias_h, m, n, CAUSAL, True)
    total = tl.zeros((M, N), tl.float32)
    for each in range(tl.where(first_m < begin, 0, same_b * same_h)):
        b, head = bias_b + each // same_h, bias_h + each % same_h
        q = _load(x.q, b, head, m, x.i, D, BLOCK_D)
        do = _load(y.dout, b, head, m, x.i, D, BLOCK_D)
        k = _load(x.k, b, head // x.shared, n, x.j, D, BLOCK_D)
        v = _load(x.v, b, head // x.shared, n, x.j, D, BLOCK_D)
        lse = tl.load(_origin(y.lse, b, head) + m, m < x.i, float("inf"))
        delta = tl.load(_origin(y.delta, b, head) + m, m < x.i, 0.0)
        scores = _scores(x, q, k, offsets, b, n)
        weights = tl.exp2(scores * LOG2_E - lse[:, None])
        total += weights * (_products(do, v) - delta[:, None])
    at = _origin(dbias, bias_b, bias_h) + n[None, :]
    at += m.to(tl.int64)[:, None] * x.j
    tl.store(at, total.to(dbias.data.dtype.element_ty), (m[:, None] < x.i) & (n[None, :] < x.j))
