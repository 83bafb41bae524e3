"""data/dataset.py: the order of examples, windows, padding."""

import os
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_shards import CODEC, SEMANTIC

from data.dataset import (
    TrainBatches,
    ValidBatches,
    crop_window,
    example,
    make_loader,
    mix,
    permutation,
    semantic_window,
)
from data.shards import Clip, EncodedClip, TokenFolder, write_header, write_shard

FRAMES = [3, 10, 25, 40, 61, 100, 7]


def write_folder(path, frames=FRAMES, semantic_rate=50.0, splits=("train",)):
    """Clip i: semantic token t is t % 70; codes[k, t] = 100 * i + t, so that all can be traced."""
    clips = [
        EncodedClip(
            name=f"clip{i}",
            split=splits[i % len(splits)],
            speaker=None,
            text=None,
            duration=n / 50,
            semantic_tokens=np.arange(int(np.ceil(n * semantic_rate / 50))) % 70,
            codes=100 * i + np.arange(n)[None].repeat(3, 0),
        )
        for i, n in enumerate(frames)
    ]
    write_shard(path, 0, clips[:3], [])
    write_shard(path, 1, clips[3:], [])
    write_header(path, CODEC, {**SEMANTIC, "frame_rate": semantic_rate}, 2)
    return TokenFolder(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("tokens"))


def train(folder, **changed):
    arguments = {"seed": 5, "crop_seconds": 0.4, "batch_size_global": 12} | changed
    return TrainBatches(folder, **arguments)


def _process_group(batch):
    return os.getpgrp()


def take(batches, num):
    return [batch for batch, _ in zip(batches, range(num), strict=False)]


def same(a, b):
    keys = ("semantic", "codes", "starts", "ends")
    return all(torch.equal(getattr(a, key), getattr(b, key)) for key in keys)


@given(seed=st.integers(0, 2**40), epoch=st.integers(0, 10**6), num=st.integers(1, 300))
@settings(max_examples=50, deadline=None)
def test_every_clip_comes_once_per_epoch(seed, epoch, num):
    visited = [example(seed, epoch * num + i, num)[0] for i in range(num)]
    assert sorted(visited) == list(range(num))


def test_order_and_crops_differ_by_seed_epoch_and_example():
    orders = {permutation(seed, epoch, 50).tobytes() for seed in range(5) for epoch in range(20)}
    assert len(orders) == 100
    assert len({example(0, n, 10)[1] for n in range(1000)}) == 1000
    assert example(0, 3, 10)[1] != example(1, 3, 10)[1]


def test_the_order_is_fixed_for_ever():
    """Runs of older versions resume on the same clips: these numbers must never change."""
    assert permutation(7, 3, 10).tolist() == [8, 0, 3, 1, 6, 4, 5, 9, 7, 2]
    assert mix(1, 2, 3) == 0xD0734750FDE362B3


def test_positions_in_the_order_are_uniform():
    first = np.bincount([permutation(0, epoch, 4)[0] for epoch in range(2000)], minlength=4)
    assert np.abs(first - 500).max() < 80  # 4 standard deviations


@given(seed=st.integers(0, 99), step=st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_the_global_batch_is_the_same_for_any_split_into_ranks_and_micro_batches(
    folder, seed, step
):
    expected = set(range(step * 12, step * 12 + 12))
    for world, num_micro in [(1, 1), (1, 3), (4, 1), (2, 3), (3, 4), (12, 1)]:
        seen = []
        for rank in range(world):
            batches = train(folder, seed=seed, world=world, rank=rank, num_micro=num_micro)
            for micro in range(num_micro):
                seen += batches.examples(step, micro)
        assert len(seen) == 12
        assert set(seen) == expected


def test_micro_batches_hold_the_same_crops_as_one_big_batch(folder):
    (big,) = take(train(folder, start_step=4), 1)
    parts = [
        batch
        for rank in range(2)
        for batch in take(train(folder, start_step=4, world=2, rank=rank, num_micro=3), 3)
    ]
    rows = {tuple(row[0][row[0] >= 0].tolist()) for part in parts for row in part.codes}
    assert rows == {tuple(row[0][row[0] >= 0].tolist()) for row in big.codes}
    assert sum(len(part.codes) for part in parts) == 12


def test_resuming_is_starting_at_a_later_step(folder):
    whole = take(train(folder, num_micro=2), 14)
    resumed = take(train(folder, num_micro=2, start_step=3), 8)
    assert all(same(a, b) for a, b in zip(whole[6:], resumed, strict=True))
    assert not same(whole[0], whole[6])


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_keep_the_order(folder, num_workers):
    expected = take(train(folder, num_micro=2), 7)
    loaded = take(make_loader(train(folder, num_micro=2), num_workers), 7)
    assert all(same(a, b) for a, b in zip(expected, loaded, strict=True))
    valid = ValidBatches(folder, "train", crop_seconds=0.2, batch_size=3)
    loader = make_loader(valid, num_workers)
    for _ in range(2):  # and again from the start
        assert all(same(a, b) for a, b in zip(valid, loader, strict=True))


@pytest.mark.skipif(not hasattr(os, "getpgrp"), reason="no process groups here")
def test_workers_leave_the_process_group(folder):
    """What a terminal or scheduler sends to the group must not kill them before the last step."""
    loader = make_loader(train(folder), num_workers=1, transform=_process_group)
    assert next(iter(loader)) != os.getpgrp()
    assert next(iter(make_loader(train(folder), transform=_process_group))) == os.getpgrp()


@given(frames=st.integers(1, 500), crop=st.integers(1, 200), seed=st.integers(0, 2**64 - 1))
@settings(max_examples=300, deadline=None)
def test_crops_lie_inside_the_clip(frames, crop, seed):
    start, stop = crop_window(frames, crop, seed)
    assert 0 <= start < stop <= frames
    assert stop - start == min(frames, crop)


def test_crops_reach_every_place_and_the_ends_often():
    starts = np.bincount([crop_window(100, 20, mix(n))[0] for n in range(5000)], minlength=81)
    assert starts.min() > 0
    expected = 5000 * 11 / 101  # 10 positions before the clip and the first one
    assert starts[0] == pytest.approx(expected, rel=0.25)
    assert starts[80] == pytest.approx(expected, rel=0.25)
    assert starts[1:80].max() < 110


def test_crops_hold_what_the_shards_hold_and_say_where_they_lie(folder):
    for batch in take(train(folder), 10):
        for semantic, codes, starts, ends in zip(
            batch.semantic, batch.codes, batch.starts, batch.ends, strict=True
        ):
            row = codes[0][codes[0] >= 0]
            clip, first = divmod(row[0].item(), 100)
            assert torch.equal(row, torch.arange(len(row)) + row[0])  # padding is on the right
            assert torch.equal(codes[0], codes[2])
            assert len(row) == min(20, FRAMES[clip])
            assert starts.item() == (first == 0)
            assert ends.item() == (first + len(row) == FRAMES[clip])
            tokens = semantic[semantic >= 0]  # equal rates: the same window
            assert tokens.tolist() == [(first + t) % 70 for t in range(len(row))]


def test_padding_is_minus_one_and_no_longer_than_needed(tmp_path):
    folder = write_folder(tmp_path, frames=[4, 9, 6])
    (batch,) = ValidBatches(folder, "train", crop_seconds=1, batch_size=3)
    assert batch.codes.shape == (3, 3, 9)
    assert batch.semantic.shape == (3, 9)
    assert (batch.codes == -1).sum(dim=(1, 2)).tolist() == [15, 0, 9]
    assert (batch.semantic == -1).sum(dim=1).tolist() == [5, 0, 3]
    assert batch.codes.dtype == batch.semantic.dtype == torch.int64
    assert batch.starts.all()
    assert batch.ends.all()
    assert batch.starts.dtype == torch.bool


@pytest.mark.parametrize("world", [1, 3])
def test_validation_windows_cover_every_frame_exactly_once(folder, world):
    seen = []
    for rank in range(world):
        batches = ValidBatches(
            folder, "train", crop_seconds=0.24, batch_size=4, rank=rank, world=world
        )
        for batch in batches:
            seen += batch.codes[:, 1][batch.codes[:, 1] >= 0].tolist()
    expected = [100 * i + t for i, n in enumerate(FRAMES) for t in range(n)]
    assert sorted(seen) == sorted(expected)


@given(
    frames=st.integers(1, 400),
    extra=st.integers(-1, 2),
    rate=st.sampled_from(
        [Fraction(1), Fraction(1, 2), Fraction(2, 3), Fraction(3, 2), Fraction(2)]
    ),
    crop=st.integers(1, 120),
)
@settings(max_examples=200, deadline=None)
def test_semantic_windows_overlap_the_frames_and_miss_no_token(frames, extra, rate, crop):
    num_semantic = max(-(-frames * rate.numerator // rate.denominator) + extra, 1)
    clip = Clip("x", "train", None, None, 1.0, 0, num_semantic, frames)
    previous = 0
    for start in range(0, frames, crop):
        stop = min(start + crop, frames)
        first, last = semantic_window(clip, start, stop, rate)
        assert 0 <= first < last <= num_semantic
        assert first <= previous  # no gap to the window before
        assert first <= start * rate  # begins no later than the frames do
        assert last >= min(stop * rate, num_semantic)
        if rate.denominator == 1 and extra >= 0:
            assert first == start * rate  # whole tokens per frame: nothing is shared
        previous = last
    assert previous == num_semantic


def test_unequal_rates_keep_both_streams_together(tmp_path):
    folder = write_folder(tmp_path, frames=[60], semantic_rate=25.0)
    batches = train(folder, batch_size_global=1)
    for batch in take(batches, 20):
        first = batch.codes[0, 0, 0].item()
        assert batch.semantic[0, 0].item() == first // 2
        assert batch.semantic.shape[1] == -(-(first + 20) // 2) - first // 2


def test_mistakes_are_named(folder):
    with pytest.raises(ValueError, match=r"12 clips does not divide by 5 .* x 1"):
        train(folder, world=5)
    with pytest.raises(ValueError, match="shorter than a frame"):
        train(folder, crop_seconds=0.001)
    with pytest.raises(ValueError, match="no clips of split 'valid'"):
        ValidBatches(folder, crop_seconds=1, batch_size=2)
