"""From a trained stage to codes: filter the logits, draw, append, until EOS.

Every clip has random numbers of its own, one for each of its steps and slots, which its seed alone
says; so a clip depends neither on what else is in its batch nor on how much is drawn at a time.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.layouts import IGNORE, PAD
from model.stages import Stage


@dataclass(frozen=True)
class Sampling:
    """How to draw from logits. temperature 0 takes the most likely class; 0 turns top_k off."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        for name, ok, rule in (
            (
                "temperature",
                self.temperature == 0 or 1e-3 <= self.temperature < 1e3,
                "0, or 0.001 to 1000",
            ),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p < 1, "in [0, 1)"),
        ):
            if not ok:
                raise ValueError(f"{name}={getattr(self, name)}: must be {rule}")


def filter_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """logits [..,C] -> logits / temperature with every class that is ruled out at -inf.

    top_k keeps the k best; top_p the smallest set of the best whose probability reaches p
    (Holtzman et al. 2020); min_p those at least min_p times as likely as the best (Nguyen et al.
    2024).
    """
    logits = logits.float() / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if sampling.top_p < 1:
        ordered = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        before = ordered.values.cumsum(dim=-1) - ordered.values  # mass of the better classes
        drop = (before >= sampling.top_p).scatter(-1, ordered.indices, before >= sampling.top_p)
        logits = logits.masked_fill(drop, float("-inf"))
    if sampling.min_p > 0:
        probs = logits.softmax(dim=-1)
        least = sampling.min_p * probs.amax(dim=-1, keepdim=True)
        logits = logits.masked_fill(probs < least, float("-inf"))
    return logits


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """logits [B,C], uniform [B] in [0, 1) -> classes [B], by inverting the cumulative sum."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    cumulative = filter_logits(logits, sampling).softmax(dim=-1).cumsum(dim=-1)
    threshold = uniform[:, None] * cumulative[:, -1:]
    # <= skips classes of probability 0 even at uniform = 0
    return (cumulative <= threshold).sum(dim=-1).clamp(max=logits.shape[-1] - 1)


BLOCK = 256  # steps whose random numbers are drawn together
EMPTY = -2  # a slot where no code belongs: before the first frame or after the last (`delay`)


def generate(
    stage: Stage,
    conditions: list[Tensor | None],
    prompts: list[Tensor],
    max_frames: list[int],
    seeds: list[int],
    sampling: Sampling,
    begins: list[int] | None = None,
    min_frames: list[int] | None = None,
    use_cache: bool = True,
    on_frame: Callable[[int], None] | None = None,
) -> list[Tensor]:
    """Continue each prompt [K,P] (P may be 0) until its own EOS or its `max_frames`.

    conditions: [K_c,T_c] each, or None for a stage without one; begins[n]: the frame of its
    recording that row n begins with (0); EOS is not drawn before `min_frames` (1). Returns codes
    [K,T_n], prompt included, min_frames <= T_n <= max_frames. `use_cache=False` feeds the whole
    sequence through the model at every step: slow, plain, the specification of the other.
    `on_frame(n)` is told, frame by frame, that n clips have one more.
    """
    layout, begins = stage.layout, begins or [0] * len(prompts)
    rows = _rows(stage, prompts, max_frames, min_frames or [1] * len(prompts), seeds, begins)
    num_steps = rows.known.shape[1]
    if num_steps == 0:  # the prompts are all there is to be
        return list(prompts)
    starts = [begin == 0 for begin in begins]
    ids, positions, mask = _pad_left(stage, conditions, prompts, starts, num_steps)
    cache = None
    if use_cache:
        cache = stage.transformer.make_cache(len(prompts), ids.shape[1] + num_steps)
    totals, place_of = rows.num_frames.clone(), torch.arange(len(prompts), device=ids.device)
    steps = ids.new_full((len(prompts), num_steps, layout.num_slots), EMPTY)
    num_fresh = ids.shape[1]
    for j in range(num_steps):
        seen = None if mask is None else mask[:, : ids.shape[1]]
        fresh = slice(-num_fresh if use_cache else None, None)
        hidden = stage.hidden(ids[:, fresh], positions[:, fresh], seen, cache)[:, -1]  # [B,dim]
        codes = _draw_step(stage, hidden, j, rows, sampling)
        steps[place_of, j], totals[place_of] = codes, rows.num_frames
        left = rows.num_frames - rows.prompt_frames  # [B]
        active = left > _frame(stage, j + 1, -1)
        there = torch.stack([active, left > _frame(stage, j, -1)])  # read at one go
        num_active, num_grown = there.sum(dim=1).tolist()
        if on_frame and _completes(stage, j):
            on_frame(num_grown)
        if num_active == 0:
            break
        ids, num_fresh = torch.cat([ids, _to_ids(stage, codes, j)], dim=1), 1
        positions = torch.cat([positions, positions[:, -1:] + 1], dim=1)
        if use_cache and 2 * num_active <= len(active):  # those that have ended cost no more
            rows, place_of = rows.only(active), place_of[active]
            ids, positions = ids[active], positions[active]
            mask = None if mask is None else mask[active]
            cache.keep(active)
    return [
        _finish(stage, prompt, row, int(total))
        for prompt, row, total in zip(prompts, steps.cpu(), totals, strict=True)
    ]


@dataclass
class _Rows:
    """The clips being generated: frames in each prompt [B], the fewest and the number each will
    have [B] (which shrinks at EOS), what prompts fix of the steps to come [B,steps,S], uniform
    numbers [B,steps,S]."""

    prompt_frames: Tensor
    min_frames: Tensor
    num_frames: Tensor
    known: Tensor
    uniform: Tensor

    def only(self, rows: Tensor) -> "_Rows":
        """rows [B] bool: those to go on with."""
        return _Rows(*(tensor[rows] for tensor in vars(self).values()))


def _rows(
    stage: Stage,
    prompts: list[Tensor],
    max_frames: list[int],
    min_frames: list[int],
    seeds: list[int],
    begins: list[int],
) -> _Rows:
    device, per_frame = stage.embed.weight.device, _steps_per_frame(stage)
    totals = [max(n, prompt.shape[1]) for n, prompt in zip(max_frames, prompts, strict=True)]
    steps = [
        stage.layout.num_steps(total) - prompt.shape[1] * per_frame
        for total, prompt in zip(totals, prompts, strict=True)
    ]
    firsts = [
        (begin + prompt.shape[1]) * per_frame for begin, prompt in zip(begins, prompts, strict=True)
    ]
    return _Rows(
        torch.tensor([prompt.shape[1] for prompt in prompts], device=device),
        torch.tensor(min_frames, device=device),
        torch.tensor(totals, device=device),
        torch.stack([_known(stage, prompt, max(steps)) for prompt in prompts]).to(device),
        _uniform(seeds, firsts, steps, stage.layout.num_slots).to(device),
    )


def _frame(stage: Stage, step: int, slot: int) -> int:
    """The frame, counted from the end of the prompt, in `slot` at `step`; slot -1 is the last."""
    if stage.layout.pattern == "flatten":
        return step // stage.layout.num_codebooks
    return step - slot % stage.layout.num_codebooks


def _completes(stage: Stage, step: int) -> bool:
    """Whether `step` draws the last code of a frame."""
    K = stage.layout.num_codebooks
    return step >= K - 1 if stage.layout.pattern == "delay" else (step + 1) % K == 0


def _draw_step(stage: Stage, hidden: Tensor, j: int, rows: _Rows, sampling: Sampling) -> Tensor:
    """hidden [B,dim] -> the codes [B,S] of step j, EMPTY outside a clip; notes EOS in `rows`."""
    layout, codes = stage.layout, []
    for slot in range(layout.num_slots):
        head = j % layout.num_codebooks if layout.pattern == "flatten" else slot
        frame = rows.prompt_frames + _frame(stage, j, slot)  # [B]
        logits, known = stage.heads[head](hidden), rows.known[:, j, slot]
        if head == 0:
            logits[:, layout.eos].masked_fill_(frame < rows.min_frames, float("-inf"))
        code = draw(logits, rows.uniform[:, j, slot], sampling)
        code = torch.where(known == IGNORE, code, known)
        if head == 0:
            ended = (code == layout.eos) & (frame < rows.num_frames)
            rows.num_frames = torch.where(ended, frame, rows.num_frames)
        codes.append(code.masked_fill((frame < 0) | (frame >= rows.num_frames), EMPTY))
    return torch.stack(codes, dim=1)


def extend(
    stage: Stage,
    condition_of: Callable[[int, int, int], Tensor | None],
    clips: list[Tensor],
    num_frames: list[int],
    seeds: list[int],
    sampling: Sampling,
    windows: list[int],
    overlap: int,
    min_frames: list[int] | None = None,
    on_frame: Callable[[int], None] | None = None,
    first_frame: int = 0,
) -> list[Tensor]:
    """Continue clips [K,T] to `num_frames` each or to EOS, however far beyond the trained context:
    in windows of at most `windows` frames, which see `overlap` or more of what is there.

    `condition_of(row, a, b)` gives row's condition for frames [a, b); first_frame: of the clips'
    recordings, if those began before. Returns codes [K,T_n].
    """
    assert 0 <= overlap < min(windows)
    least = min_frames or [1] * len(clips)
    clips, active = list(clips), [n for n, c in enumerate(clips) if c.shape[1] < num_frames[n]]
    while active:
        begins = [
            _window_begin(clips[n].shape[1], num_frames[n], windows[n], overlap) for n in active
        ]
        ends = [min(a + windows[n], num_frames[n]) for n, a in zip(active, begins, strict=True)]
        made = generate(
            stage,
            [condition_of(n, a, b) for n, a, b in zip(active, begins, ends, strict=True)],
            [clips[n][:, a:] for n, a in zip(active, begins, strict=True)],
            [b - a for a, b in zip(begins, ends, strict=True)],
            [seeds[n] for n in active],
            sampling,
            [first_frame + a for a in begins],
            [max(1, least[n] - a) for n, a in zip(active, begins, strict=True)],
            on_frame=on_frame,
        )
        still = []
        for n, a, b, clip in zip(active, begins, ends, made, strict=True):
            clips[n] = torch.cat([clips[n][:, :a], clip], dim=1)
            if clips[n].shape[1] == b < num_frames[n]:  # no EOS, and more is wanted
                still.append(n)
        active = still
    return clips


def _window_begin(there: int, wanted: int, window: int, overlap: int) -> int:
    """Where the next window begins, when `there` frames are there: at 0 while they fit; then so
    that it sees as much as it can, and `overlap` at least."""
    return 0 if there < window else min(there - overlap, wanted - window)


def _uniform(seeds: list[int], firsts: list[int], num_steps: list[int], num_slots: int) -> Tensor:
    """[B,steps,S] numbers in [0, 1): row n's from its step firsts[n] on. Which number a step gets
    is a matter of the seed alone: they are drawn in blocks that lie where they lie."""
    out = torch.zeros(len(seeds), max(num_steps), num_slots)
    for n, (seed, first, count) in enumerate(zip(seeds, firsts, num_steps, strict=True)):
        begin, blocks = first // BLOCK * BLOCK, []
        for block in range(begin, first + count, BLOCK):
            generator = torch.Generator().manual_seed(mix_seed(seed, block))
            blocks.append(torch.rand(BLOCK, num_slots, generator=generator))
        if blocks:
            out[n, :count] = torch.cat(blocks)[first - begin :][:count]
    return out


def mix_seed(seed: int, salt: int | str) -> int:
    """Another seed: 63 bits of a hash, the same on every machine."""
    digest = hashlib.sha256(f"{seed}/{salt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _steps_per_frame(stage: Stage) -> int:
    return stage.layout.num_codebooks if stage.layout.pattern == "flatten" else 1


def _whole_steps(stage: Stage, prompt: Tensor) -> int:
    """Places whose every slot the prompt [K,P] fixes."""
    return prompt.shape[1] * _steps_per_frame(stage)


def _pad_left(
    stage: Stage,
    conditions: list[Tensor | None],
    prompts: list[Tensor],
    starts: list[bool],
    num_steps: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ragged prompts as ids [B,N,S] and positions [B,N], padded on the left so that all go on at
    place N, and the mask [B,N+num_steps] of real places; None when no row is padded."""
    layout, device = stage.layout, stage.embed.weight.device
    rows = [
        torch.cat(
            [
                layout.prefix(condition, start),
                layout.spread(layout.target_ids(prompt), PAD, _whole_steps(stage, prompt)),
            ]
        )
        for condition, prompt, start in zip(conditions, prompts, starts, strict=True)
    ]
    N = max(len(row) for row in rows)
    ids, positions = torch.full((len(rows), N, layout.num_slots), PAD), torch.zeros(len(rows), N)
    mask = torch.ones(len(rows), N + num_steps, dtype=torch.bool)
    for n, row in enumerate(rows):
        ids[n, N - len(row) :], positions[n, N - len(row) :] = row, layout.positions(row)
        mask[n, : N - len(row)] = False
    return ids.to(device), positions.to(device), None if mask.all() else mask.to(device)


def _known(stage: Stage, prompt: Tensor, num_steps: int) -> Tensor:
    """What the prompt [K,P] fixes of the steps to come: [steps,S], IGNORE where it is silent.

    Under `delay`, step j holds frame P + j - k in slot k, which the prompt still has while j < k.
    """
    known = torch.full((num_steps, stage.layout.num_slots), IGNORE)
    if stage.layout.pattern == "delay":
        P = prompt.shape[1]
        for k in range(1, stage.layout.num_codebooks):
            for j in range(min(k, num_steps)):
                known[j, k] = prompt[k, P + j - k] if P + j >= k else EMPTY
    return known


def _to_ids(stage: Stage, codes: Tensor, step: int) -> Tensor:
    """Drawn codes [B,S] of one step -> the next input ids [B,1,S]."""
    layout = stage.layout
    offsets = layout.target_ids(torch.zeros(layout.num_codebooks, 1, dtype=torch.long))[:, 0]
    if layout.pattern == "flatten":
        offsets = offsets[step % layout.num_codebooks][None]
    ids = codes + offsets.to(codes.device)
    return ids.masked_fill(codes < 0, PAD)[:, None]


def _finish(stage: Stage, prompt: Tensor, steps: Tensor, num_frames: int) -> Tensor:
    """Prompt [K,P] and the steps drawn after it [N,S] -> codes [K,num_frames]."""
    before = stage.layout.spread(prompt.cpu(), EMPTY, _whole_steps(stage, prompt))
    return stage.layout.gather(torch.cat([before, steps]), num_frames)
