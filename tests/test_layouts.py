"""Layouts: what goes in comes out, no id means two things, EOS is trained in every stage."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.layouts import IGNORE, NUM_SPECIALS, PAD, START, Layout
from model.stages import STAGES, stage_spec

SIZES = {"num_semantic": 7, "num_codebooks": 4, "codebook_size": 5, "num_coarse": 2}


@st.composite
def clips(draw):
    """A stage's layout and a random clip for it."""
    spec = stage_spec(draw(st.sampled_from(STAGES)), **SIZES)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def codes(sizes, num_frames):
        rows = [torch.randint(0, n, (num_frames,), generator=generator) for n in sizes]
        return torch.stack(rows)

    layout = spec.layout
    condition = None
    if layout.condition_sizes:
        condition = codes(layout.condition_sizes, draw(st.integers(1, 9)))
    return layout, condition, codes(layout.target_sizes, draw(st.integers(1, 9)))


@settings(max_examples=150, deadline=None)
@given(clip=clips(), starts=st.booleans())
def test_every_layout_round_trips(clip, starts):
    layout, condition, codes = clip
    ids, targets = layout.encode(condition, codes, starts, ends=True)
    back_condition, back_codes, back_starts, back_ends = layout.decode(ids, targets)
    assert torch.equal(back_codes, codes)
    assert (condition is None) == (back_condition is None)
    assert condition is None or torch.equal(back_condition, condition)
    assert (back_starts, back_ends) == (starts, True)


@settings(max_examples=100, deadline=None)
@given(clip=clips())
def test_inputs_are_the_targets_one_place_later(clip):
    """What head k must predict after place n is what stands in place n + 1."""
    layout, condition, codes = clip
    for ends in (False, True):
        ids, targets = layout.encode(condition, codes, True, ends)
        assert ids.shape[0] == targets.shape[0]
        all_ids = layout.target_ids(
            torch.arange(max(layout.target_sizes)).repeat(4, 1)[: len(layout.target_sizes)]
        )
        for n in range(len(ids) - 1):
            for k in range(layout.num_codebooks):
                target = int(targets[n, k])
                if target == IGNORE or (k == 0 and target == layout.eos):
                    continue
                slot = k if layout.pattern == "delay" else 0
                assert ids[n + 1, slot] == all_ids[k, target]


@settings(max_examples=100, deadline=None)
@given(clip=clips())
def test_each_code_is_predicted_once_and_eos_only_at_an_end(clip):
    layout, condition, codes = clip
    _, targets = layout.encode(condition, codes, True, ends=True)
    K, T = codes.shape
    assert int((targets[:, 0] == layout.eos).sum()) == 1
    assert [int((targets[:, k] != IGNORE).sum()) for k in range(K)] == [T + 1] + [T] * (K - 1)
    _, without = layout.encode(condition, codes, True, ends=False)
    assert int((without[:, 0] == layout.eos).sum()) == 0
    counts = [int((without[:, k] != IGNORE).sum()) for k in range(K)]
    if layout.pattern == "flatten":
        assert counts == [T] * K
    else:  # what the delay pushes past the crop is unknown, not empty
        assert counts == [max(T - k, 0) for k in range(K)]


def test_no_id_means_two_things():
    """PAD, START, MIDDLE and every code of every codebook, all distinct and in range."""
    for name in STAGES:
        layout = stage_spec(name, **SIZES).layout
        seen = list(range(NUM_SPECIALS))
        for k, size in enumerate(layout.condition_sizes):
            codes = torch.zeros(len(layout.condition_sizes), size, dtype=torch.long)
            codes[k] = torch.arange(size)
            seen += layout.condition_ids(codes).reshape(size, -1)[:, k].tolist()
        for k, size in enumerate(layout.target_sizes):
            codes = torch.zeros(layout.num_codebooks, size, dtype=torch.long)
            codes[k] = torch.arange(size)
            seen += layout.target_ids(codes)[k].tolist()
        assert len(seen) == len(set(seen)) == layout.num_ids
        assert set(seen) == set(range(layout.num_ids))
        streams = layout.streams
        assert [int(streams[i]) for i in range(NUM_SPECIALS)] == [0, 1, 1]
        assert streams.bincount().tolist()[2:] == [*layout.condition_sizes, *layout.target_sizes]
        assert layout.eos not in range(layout.target_sizes[0])
        assert layout.head_sizes[0] == layout.eos + 1
        assert layout.head_sizes[1:] == layout.target_sizes[1:]


def test_flatten_by_hand():
    layout = Layout((3,), (5, 5))
    condition, codes = torch.tensor([[2, 0]]), torch.tensor([[1, 2], [3, 4]])
    ids, targets = layout.encode(condition, codes, starts=True, ends=True)
    #            semantic   START  c00    c10     c01    c11     (each codebook its own range)
    assert ids[:, 0].tolist() == [5, 3, START, 6 + 1, 11 + 3, 6 + 2, 11 + 4]
    assert targets.tolist() == [[-1, -1], [-1, -1], [1, -1], [-1, 3], [2, -1], [-1, 4], [5, -1]]


def test_delay_by_hand():
    layout = Layout((), (5, 5), "delay")
    ids, targets = layout.encode(None, torch.tensor([[1, 2, 3], [4, 0, 1]]), True, ends=True)
    assert ids.tolist() == [[START, PAD], [3 + 1, PAD], [3 + 2, 8 + 4], [3 + 3, 8 + 0]]
    assert targets.tolist() == [[1, -1], [2, 4], [3, 0], [5, 1]]
    ids, targets = layout.encode(None, torch.tensor([[1, 2, 3], [4, 0, 1]]), True, ends=False)
    assert targets.tolist() == [[1, -1], [2, 4], [3, 0]]


def test_collate_pads_and_lists_every_target():
    layout = Layout((), (5, 5))
    short = layout.encode(None, torch.tensor([[1], [2]]), True, True)
    long = layout.encode(None, torch.tensor([[3, 4], [0, 1]]), True, True)
    batch = layout.collate([short, long])
    assert batch.ids.shape == (2, 5, 1)
    assert batch.ids[0, 3:].eq(PAD).all()
    assert batch.num_targets == 3 + 5
    assert batch.targets[0].tolist() == [1, 5, 3, 4, 5]
    assert batch.targets[1].tolist() == [2, 0, 1]
    assert batch.places[1].tolist() == [1, 5 + 1, 5 + 3]


@pytest.mark.parametrize(("longest", "places"), [(2045, 2048), (2048, 2048), (2020, 2020)])
def test_a_length_that_kernels_like_is_taken_where_it_is_near(longest, places):
    """And asks nothing more."""
    layout = Layout((), (5,))
    long = layout.encode(None, torch.zeros(1, longest, dtype=torch.long), True, False)
    batch = layout.collate([long])
    assert batch.ids.shape == (1, places, 1)
    assert (batch.num_places, batch.num_targets) == (longest, longest)


def test_what_sounds_together_stands_at_a_constant_distance():
    """Positions of a target frame and of its condition, at every time, for every pattern and rate;
    the target counts on from its start mark."""
    for pattern, per_frame in (("flatten", 2), ("delay", 1)):
        for rate, sizes in ((1.0, (7,)), (0.5, (7,)), (2.0, (7,)), (1.0, (5, 5, 5))):
            layout = Layout(sizes, (5, 5), pattern, rate)
            num_frames = 12
            condition = torch.zeros(len(sizes), int(num_frames * rate), dtype=torch.long)
            ids, _ = layout.encode(condition, torch.zeros(2, num_frames, dtype=int), True, False)
            positions, first = layout.positions(ids), condition.numel()
            assert positions[first:].tolist() == list(range(len(ids) - first))
            frames = torch.arange(0, num_frames, 2)
            place = (frames * rate).long() * len(sizes)  # of the condition's frame at that time
            distance = (first + 1 + frames * per_frame) - first - positions[place]
            torch.testing.assert_close(distance, torch.zeros(len(frames)))
