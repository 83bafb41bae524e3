"""Decoding with a cache: the prompt at one go, then a step for each new place.

A step changes nothing but tensors that stay where they are, and asks the device nothing. So it can
be captured as a CUDA graph, which launches some hundred kernels as one: on a GPU the time between
kernels would otherwise be most of a step. `choose_decoding` says at start-up which way is taken;
both are the same steps, and `model/sampling.py` has the slow loop that they are tested against.
"""

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import fields

import torch
import torch.nn.functional as F
from torch import Tensor

from model.backends import capability_of, missing_for_triton
from model.captured import Captured
from model.drawing import EMPTY, Rows, Sampling, completes, first_ids, frame_of, to_ids
from model.layouts import IGNORE
from model.stages import Stage
from model.transformer import rotary_frequencies

NUM_KEPT = 2  # captured decoders of a stage: each holds a cache
BEHIND = 2  # frames that the host may be behind a captured decoder, which so never waits for it
Finished = list[tuple[Tensor, int]]  # for each clip the codes drawn [steps,S], its frames


def choose_decoding(wanted: str, device: torch.device) -> tuple[str, str]:
    """("plain", "triton" or "captured"; why). ValueError: asked for, but cannot be."""
    if wanted == "plain":
        return wanted, "as configured"
    missing = missing_for_triton(device.type, capability_of(device))
    if wanted == "auto":
        if missing:
            return "plain", f"captured steps need {' and '.join(missing)}"
        return "captured", "a step is launched as one graph"
    if missing:
        raise ValueError(f"decoding={wanted} needs {' and '.join(missing)}; take plain")
    return wanted, "as configured"


class Decoder:
    """The state of a batch between steps: cache, last ids, positions, rows.

    how: "plain" goes through the modules that are trained; "triton" through the kernels of
    `decode_triton`; "captured" replays those.
    """

    def __init__(
        self, stage: Stage, batch_size: int, capacity: int, sampling: Sampling, how: str = "plain"
    ):
        self.stage, self.layout, self.sampling, self.how = stage, stage.layout, sampling, how
        self.cache = stage.transformer.make_cache(batch_size, capacity)
        dtype, device = self.cache.dtype, self.cache.device
        B, S = batch_size, self.layout.num_slots
        self.table = stage.embed.weight + stage.embed_stream(stage.stream_of)  # [num_ids,dim]
        self.heads = [head.weight.to(dtype) for head in stage.heads]
        blocks = [] if how == "plain" else stage.transformer.blocks
        self.layers = [_weights(block, dtype) for block in blocks]
        sizes = self.layout.head_sizes
        self.num_classes = torch.tensor(sizes, device=device)
        width = -(-max(sizes) // 16) * 16  # rows of logits that are read 16 bytes at a time
        padded = [F.pad(head, (0, 0, 0, width - len(head))) for head in self.heads if blocks]
        self.all_heads = torch.stack(padded) if blocks else None  # [K,W,dim]
        self.firsts, c = first_ids(self.layout).to(device), stage.transformer.config
        self.frequencies = rotary_frequencies(c.head_dim, c.rotary_base, device)
        self.ids = torch.zeros(B, S, dtype=torch.long, device=device)
        self.positions = torch.zeros(B, device=device)
        # the place that the next token takes in the cache, and its step
        self.clock = torch.zeros(2, dtype=torch.long, device=device)
        self.first = torch.zeros(B, dtype=torch.int32, device=device)  # that is not padding
        self.num_done = torch.zeros(B * c.num_kv_heads, dtype=torch.int32, device=device)
        self.mask, self.rows = None, None  # the mask of "plain" alone
        if how == "captured":
            self.rows = _empty_rows(B, capacity, S, device)
            self.rows.step = self.clock[1:]
            self.replay = Captured(self._step)

    def begin(self, rows: Rows, ids: Tensor, positions: Tensor, mask: Tensor | None) -> None:
        """Read the prompts, ids [B,N,S], and draw the first step. Fewer rows than the decoder has
        leave the others without a step to go."""
        n, length = ids.shape[:2]
        if self.how == "captured":
            _fill(self.rows, rows)
        else:
            self.rows, rows.step = rows, self.clock[1:]
        self.cache.length = 0
        part = self.cache.first_rows(n)
        hidden = self.stage.hidden(ids, positions, mask, part)[:, -1]  # [B,dim]
        self.cache.length = length
        self.clock[0] = length
        self.positions[:n] = positions[:, -1] + 1
        self.first.zero_()
        if mask is not None and self.how == "plain":
            more = mask.new_ones(n, self.cache.max_length - length)
            self.mask = torch.cat([mask, more], dim=1)
        elif mask is not None:
            self.first[:n] = (~mask).sum(dim=1)
        hidden = F.pad(hidden, (0, 0, 0, len(self.ids) - n))
        self._draw(hidden, 0)

    def advance(self, step: int) -> None:
        """Feed what the last step drew, and draw the codes of `step`."""
        head = step % self.layout.num_codebooks if self.layout.pattern == "flatten" else 0
        if self.how == "captured":
            self.replay(head)
        else:
            self._step(head)
        if self.how != "plain":
            self.cache.advance(1)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone, [B] bool."""
        self.cache.keep(rows)
        self.rows = self.rows.only(rows)
        self.ids, self.positions = self.ids[rows], self.positions[rows]
        self.first = self.first[rows]
        self.mask = None if self.mask is None else self.mask[rows]

    def _step(self, head: int) -> dict[str, Tensor]:
        if self.how == "plain":
            self._draw(self._plain(), head)
        else:
            self._fused(head)
        return {}

    def _draw(self, hidden: Tensor, head: int) -> None:
        def logits_of(k: int) -> Tensor:
            return F.linear(hidden, self.heads[k])

        codes = self.rows.draw(self.layout, logits_of, head, self.sampling)
        self.ids.copy_(to_ids(self.layout, codes, head, self.firsts))

    def _plain(self) -> Tensor:
        seen = None if self.mask is None else self.mask[:, : self.cache.length + 1]
        x = F.embedding(self.ids, self.table).sum(dim=1, keepdim=True)  # [B,1,dim]
        hidden = self.stage.transformer(x, self.positions[:, None], seen, self.cache)[:, 0]
        self.positions += 1
        return hidden

    def _fused(self, head: int) -> None:
        from model import decode_triton as kernels  # here: not every machine has Triton
        from model.draw_triton import begin_step, draw_codes

        where = (self.ids, self.table, self.frequencies, self.positions, self.first, self.rows)
        x, sums, angles, first = begin_step(
            self.layout, *where, self.cache.max_length, self.cache.dtype
        )
        for layer, (to_qkv, to_out, to_gate_value, ff_out, gains) in enumerate(self.layers):
            cache = self.cache.k[layer], self.cache.v[layer]
            qkv = kernels.norm_linear(x, sums, to_qkv).unflatten(-1, (-1, self.cache.head_dim))
            where = (cache, self.clock[:1], first, self.num_done)
            out = kernels.attend_new(qkv, angles, gains, *where)
            sums = kernels.add_linear(x, out, to_out)
            sums = kernels.add_linear(x, kernels.norm_swiglu(x, sums, to_gate_value), ff_out)
        heads = self.all_heads[head:][: self.layout.num_slots]
        logits = kernels.norm_linear(x, sums, heads.flatten(0, 1)).unflatten(-1, heads.shape[:2])
        where = (self.sampling, self.ids, self.firsts, self.num_classes)
        draw_codes(self.layout, logits, self.rows, head, *where)
        self.clock += 1


def _weights(block: torch.nn.Module, dtype: torch.dtype) -> tuple:
    attention, ff = block.attention, block.feed_forward
    modules = (attention.to_qkv, attention.to_out, ff.to_gate_value, ff.to_out)
    norm = attention.norm
    gains = None if norm is None else (norm.q_gain, norm.k_gain)
    return *(module.weight.to(dtype) for module in modules), gains


def _empty_rows(B: int, steps: int, S: int, device: torch.device) -> Rows:
    """Rows of which none has anything to draw."""
    one, many = torch.zeros(B, dtype=torch.long), torch.zeros(B, steps, S)
    known, drawn = many.long() + IGNORE, many.long() + EMPTY
    rows = Rows(one, one.clone(), one.clone(), known, many, drawn, one[:1].clone())
    return rows.to(device)


def _fill(buffers: Rows, rows: Rows) -> None:
    """Put rows into larger buffers, where they stay."""
    empty = {"known": IGNORE, "drawn": EMPTY}
    for field in fields(Rows):
        buffer, value = getattr(buffers, field.name), getattr(rows, field.name)
        buffer.fill_(empty.get(field.name, 0))
        buffer[tuple(slice(n) for n in value.shape)] = value


def use_decoding(stage: Stage, how: str) -> None:
    """`how` as `choose_decoding` gave it."""
    if isinstance(stage.decoding, Decoders):
        stage.decoding.forget(all_but=0)
    stage.decoding = Decoders() if how == "captured" else how
    stage.transformer.use_kernels("plain" if how == "plain" else "triton")


class Decoders:
    """A stage's captured decoders: batches and lengths rounded up, so that few serve many."""

    def __init__(self) -> None:
        self.kept: OrderedDict[tuple, Decoder] = OrderedDict()

    def of(self, stage: Stage, batch_size: int, capacity: int, sampling: Sampling) -> Decoder:
        B = 1 << (batch_size - 1).bit_length() if batch_size <= 64 else -(-batch_size // 32) * 32
        key = (B, -(-capacity // 512) * 512, sampling)
        if key not in self.kept:
            self.forget(all_but=NUM_KEPT - 1)
            self.kept[key] = Decoder(stage, *key, how="captured")
        self.kept.move_to_end(key)
        return self.kept[key]

    def forget(self, all_but: int) -> None:
        """Free all but those that were used last."""
        while len(self.kept) > all_but:
            _, oldest = self.kept.popitem(last=False)
            del oldest.replay  # which holds the decoder, and so its memory


def decode(
    stage: Stage,
    rows: Rows,
    ids: Tensor,
    positions: Tensor,
    mask: Tensor | None,
    sampling: Sampling,
    on_frame: Callable[[int], None] | None = None,
) -> Finished:
    """Steps until every clip has ended. ids [B,N,S], positions [B,N], mask [B,N] of the prompts,
    padded on the left; stage.decoding says which way."""
    B, capacity, how = len(ids), ids.shape[1] + rows.num_steps, stage.decoding
    if isinstance(how, Decoders):
        decoder = how.of(stage, B, capacity, sampling)
    else:
        decoder = Decoder(stage, B, capacity, sampling, how)
    decoder.begin(rows, ids, positions, mask)
    layout, done, reports = stage.layout, _Done(rows), deque()
    for j in range(rows.num_steps):
        if j:
            decoder.advance(j)
        last = j == rows.num_steps - 1
        if last or completes(layout, j):
            reports.append((j, _report(decoder.rows.num_frames)))
        while len(reports) > (BEHIND if decoder.how == "captured" and not last else 0):
            step, read = reports.popleft()
            left = read()[: len(done.places)] - done.prompt_frames
            if on_frame and completes(layout, step):
                on_frame(int((left > frame_of(layout, step, -1)).sum()))
            active = left > frame_of(layout, step + 1, -1)
            if not active.any():
                return done.all(decoder)
            if decoder.how != "captured" and 2 * int(active.sum()) <= len(active):
                done.leave(decoder, active)  # those that have ended cost no more
    return done.all(decoder)


class _Done:
    """What has been drawn for clips that have left the batch; where the others came from."""

    def __init__(self, rows: Rows):
        self.prompt_frames = rows.prompt_frames.cpu()
        self.places, self.num_steps = torch.arange(len(self.prompt_frames)), rows.num_steps
        self.found: dict[int, tuple[Tensor, int]] = {}

    def leave(self, decoder: Decoder, active: Tensor) -> None:
        """All but the active rows [B] bool."""
        drawn, num_frames = decoder.rows.drawn.cpu(), decoder.rows.num_frames.tolist()
        for row in (~active).nonzero()[:, 0].tolist():
            self.found[int(self.places[row])] = drawn[row, : self.num_steps], num_frames[row]
        self.places, self.prompt_frames = self.places[active], self.prompt_frames[active]
        if active.any():
            decoder.keep(active.to(decoder.ids.device))

    def all(self, decoder: Decoder) -> Finished:
        self.leave(decoder, torch.zeros(len(self.places), dtype=torch.bool))
        return [self.found[n] for n in range(len(self.found))]


def _report(num_frames: Tensor) -> Callable[[], Tensor]:
    """num_frames [B] as it is now, for the CPU to read later."""
    if not num_frames.is_cuda:
        copy = num_frames.clone()
        return lambda: copy
    copy = torch.empty_like(num_frames, device="cpu", pin_memory=True)
    copy.copy_(num_frames, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> Tensor:
        copied.synchronize()
        return copy

    return read
