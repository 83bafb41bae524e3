"""From token folder to batches. One batch, forward only:

1. Examples are numbered n = 0, 1, 2, ... for ever. Epoch n // N visits the N clips of the split in
   the order of `permutation(seed, epoch)`; `example` says which clip, and seeds its crop, from
   (seed, n) alone. There is no state to save: resuming is counting on.
2. Step s of a global batch of G takes n in [s * G, (s + 1) * G). Rank r of W and micro-batch m of A
   take part m * W + r of W * A equal, contiguous parts of it: the same G examples for any W and A.
3. A crop is a window [a, b) of the codec's frames (`crop_window`) and the semantic tokens of the
   same time (`semantic_window`). A clip no longer than the crop comes whole. `starts` and `ends`
   say whether the window touches the clip's ends, so that begin and end are learnt only there.
4. `collate` pads with -1, which no token is. Audio is never padded: a model that sees silence after
   short clips learns to fall silent.

Validation walks the whole split instead (`ValidBatches`): windows side by side, no randomness.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import count
from math import ceil
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data.shards import Clip, TokenFolder, semantic_rate

PAD = -1
Window = tuple[Clip, int, int]  # a clip and its frames [a, b)
MASK64 = (1 << 64) - 1


@dataclass(frozen=True)
class Batch:
    """Crops of B clips, each padded with -1 on the right to the longest.

    `semantic` [B, T_s] int64, `codes` [B, K, T] int64; `starts`, `ends` [B] bool: the crop begins
    at its clip's start, reaches its clip's end.
    """

    semantic: Tensor
    codes: Tensor
    starts: Tensor
    ends: Tensor


def mix(*numbers: int) -> int:
    """Hash of integers to 64 well-mixed bits: chained splitmix64 (Steele, Lea & Flood 2014)."""
    state = 0
    for number in numbers:
        state = (state ^ (number & MASK64)) + 0x9E3779B97F4A7C15 & MASK64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & MASK64
        state = (state ^ state >> 27) * 0x94D049BB133111EB & MASK64
        state ^= state >> 31
    return state


@lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, num_clips: int) -> np.ndarray:
    """The order [num_clips] in which `epoch` visits the clips, the same with every numpy version.

    splitmix64 of 0..N-1 under a key, sorted: 0.1 s per epoch for a million clips.
    """
    with np.errstate(over="ignore"):
        x = np.arange(num_clips, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x += np.uint64(mix(seed, epoch))
        x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        order = np.argsort(x ^ x >> np.uint64(31), kind="stable")
    order.flags.writeable = False  # it is shared by every caller
    return order


def example(seed: int, n: int, num_clips: int) -> tuple[int, int]:
    """Example number n of a run -> (clip index, seed of its crop). Pure: no state anywhere."""
    epoch, position = divmod(n, num_clips)
    return int(permutation(seed, epoch, num_clips)[position]), mix(seed, n, 1)


def crop_window(num_frames: int, crop_frames: int, crop_seed: int) -> tuple[int, int]:
    """The frames [a, b) of a random crop: crop_frames of them, or the whole clip if it has fewer.

    The start is drawn from half a crop before the clip to half a crop beyond the last start, then
    clamped. Drawn without that margin, a long clip would almost never show its beginning or end,
    and a model never learn to stop; with it each end shows about half as often as in a tiling.
    """
    if num_frames <= crop_frames:
        return 0, num_frames
    last, margin = num_frames - crop_frames, crop_frames // 2
    start = min(max(crop_seed % (last + 1 + 2 * margin) - margin, 0), last)
    return start, start + crop_frames


def semantic_window(clip: Clip, start: int, stop: int, rate: Fraction) -> tuple[int, int]:
    """The semantic tokens [a, b) that overlap the codec's frames [start, stop).

    `rate` is semantic tokens per codec frame. First token floor(start * rate), last one
    ceil(stop * rate) - 1: at unequal rates neighbouring windows can share a token. A window that
    reaches the clip's end takes all the tokens that are left.
    """
    first = min(int(start * rate), max(clip.num_semantic - 1, 0))
    if stop >= clip.num_frames:
        return first, clip.num_semantic
    return first, min(ceil(stop * rate), clip.num_semantic)


def collate(crops: list[tuple[np.ndarray, np.ndarray, bool, bool]]) -> Batch:
    """(semantic_tokens [T_s], codes [K, T], starts, ends) of each crop -> one padded Batch."""

    def padded(arrays: Iterable[np.ndarray]) -> Tensor:  # B of [T, ...] -> [B, longest T, ...]
        tensors = [torch.from_numpy(array.astype(np.int64)) for array in arrays]
        return pad_sequence(tensors, batch_first=True, padding_value=PAD)

    semantic, codes, starts, ends = zip(*crops, strict=True)
    codes = padded(array.T for array in codes).transpose(1, 2)  # [B, T, K] -> [B, K, T]
    return Batch(padded(semantic), codes, torch.tensor(starts), torch.tensor(ends))


class _Windows(IterableDataset):
    """What training and validation share: clips of a split, windows of frames, worker sharing.

    A subclass's `batches()` yields the windows of each batch.
    """

    def __init__(self, folder: TokenFolder, split: str, crop_seconds: float):
        super().__init__()
        self.folder, self.clips = folder, folder.clips(split)
        self.rate = semantic_rate(folder.codec, folder.semantic)
        frame_rate = folder.codec["frame_rate"]
        self.crop_frames = round(crop_seconds * frame_rate)
        if self.crop_frames < 1:
            raise ValueError(
                f"a crop of {crop_seconds} s is shorter than a frame; "
                f"use {1 / frame_rate:g} s or more"
            )

    def __iter__(self) -> Iterator[Batch]:
        """A DataLoader worker makes every num_workers-th batch. The loader asks the workers in
        turn, so what comes out is in order."""
        worker = get_worker_info()
        for i, windows in enumerate(self.batches()):
            if worker is None or i % worker.num_workers == worker.id:
                yield collate([self.cut(*window) for window in windows])

    def cut(self, clip: Clip, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, bool, bool]:
        """semantic_tokens [T_s] and codes [K, stop - start] of a window; does it start, end."""
        semantic_tokens, codes = self.folder.read(clip)
        first, last = semantic_window(clip, start, stop, self.rate)
        ends = stop == clip.num_frames
        return semantic_tokens[first:last], codes[:, start:stop], start == 0, ends


class TrainBatches(_Windows):
    """Endless micro-batches of one rank: num_micro per step, from `start_step` on.

    `batch_size_global` counts the clips of a step over all ranks and micro-batches. ValueError: it
    does not divide by world * num_micro; the split has no clips.
    """

    def __init__(
        self,
        folder: TokenFolder,
        split: str = "train",
        *,
        seed: int,
        crop_seconds: float,
        batch_size_global: int,
        rank: int = 0,
        world: int = 1,
        num_micro: int = 1,
        start_step: int = 0,
    ):
        super().__init__(folder, split, crop_seconds)
        if batch_size_global < 1 or batch_size_global % (world * num_micro):
            raise ValueError(
                f"a global batch of {batch_size_global} clips does not divide by {world} "
                f"process(es) x {num_micro} micro-batch(es); change the batch size or num_micro"
            )
        self.seed, self.batch_size_global, self.start_step = seed, batch_size_global, start_step
        self.rank, self.world, self.num_micro = rank, world, num_micro

    @property
    def filled(self) -> float:
        """The share of a batch that would hold tokens if all were padded to the longest crop."""
        frames = [min(clip.num_frames, self.crop_frames) for clip in self.clips]
        return sum(frames) / (len(frames) * max(frames))

    @property
    def longest(self) -> tuple[int, int]:
        """How many semantic tokens and frames a crop has at most."""
        frames = max(min(clip.num_frames, self.crop_frames) for clip in self.clips)
        ends = (  # the last window of a clip takes all tokens that are left
            clip.num_semantic - int(max(0, clip.num_frames - frames) * self.rate)
            for clip in self.clips
        )
        return max(ceil(frames * self.rate) + 1, *ends), frames

    def batches(self) -> Iterator[Iterable[Window]]:
        for step in count(self.start_step):
            for micro in range(self.num_micro):
                yield map(self.crop, self.examples(step, micro))

    def examples(self, step: int, micro: int) -> range:
        """The example numbers of this rank's micro-batch `micro` of `step`."""
        size = self.batch_size_global // (self.world * self.num_micro)
        first = step * self.batch_size_global + (micro * self.world + self.rank) * size
        return range(first, first + size)

    def crop(self, n: int) -> Window:
        """The window of example n."""
        index, crop_seed = example(self.seed, n, len(self.clips))
        clip = self.clips[index]
        return clip, *crop_window(clip.num_frames, self.crop_frames, crop_seed)


class ValidBatches(_Windows):
    """The whole split once: windows side by side, every codec frame in exactly one of them.

    A clip's last window holds what is left. Rank r takes windows r, r + W, ...: ranks can differ by
    a batch in number, so sum losses and token counts over ranks and divide once, at the end.
    Attributes: `num_short`, by how many batches rank 0 has more; `first`, a Batch of one window.
    """

    def __init__(
        self,
        folder: TokenFolder,
        split: str = "valid",
        *,
        crop_seconds: float,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
    ):
        super().__init__(folder, split, crop_seconds)
        self.batch_size = batch_size
        windows = [
            (clip, start, min(start + self.crop_frames, clip.num_frames))
            for clip in self.clips
            for start in range(0, clip.num_frames, self.crop_frames)
        ]
        self.windows = windows[rank::world]
        self.first = collate([self.cut(*windows[0])])
        self.num_short = ceil(len(windows[::world]) / batch_size) - ceil(
            len(self.windows) / batch_size
        )

    def batches(self) -> Iterator[Iterable[Window]]:
        for first in range(0, len(self.windows), self.batch_size):
            yield self.windows[first : first + self.batch_size]


def _leave_group(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM go to the whole process group. A worker must not die of
    them: the training process has a step to finish and a checkpoint to write first."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()


def make_loader(
    batches: TrainBatches | ValidBatches,
    num_workers: int = 0,
    transform: Callable[[Batch], Any] | None = None,
) -> DataLoader:
    """A DataLoader over whole batches, in the same order for any number of workers.

    `transform` maps each Batch to what comes out, inside the workers. Pinned for the copy to a GPU
    where there is one.
    """
    return DataLoader(
        batches,
        batch_size=None,
        collate_fn=transform,
        num_workers=num_workers,
        worker_init_fn=_leave_group,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
    )
