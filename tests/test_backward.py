"""Filled-up batches count as they did, and passes that are captured on them are the plain ones."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import assert_same_run, config, log_lines, losses, train_until, weights
from tokens import CODEBOOK_SIZE, NUM_CODEBOOKS, NUM_SEMANTIC, SEMANTIC, write_tokens

import train as module
from configs.schema import ModelConfig
from data.dataset import TrainBatches
from data.shards import TokenFolder
from model import backward
from model.backward import Sizes, choose_captured
from model.layouts import IGNORE
from model.stages import STAGES, Stage, stage_spec
from train import train

pytestmark = pytest.mark.usefixtures("one_thread")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
LONGEST = 9
CROPS = st.lists(st.tuples(st.integers(1, LONGEST), st.booleans(), st.booleans()), min_size=4)


class Uncaptured:
    """In place of `Captured`: the function itself."""

    def __init__(self, function):
        self.function, self.graphs = function, {}

    def __call__(self, variant, **inputs):
        return self.function(variant, **inputs)


def crops(sizes, seed=0, longest=LONGEST):
    """A padded Batch's tensors of crops of so many frames; do they start and end?"""
    generator, B = torch.Generator().manual_seed(seed), len(sizes)
    semantic = torch.full((B, longest), -1)
    codes = torch.full((B, NUM_CODEBOOKS, longest), -1)
    for row, (T, *_) in enumerate(sizes):
        semantic[row, :T] = torch.randint(NUM_SEMANTIC, (T,), generator=generator)
        shape = (NUM_CODEBOOKS, T)
        codes[row, :, :T] = torch.randint(CODEBOOK_SIZE, shape, generator=generator)
    starts, ends = (torch.tensor([size[n] for size in sizes]) for n in (1, 2))
    return semantic, codes, starts, ends


def make(name, pattern="auto"):
    return stage_spec(name, NUM_SEMANTIC, NUM_CODEBOOKS, CODEBOOK_SIZE, 2, pattern=pattern)


def make_sizes(spec, packed, num_clips=4, longest=LONGEST, filled=1.0, collapsed=False):
    batches = SimpleNamespace(longest=(longest, longest), filled=filled)
    return Sizes.of(spec, collapsed, packed, batches, num_clips)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("pattern", ["flatten", "delay"])
@pytest.mark.parametrize("name", STAGES)
@given(sizes=CROPS.map(lambda found: found[:4]))
@settings(max_examples=40, deadline=None)
def test_every_batch_fits_and_keeps_its_clips(name, pattern, packed, sizes):
    spec = make(name, pattern)
    fixed = make_sizes(spec, packed)
    batch = spec.sequences(*crops(sizes), packed=packed)
    found = fixed.fill(batch)
    N = found.positions.shape[1]
    assert found.is_filled
    if packed:
        assert N % 64 == 0
        assert batch.num_places + found.longest >= N
        assert found.bounds.tolist() == [*batch.bounds.tolist(), N]
        assert sum(found.segments) == N
    else:
        assert fixed.longest.positions.shape[1] == N
    assert max(found.segments if packed else found.lengths) <= found.longest
    assert (found.num_places, found.counts) == (batch.num_places, batch.counts)
    for k, count in enumerate(batch.counts):
        assert torch.equal(found.targets[k][:count], batch.targets[k])
        assert (found.targets[k][count:] == IGNORE).all()
        assert len(found.places[k]) == len(found.targets[k])
    again = fixed.fill(spec.sequences(*crops([(LONGEST, True, True)] * 4), packed=packed))
    if not packed:
        assert [t.shape for t in again.tensors().values()] == [
            t.shape for t in found.tensors().values()
        ]


@pytest.mark.parametrize("collapsed", [False, True])
@pytest.mark.parametrize("pattern", ["flatten", "delay"])
@pytest.mark.parametrize("name", STAGES)
def test_few_sizes_of_packed_rows_of_real_lengths(name, pattern, collapsed):
    """Every batch is filled, with little, to one of a few sizes; so also without repeats."""
    spec, draw, seen, shares = make(name, pattern), torch.Generator().manual_seed(0), set(), []
    lengths = torch.randint(10, 101, (400,), generator=draw)
    fixed = make_sizes(spec, True, 32, 100, float(lengths.double().mean() / 100), collapsed)
    for _ in range(30):
        sizes = lengths[torch.randint(400, (32,), generator=draw)].tolist()
        semantic, codes, starts, ends = crops([(n, n % 2, n % 3 > 0) for n in sizes], longest=100)
        batch = spec.sequences(semantic, codes, starts > 0, ends > 0, collapsed, True)
        found = fixed.fill(batch)
        assert found.is_filled
        seen.add(tuple(t.shape for t in found.tensors().values()))
        shares.append(batch.num_places / found.positions.shape[1])
    assert 1 < len(seen) < 13
    assert sum(shares) / len(shares) > 0.92


def test_what_is_longer_than_expected_is_left_alone():
    spec = make("coarse")
    for packed in (False, True):
        batch = spec.sequences(*crops([(9, True, True)] * 4), packed=packed)
        assert make_sizes(spec, packed, longest=5).fill(batch) is batch


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", STAGES)
def test_filled_batches_give_the_same_nats_and_gradients(name, packed):
    spec = make(name)
    torch.manual_seed(0)
    sizes = {"dim": 32, "num_layers": 2, "num_heads": 4, "head_dim": 8, "num_kv_heads": 2}
    stage = Stage(spec, ModelConfig(**sizes))
    batch = spec.sequences(*crops([(8, 1, 1), (2, 0, 0), (5, 1, 0), (7, 0, 1)]), packed=packed)
    filled = make_sizes(spec, packed).fill(batch)
    assert filled.positions.numel() > batch.positions.numel()
    found = []
    for each in (batch, filled):
        stage.zero_grad()
        nats = stage(each)
        nats.sum().backward()
        found.append((nats, {n: p.grad.clone() for n, p in stage.named_parameters()}))
    (nats, gradients), (others, other_gradients) = found
    torch.testing.assert_close(others, nats)
    for key, gradient in gradients.items():
        torch.testing.assert_close(other_gradients[key], gradient, atol=1e-5, rtol=1e-4)


def test_captured_is_chosen_on_one_gpu_where_little_is_filled_in():
    assert choose_captured(None, "cuda", True, True, 0.4)[0] is True
    assert choose_captured(None, "cuda", True, False, 0.9)[0] is True
    full = "batches of one size would be at worst 40% full"
    assert choose_captured(None, "cuda", True, False, 0.4) == (False, full)
    assert choose_captured(True, "cuda", True, False, 0.4) == (True, "as configured")
    alone = "one process without sharding"
    assert choose_captured(None, "cuda", False, True, 1) == (False, f"that takes {alone}")
    assert choose_captured(None, "cpu", True, True, 1) == (False, "that takes a CUDA GPU")
    assert choose_captured(False, "cuda", True, True, 1) == (False, "as configured")
    with pytest.raises(ValueError, match=rf"train\.captured=true needs a CUDA GPU and {alone}"):
        choose_captured(True, "cpu", False, True, 1)


@pytest.mark.parametrize("rate", [0.5, 1, 2])
def test_no_crop_is_longer_than_the_longest(rate, tmp_path):
    """Of many recordings, cut anywhere."""
    folder = write_tokens(tmp_path, semantic=SEMANTIC | {"frame_rate": 50.0 * rate})
    for seconds in (0.1, 0.4, 30):
        batches = TrainBatches(
            TokenFolder(folder), seed=0, crop_seconds=seconds, batch_size_global=4
        )
        most = batches.longest
        for n in range(400):
            semantic, codes, *_ = batches.cut(*batches.crop(n))
            assert len(semantic) <= most[0]
            assert codes.shape[1] <= most[1]


@pytest.mark.parametrize("changes", [(), ("data.packed=true",), ("train.num_micro_batches=2",)])
def test_gradients_that_stay_where_they_are(changes, tokens, tmp_path, monkeypatch):
    """What a captured run does but for the capture, on a CPU."""
    train(config(tokens, tmp_path / "plain", *changes))
    monkeypatch.setattr(module, "choose_captured", lambda *_: (True, "test"))
    monkeypatch.setattr(backward, "Captured", Uncaptured)
    train(config(tokens, tmp_path / "filled", *changes))
    ours, theirs = losses(tmp_path / "filled"), losses(tmp_path / "plain")
    assert len(ours) == 8
    assert ours == pytest.approx(theirs, abs=1e-4)
    (line,) = log_lines(tmp_path / "filled", "start")
    assert line["captured"] == "yes (test)"
    monkeypatch.setattr(Sizes, "fill", lambda self, batch: batch)  # nothing filled: to the bit
    train(config(tokens, tmp_path / "ragged", *changes))
    assert_same_run(tmp_path / "ragged", tmp_path / "plain")


PACKED, PADDED = "data.packed=true", "data.packed=false"
VARIANTS = {
    "padded": ("coarse", PADDED),
    "packed": ("coarse", PACKED),
    "dropout, packed": ("coarse", PACKED, "model.dropout=0.2"),
    "dropout, padded": ("coarse", PADDED, "model.dropout=0.2"),
    "muon, micro-batches": ("coarse", PADDED, "optim.muon_lr=0.02", "train.num_micro_batches=2"),
    "packed micro-batches": ("coarse", PACKED, "train.num_micro_batches=2", "train.batch_size=16"),
    "delay": ("coarse", PADDED, "pattern=delay"),
    "loader": ("coarse", PACKED, "data.num_workers=2", "train.batch_size=32"),
    "semantic": ("semantic", PADDED),
    "fine, plain kernels": ("fine", PADDED, "train.kernels=plain"),
    "acoustic, einsum, fp32": (
        *("acoustic", PADDED, "attention.backend=einsum", "train.precision=fp32"),
        "train.kernels=plain",
    ),
}


@pytest.fixture
def replays(monkeypatch):
    """A list that grows with every replay of a graph."""
    found, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda g: found.append(g) or replay(g))
    return found


@needs_gpu
@pytest.mark.parametrize("name", VARIANTS)
def test_captured_runs_are_the_plain_ones_on_a_gpu(name, tokens, tmp_path, monkeypatch, replays):
    """On the same filled batches up to what kernels themselves leave open, on others' up to how
    sums are rounded."""
    stage, *changes = VARIANTS[name]
    changes = ("train.steps=30", "model.head_dim=16", *changes, "train.captured=true")
    train(config(tokens, tmp_path / "captured", *changes, stage=stage))
    assert log_lines(tmp_path / "captured", "start")[0]["captured"].startswith("yes")
    assert len(replays) > 5
    monkeypatch.setattr(backward, "Captured", Uncaptured)
    train(config(tokens, tmp_path / "again", *changes, stage=stage))
    ours, theirs = losses(tmp_path / "captured"), losses(tmp_path / "again")
    assert len(ours) == 20
    assert ours == pytest.approx(theirs, rel=1e-5)
    plain = (*changes[:-1], "train.captured=false")
    train(config(tokens, tmp_path / "plain", *plain, stage=stage))
    if "dropout" not in name:  # which place is dropped changes with the size
        assert ours == pytest.approx(losses(tmp_path / "plain"), rel=5e-3)


@needs_gpu
def test_a_captured_run_resumes_on_a_gpu(tokens, tmp_path, replays):
    """Interrupted it is what it would have been, though its first steps run as they do anyway."""
    changes = ("train.steps=30", "train.save_every=10", "model.head_dim=16", PADDED)
    train(config(tokens, tmp_path / "whole", *changes))
    assert len(replays) == 27  # all but the first three
    train_until(13, config(tokens, tmp_path / "halves", *changes))
    train(config(tokens, tmp_path / "halves", *changes), resume=True)
    ours, theirs = losses(tmp_path / "halves"), losses(tmp_path / "whole")
    assert ours == pytest.approx(theirs, rel=1e-5)
    for key, value in weights(tmp_path / "whole").items():
        torch.testing.assert_close(weights(tmp_path / "halves")[key], value, rtol=1e-3, atol=1e-4)
