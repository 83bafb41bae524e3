"""A decoding step in Triton: what one new place for each clip takes, five launches a layer.

With one query a clip every weight and every key is read once and used a few times, so a step is as
fast as memory is read and as kernels are few. Hence norms, gates and residuals are computed where
the products are, and the keys of one clip are divided among many programs (flash-decoding, Dao et
al. 2023), of which the last puts the parts together. Lengths are read on the GPU: nothing here
depends on a number that the host knows, so a step can be captured as a CUDA graph and replayed at
any length.

From Hopper on a kernel is launched while the one before it still runs, and reads or fetches its
weights until what it computes from has been written (`wait`): memory is never idle between them.
The sums of squares that a norm needs are left behind, in parts, by the kernel that writes the row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from model.fused import EPS

# Clips up to so many -> of `_product`, without gates and with: rows in a tile, outputs, inputs at a
# time, warps, loads in flight. Half as many inputs in fp32. (Of several dozen tried on an H200.)
TILES = {
    16: ((16, 32, 256, 4, 5), (16, 32, 256, 4, 5)),
    64: ((64, 16, 256, 4, 4), (64, 32, 128, 4, 4)),
    1 << 30: ((64, 64, 128, 4, 4), (128, 64, 64, 8, 4)),
}
ROOM = 200 * 1024  # bytes of shared memory that TILES count on; with less there are 2 in flight
KEYS = (16 * 1024, 4, 2)  # bytes of keys at a time, warps, loads in flight of `_attend`
SPLITS = 16  # programs that share the keys of a clip, if there are programs too few
PROGRAMS = 256  # enough of them
AHEAD_KEYS = tl.constexpr(128)  # that a program of `_attend` fetches before it knows the queries
HEAD_EPS = tl.constexpr(torch.finfo(torch.float32).eps)  # that F.rms_norm takes in `HeadNorm`


@triton.jit
def wait():
    """Let the next kernel be launched, and wait for what the last one writes (programmatic
    dependent launch). Before it only weights may be read, and what former steps have written: a
    step's first kernel, `_begin`, is launched when all of those are over."""
    gdc_launch_dependents()
    gdc_wait()


@triton.jit
def _prefetch(at):
    """Into the L2 cache: the lines of 128 bytes at these addresses."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at.to(tl.int64)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _fetch(
    weight, column, num_outputs, num_inputs,
    GATED: tl.constexpr, LINE: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """The rows of weight that `_product` will read, in lines of LINE numbers."""
    line = tl.minimum(tl.arange(0, LINES) * LINE, num_inputs - 1)[None, :]
    row = tl.minimum(column, num_outputs - 1).to(tl.int64)[:, None]
    _prefetch(weight + row * num_inputs + line)
    if GATED:
        _prefetch(weight + (num_outputs + row) * num_inputs + line)


@triton.jit
def _tiles(
    at_x, at_w, of_values, some, num_inputs,
    GATED: tl.constexpr, B: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Rows at at_x [B,1] times rows at at_w [N,1] and, if GATED, those `of_values` behind; some:
    which of them there are."""
    total, values = tl.zeros([B, N], tl.float32), tl.zeros([B, N], tl.float32)
    for begin in range(0, num_inputs, K):
        k = begin + tl.arange(0, K)[None, :]
        inside = k < num_inputs
        read = tl.load(at_x + k, some[0] & inside, 0.0)  # [B,K]
        w = tl.load(at_w + k, some[1] & inside, 0.0)  # [N,K]
        total = tl.dot(read, w.T, total, input_precision="ieee")
        if GATED:
            w = tl.load(at_w + of_values + k, some[1] & inside, 0.0)
            values = tl.dot(read, w.T, values, input_precision="ieee")
    return total, values


@triton.jit
def _product(
    x, sums, weight, out, out_sums, num_rows, num_outputs, num_inputs, num_sums, eps,
    NORM: tl.constexpr, GATED: tl.constexpr, ADD: tl.constexpr, AHEAD: tl.constexpr,
    B: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SUMS: tl.constexpr,
    LINE: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """out [b,n] = (or +=) x [b,k] weight [n,k]^T. NORM: of x divided by its RMS, with the sums of
    its squares in `sums` [b,num_sums]; ADD leaves those of out, one a program. GATED: weight
    [2n,k] gives gates and values, of which out is silu(gate) value."""
    row = tl.program_id(1) * B + tl.arange(0, B)
    column = tl.program_id(0) * N + tl.arange(0, N)
    wanted, there = column < num_outputs, row < num_rows
    both = there[:, None] & wanted[None, :]
    at_x = x + row[:, None].to(tl.int64) * num_inputs
    at_w = weight + column[:, None].to(tl.int64) * num_inputs
    of_values = num_outputs.to(tl.int64) * num_inputs
    to = out + row[:, None].to(tl.int64) * num_outputs + column[None, :]
    if B == 1:  # all at once, and before x is known
        k = tl.arange(0, K)[None, :]
        inside = wanted[:, None] & (k < num_inputs)
        gate = tl.load(at_w + k, inside, 0.0)  # [N,K]
        if GATED:
            value = tl.load(at_w + of_values + k, inside, 0.0)
    elif AHEAD:
        _fetch(weight, column, num_outputs, num_inputs, GATED, LINE, LINES)
    if AHEAD:
        wait()
    if NORM:  # loaded early, added late: their way takes as long as that of x
        part = tl.arange(0, SUMS)[None, :]
        at = sums + row[:, None] * num_sums + part
        squares = tl.load(at, there[:, None] & (part < num_sums), 0.0)
    if ADD:
        old = tl.load(to, both, 0.0).to(tl.float32)
    if B == 1:
        read = tl.load(at_x + k, k < num_inputs, 0.0).to(tl.float32)
        total = tl.sum(read * gate.to(tl.float32), axis=1)[None, :]
        if GATED:
            values = tl.sum(read * value.to(tl.float32), axis=1)[None, :]
    else:
        some = there[:, None], wanted[:, None]
        total, values = _tiles(at_x, at_w, of_values, some, num_inputs, GATED, B, N, K)
    if NORM:
        scale = tl.rsqrt(tl.sum(squares, axis=1) / num_inputs + eps)[:, None]
        total *= scale
        if GATED:
            values *= scale
    if GATED:
        total = total * tl.sigmoid(total) * values
    if ADD:
        total = (total + old).to(out.dtype.element_ty)  # as it will be read
        kept = tl.where(both, total.to(tl.float32), 0.0)
        of_row = out_sums + row * tl.num_programs(0) + tl.program_id(0)
        tl.store(of_row, tl.sum(kept * kept, axis=1), there)
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
def _merged(parts, lse, some, inside, shared, width, PARTS: tl.constexpr):
    """Attention [M,D] over all keys from parts that others have just written: past the L1 cache."""
    most = tl.full([inside.shape[0]], float("-inf"), tl.float32)
    for part in tl.static_range(PARTS):
        logs = tl.load(lse + part * shared, some, 0.0, cache_modifier=".cg")
        most = tl.maximum(most, logs)
    total, weight = tl.zeros(inside.shape, tl.float32), tl.zeros([inside.shape[0]], tl.float32)
    for part in tl.static_range(PARTS):
        read = tl.load(parts + part * shared * width, inside, 0.0, cache_modifier=".cg")
        logs = tl.load(lse + part * shared, some, 0.0, cache_modifier=".cg")
        share = tl.exp(logs - most)
        weight += share
        total += share[:, None] * read
    return total / weight[:, None]


@triton.jit
def _over(
    q1, q2, k, v, begin, end, most, weight, total, half, N: tl.constexpr, HALF: tl.constexpr
):  # fmt: skip
    """Queries, in halves [M,HALF], over keys `begin` to `end`: the largest score, the sum of all
    weights [M] and of the values by them [M,2*HALF], further than they were."""
    pair, d, width = tl.arange(0, HALF), tl.arange(0, 2 * HALF), 2 * half
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
    return most, weight, total


@triton.jit
def _attend(
    qkv, cos, sin, q_gain, k_gain, cache_k, cache_v, place, first, out, parts, lse, num_done,
    num_kv, shared, half, capacity, scale,
    NORM: tl.constexpr, AHEAD: tl.constexpr, PARTS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, HALF: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    """The heads that share keys, over a part of those keys; the last part has the new one, which it
    also writes to the cache. PARTS > 1: parts of the output, each with its log-sum, which the
    program that is done last puts together; num_done [groups] is zero before and after."""
    group, part = tl.program_id(0), tl.program_id(1)
    clip, g = group // num_kv, group % num_kv
    length = tl.load(place).to(tl.int32)
    width = 2 * half
    k = cache_k + group.to(tl.int64) * capacity * width
    v = cache_v + group.to(tl.int64) * capacity * width
    if AHEAD:  # some of this in vain, where a clip is padded or has ended
        line = tl.arange(0, AHEAD_KEYS * 2 * HALF // LINE) * LINE
        line = tl.minimum(line + part * tl.cdiv(length, PARTS) * width, length * width)
        _prefetch(k + line)
        _prefetch(v + line)
        wait()
    begin = tl.load(first + clip).to(tl.int32)
    each = tl.cdiv(tl.maximum(length - begin, 0), PARTS)
    begin += part * each
    end = tl.minimum(begin + each, length)
    head, pair, d = tl.arange(0, M), tl.arange(0, HALF), tl.arange(0, 2 * HALF)
    in_q = (head < shared)[:, None] & (pair < half)[None, :]
    c = tl.load(cos + clip * half + pair, pair < half, 0.0)[None, :]
    s = tl.load(sin + clip * half + pair, pair < half, 0.0)[None, :]
    row = qkv + clip.to(tl.int64) * (num_kv * (shared + 2)) * width
    at_q = row + (g * shared + head)[:, None] * width
    q1, q2 = _turned(at_q + pair[None, :], q_gain, c, s, half, in_q, NORM)
    q1, q2 = (q1 * scale).to(cache_k.dtype.element_ty), (q2 * scale).to(cache_k.dtype.element_ty)
    most, weight = tl.full([M], float("-inf"), tl.float32), tl.zeros([M], tl.float32)
    total = tl.zeros([M, 2 * HALF], tl.float32)
    if part == PARTS - 1:  # the new key: of no tile, for nobody else has it yet
        new = row + (num_kv * shared + g) * width
        of_value = new + num_kv * width
        k1, k2, value = _keep(new, of_value, k, v, k_gain, c, s, length, half, NORM, HALF)
        both = q1.to(tl.float32) * k1.to(tl.float32) + q2.to(tl.float32) * k2.to(tl.float32)
        most, weight = tl.sum(both, axis=1), weight + 1
        total += value.to(tl.float32)[None, :]
    most, weight, total = _over(q1, q2, k, v, begin, end, most, weight, total, half, N=N, HALF=HALF)
    total /= tl.where(weight > 0, weight, 1.0)[:, None]  # a part may have no keys
    inside = (head < shared)[:, None] & (d < width)[None, :]
    of_out = head[:, None] * width + d[None, :]
    to = out + group.to(tl.int64) * shared * width + of_out
    if PARTS == 1:
        tl.store(to, total, inside)
    else:
        logs = tl.where(weight > 0, most + tl.log(weight), float("-inf"))
        lse += group * PARTS * shared + head
        parts += group.to(tl.int64) * PARTS * shared * width + of_out
        tl.store(lse + part * shared, logs, head < shared)
        tl.store(parts + part * shared * width, total, inside)
        tl.debug_barrier()  # all threads have written before one of them says so
        if tl.atomic_add(num_done + group, 1) == PARTS - 1:
            tl.store(num_done + group, 0)
            tl.store(to, _merged(parts, lse, head < shared, inside, shared, width, PARTS), inside)


def runs_ahead(x: Tensor) -> bool:
    """Whether x is on a GPU with programmatic dependent launch."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)


def has_room(x: Tensor) -> bool:
    """Whether a program has shared memory as on Hopper; others, newer ones too, have half of it."""
    if not x.is_cuda:
        return True
    properties = torch.cuda.get_device_properties(x.device)
    return properties.shared_memory_per_block_optin >= ROOM


def tile_of(B: int, num_inputs: int, size: int, gated: bool, room: bool) -> tuple[int, ...]:
    """As TILES has them, for x [B,num_inputs] of `size` bytes a number."""
    most = triton.next_power_of_2(num_inputs)
    if B == 1:  # what a thread holds of weights is bounded
        row = most * size  # bytes
        if gated:
            return 1, max(1, min(4, 16384 // row)), most, min(16, max(4, row // 4096)), 1
        return 1, max(1, min(8, 65536 // row)), most, min(16, max(8, row // 8192)), 1
    rows, outputs, inputs, warps, stages = next(t for n, t in TILES.items() if n >= B)[gated]
    return rows, outputs, min(inputs * 2 // size, max(16, most)), warps, stages if room else 2


def _launch(
    x: Tensor,
    sums: Tensor | None,
    weight: Tensor,
    out: Tensor,
    out_sums: Tensor | None,
    gated: bool = False,
) -> Tensor:
    (B, num_inputs), num_outputs, size = x.shape, out.shape[1], x.element_size()
    rows, columns, inputs, warps, stages = tile_of(B, num_inputs, size, gated, has_room(x))
    grid = (triton.cdiv(num_outputs, columns), triton.cdiv(B, rows))
    num_sums, ahead = 1 if sums is None else sums.shape[1], runs_ahead(x)
    _product[grid](
        x, sums, weight, out, out_sums, B, num_outputs, num_inputs, num_sums, EPS,
        NORM=sums is not None, GATED=gated, ADD=out_sums is not None, AHEAD=ahead,
        B=rows, N=columns, K=inputs, SUMS=triton.next_power_of_2(num_sums),
        LINE=128 // size, LINES=triton.next_power_of_2(triton.cdiv(num_inputs * size, 128)),
        num_warps=warps, num_stages=stages, launch_pdl=ahead,
    )  # fmt: skip
    return out


def norm_linear(x: Tensor, sums: Tensor, weight: Tensor) -> Tensor:
    """x [B,C] divided by its root mean square, weight [N,C] -> [B,N]. sums [B,P] of x's squares."""
    return _launch(x, sums, weight, x.new_empty(x.shape[0], weight.shape[0]), None)


def norm_swiglu(x: Tensor, sums: Tensor, weight: Tensor) -> Tensor:
    """x [B,C] divided by its root mean square, gates and values weight [2F,C] -> [B,F]."""
    return _launch(x, sums, weight, x.new_empty(x.shape[0], weight.shape[0] // 2), None, gated=True)


def add_linear(onto: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """onto [B,C] += x [B,F] weight [C,F]^T, in place -> the sums [B,P] of onto's squares."""
    tile = tile_of(*x.shape, x.element_size(), False, has_room(x))
    num_programs = triton.cdiv(onto.shape[1], tile[1])
    sums = onto.new_empty(len(onto), num_programs, dtype=torch.float32)
    _launch(x, None, weight, onto, sums)
    return sums


def keys_of(half: int, size: int) -> int:
    """Keys of 2 x half numbers of `size` bytes that `_attend` takes at a time."""
    return max(16, min(128, KEYS[0] // (2 * half * size)))


def attend_new(
    qkv: Tensor,
    angles: tuple[Tensor, Tensor],
    gains: tuple[Tensor, Tensor] | None,
    cache: tuple[Tensor, Tensor],
    place: Tensor,
    first: Tensor,
    num_done: Tensor,
) -> Tensor:
    """qkv [B,H+2G,D] of a new place, cos and sin [B,D/2] -> attention [B,H*D].

    cache: k, v [B,G,J,D], whose places from first [B] on, before `place` [1], the queries see; the
    new key and value become its place `place`. gains: of queries and keys, where they are
    normalised. Integers are int32 or int64, on the device; num_done [B*G] int32, zeros.
    """
    k, v = cache
    (B, G, capacity, D), (_, heads, _) = k.shape, qkv.shape
    num_heads = heads - 2 * G
    shared, half = num_heads // G, D // 2
    num_parts = max(1, min(SPLITS, triton.next_power_of_2(triton.cdiv(PROGRAMS, B * G))))
    out = qkv.new_empty(B, num_heads * D)
    parts = lse = None
    if num_parts > 1:
        parts = qkv.new_empty(B * G, num_parts, shared, D, dtype=torch.float32)
        lse = parts.new_empty(B * G, num_parts, shared)
    M, HALF = max(16, triton.next_power_of_2(shared)), max(16, triton.next_power_of_2(half))
    keys, warps, stages = keys_of(HALF, qkv.element_size()), *KEYS[1:]
    ahead = runs_ahead(qkv)
    _attend[(B * G, num_parts)](
        qkv, *angles, *(gains or (qkv, qkv)), k, v, place, first, out, parts, lse, num_done,
        G, shared, half, capacity, D**-0.5,
        NORM=gains is not None, AHEAD=ahead, PARTS=num_parts, M=M, N=keys, HALF=HALF,
        LINE=128 // qkv.element_size(), num_warps=warps, num_stages=stages, launch_pdl=ahead,
    )  # fmt: skip
    return out
