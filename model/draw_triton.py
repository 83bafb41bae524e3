"""What is before and after the layers of a decoding step, in two Triton kernels: ids become
embeddings, and logits become codes."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from model.decode_triton import runs_ahead, wait
from model.drawing import EMPTY, Rows, Sampling
from model.layouts import IGNORE, PAD, Layout


@triton.jit
def _begin(
    ids, table, frequencies, positions, first, prompt_frames, num_frames, step,
    x, sums, cos, sin, starts, num_slots, dim, half, per_frame, delay, capacity,
    AHEAD: tl.constexpr, C: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Embeddings, angles, first places. It does not wait as the others do: it is launched when the
    step before is over (no launch_pdl), and what follows it counts on that."""
    if AHEAD:
        gdc_launch_dependents()
    clip, c, pair = tl.program_id(0), tl.arange(0, C), tl.arange(0, HALF)
    total = tl.zeros([C], tl.float32)
    for slot in range(num_slots):
        token = tl.load(ids + clip * num_slots + slot)
        total += tl.load(table + token * dim + c, c < dim, 0.0).to(tl.float32)
    total = total.to(x.dtype.element_ty)
    tl.store(x + clip.to(tl.int64) * dim + c, total, c < dim)
    wide = total.to(tl.float32)
    tl.store(sums + clip, tl.sum(wide * wide))
    position, some = tl.load(positions + clip), pair < half
    tl.debug_barrier()  # every warp has read it
    tl.store(positions + clip, position + 1)
    angle = position * tl.load(frequencies + pair, some, 0.0)
    tl.store(cos + clip * half + pair, tl.cos(angle), some)
    tl.store(sin + clip * half + pair, tl.sin(angle), some)
    left = tl.load(num_frames + clip) - tl.load(prompt_frames + clip)
    begins = tl.load(first + clip)
    ended = left <= tl.load(step) // per_frame - delay
    tl.store(starts + clip, tl.where(ended, capacity, begins))


@triton.jit
def _largest(keys, weights, least):
    """The largest key such that the weights of those at it or above sum to `least` or more."""
    found = tl.full([1], 0, tl.uint32)
    for n in tl.static_range(32):
        tried = found | (1 << (31 - n))
        enough = tl.sum(tl.where(keys >= tried, weights, 0.0)) >= least
        found = tl.where(enough, tried, found)
    return found


@triton.jit
def _draw(
    logits, known, uniform, drawn, ids, step, prompt_frames, min_frames, num_frames, firsts,
    classes, width, num_steps, num_slots, first_head, eos, per_frame,
    temperature, top_k, top_p, min_p,
    AHEAD: tl.constexpr,
    GREEDY: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr,
    EMPTY: tl.constexpr, IGNORE: tl.constexpr, PAD: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """`filter_logits`, `draw` and the rest of `Rows.draw` for a slot of each clip. EOS, which only
    slot 0 can draw, ends no frame that another slot is at in the same step."""
    if AHEAD:
        wait()
    clip, slot, c = tl.program_id(0), tl.program_id(1), tl.arange(0, C)
    head = first_head + slot
    now = tl.load(step)
    frame = tl.load(prompt_frames + clip) + now // per_frame - slot
    at_x = logits + (clip * num_slots + slot).to(tl.int64) * width + c
    x = tl.load(at_x, c < tl.load(classes + head), float("-inf")).to(tl.float32)
    barred = (head == 0) & (frame < tl.load(min_frames + clip))
    x = tl.where((c == eos) & barred, float("-inf"), x)
    at = (clip * num_steps + now) * num_slots + slot
    if GREEDY:
        code = tl.argmax(x, axis=0).to(tl.int64)
    else:
        x /= temperature
        bits = x.to(tl.int32, bitcast=True)  # as integers that are in the order of the floats
        keys = tl.where(bits < 0, ~bits, bits ^ (-2147483648)).to(tl.uint32, bitcast=True)
        if TOP_K:
            x = tl.where(
                keys >= _largest(keys, tl.full([C], 1.0, tl.float32), top_k), x, float("-inf")
            )
        likely = tl.exp(x - tl.max(x, axis=0))
        if TOP_P:
            least = _largest(keys, likely, top_p * tl.sum(likely))
            likely = tl.where(keys >= least, likely, 0.0)
        if MIN_P:
            likely = tl.where(likely >= min_p, likely, 0.0)
        cumulative = tl.cumsum(likely, axis=0)
        threshold = tl.load(uniform + at) * tl.sum(likely)
        # the sum and the scan may round differently: then the last class that can be drawn
        able = likely > 0
        last = tl.max(tl.where(able, c, -1), axis=0)
        code = tl.min(tl.where(able & (cumulative > threshold), c, last), axis=0).to(tl.int64)
    given = tl.load(known + at)
    code = tl.where(given == IGNORE, code, given)
    frames = tl.load(num_frames + clip)
    if (head == 0) & (code == eos) & (frame < frames):
        frames = frame
        tl.store(num_frames + clip, frames)
    code = tl.where((frame < 0) | (frame >= frames), EMPTY, code)
    tl.store(drawn + at, code)
    tl.store(ids + clip * num_slots + slot, tl.where(code < 0, PAD, code + tl.load(firsts + head)))


def _per_frame(layout: Layout) -> int:
    return layout.num_codebooks if layout.pattern == "flatten" else 1


def begin_step(
    layout: Layout,
    ids: Tensor,
    table: Tensor,
    frequencies: Tensor,
    positions: Tensor,
    first: Tensor,
    rows: Rows,
    capacity: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], Tensor]:
    """ids [B,S], table [num_ids,C], positions [B], which are counted up -> x [B,C]; the sums [B,1]
    of its squares; cos, sin [B,D/2]; the first place [B] that each clip sees: `first`, or none
    before the new one, if it has ended."""
    (B, S), dim, half = ids.shape, table.shape[1], frequencies.numel()
    x, starts = table.new_empty(B, dim, dtype=dtype), torch.empty_like(first)
    sums, cos, sin = (frequencies.new_empty(B, n) for n in (1, half, half))
    _begin[(B,)](
        ids, table, frequencies, positions, first, rows.prompt_frames, rows.num_frames, rows.step,
        x, sums, cos, sin, starts, S, dim, half, _per_frame(layout), S - 1, capacity,
        AHEAD=runs_ahead(x), C=triton.next_power_of_2(dim), HALF=triton.next_power_of_2(half),
    )  # fmt: skip
    return x, sums, (cos, sin), starts


def draw_codes(
    layout: Layout,
    logits: Tensor,
    rows: Rows,
    head: int,
    sampling: Sampling,
    ids: Tensor,
    firsts: Tensor,
    classes: Tensor,
) -> None:
    """`Rows.draw` and `to_ids` from logits [B,S,W] of heads `head` and on, in place; the step is
    not counted. classes [K]: how many of W each head has."""
    B, S, width = logits.shape
    ahead = runs_ahead(logits)
    _draw[(B, S)](
        logits, rows.known, rows.uniform, rows.drawn, ids, rows.step, rows.prompt_frames,
        rows.min_frames, rows.num_frames, firsts, classes, width, rows.num_steps, S, head,
        layout.eos, _per_frame(layout),
        sampling.temperature, float(sampling.top_k), sampling.top_p, sampling.min_p,
        AHEAD=ahead, GREEDY=sampling.temperature == 0, TOP_K=0 < sampling.top_k < width,
        TOP_P=sampling.top_p < 1, MIN_P=sampling.min_p > 0,
        EMPTY=EMPTY, IGNORE=IGNORE, PAD=PAD, C=triton.next_power_of_2(width), launch_pdl=ahead,
    )  # fmt: skip
