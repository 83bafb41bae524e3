"""From a trained stage to codes: a prompt, and then step by step until EOS."""

from collections.abc import Callable

import torch
from torch import Tensor

from model.decoder import Finished, decode
from model.drawing import EMPTY, Rows, Sampling, completes, first_ids, steps_per_frame, to_ids
from model.layouts import PAD, Layout
from model.stages import Stage


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
    least = min_frames or [1] * len(prompts)
    rows = Rows.of(layout, prompts, max_frames, least, seeds, begins)
    if rows.num_steps == 0:  # the prompts are all there is to be
        return list(prompts)
    starts = [begin == 0 for begin in begins]
    ids, positions, mask = _pad_left(stage, conditions, prompts, starts)
    run = decode if use_cache else decode_anew
    finished = run(stage, rows.to(ids.device), ids, positions, mask, sampling, on_frame)
    return [
        _finish(layout, prompt, drawn, total)
        for prompt, (drawn, total) in zip(prompts, finished, strict=True)
    ]


def decode_anew(
    stage: Stage,
    rows: Rows,
    ids: Tensor,
    positions: Tensor,
    mask: Tensor | None,
    sampling: Sampling,
    on_frame: Callable[[int], None] | None = None,
) -> Finished:
    """What `decode` is to return: the whole sequence through the model for every step."""
    layout, firsts = stage.layout, first_ids(stage.layout).to(ids.device)
    for j in range(rows.num_steps):
        hidden, head = stage.hidden(ids, positions, mask)[:, -1], j % layout.num_codebooks
        codes = rows.draw(layout, lambda k, x=hidden: stage.heads[k](x), head, sampling)
        if on_frame and completes(layout, j):
            on_frame(int(rows.has_more(layout, 1).sum()))
        if not rows.has_more(layout).any():
            break
        ids = torch.cat([ids, to_ids(layout, codes, head, firsts)[:, None]], dim=1)
        positions = torch.cat([positions, positions[:, -1:] + 1], dim=1)
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return list(zip(rows.drawn.cpu(), rows.num_frames.tolist(), strict=True))


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


def _whole_steps(layout: Layout, prompt: Tensor) -> int:
    """Places whose every slot the prompt [K,P] fixes."""
    return prompt.shape[1] * steps_per_frame(layout)


def _pad_left(
    stage: Stage,
    conditions: list[Tensor | None],
    prompts: list[Tensor],
    starts: list[bool],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ragged prompts as ids [B,N,S] and positions [B,N], padded on the left so that all go on at
    place N, and the mask [B,N] of real places; None when no row is padded."""
    layout, device = stage.layout, stage.embed.weight.device
    rows = [
        torch.cat(
            [
                layout.prefix(condition, start),
                layout.spread(layout.target_ids(prompt), PAD, _whole_steps(layout, prompt)),
            ]
        )
        for condition, prompt, start in zip(conditions, prompts, starts, strict=True)
    ]
    N = max(len(row) for row in rows)
    ids, positions = torch.full((len(rows), N, layout.num_slots), PAD), torch.zeros(len(rows), N)
    mask = torch.ones(len(rows), N, dtype=torch.bool)
    for n, row in enumerate(rows):
        ids[n, N - len(row) :], positions[n, N - len(row) :] = row, layout.positions(row)
        mask[n, : N - len(row)] = False
    return ids.to(device), positions.to(device), None if mask.all() else mask.to(device)


def _finish(layout: Layout, prompt: Tensor, steps: Tensor, num_frames: int) -> Tensor:
    """Prompt [K,P] and the steps drawn after it [N,S] -> codes [K,num_frames]."""
    before = layout.spread(prompt.cpu(), EMPTY, _whole_steps(layout, prompt))
    return layout.gather(torch.cat([before, steps]), num_frames)
