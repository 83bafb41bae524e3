"""Filled-up batches count as they did, and passes that are captured on them are the plain ones."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import assert_same_run, config, log_lines, losses, train_until, weights
from tokens import CODEBOOK_SIZE, NUM_CODEBOOKS, NUM_SEMANTIC

import train as module
from configs.schema import ModelConfig
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


def crops(sizes, seed=0):
    """A padded Batch's tensors of crops of so many frames; do they start and end?"""
    generator, B = torch.Generator().manual_seed(seed), len(sizes)
    semantic = torch.full((B, LONGEST), -1)
    codes = torch.full((B, NUM_CODEBOOKS, LONGEST), -1)
    for row, (T, *_) in enumerate(sizes):
        semantic[row, :T] = torch.randint(NUM_SEMANTIC, (T,), generator=generator)
        shape = (NUM_CODEBOOKS, T)
        codes[row, :, :T] = torch.randint(CODEBOOK_SIZE, shape, generator=generator)
    starts, ends = (torch.tensor([size[n] for size in sizes]) for n in (1, 2))
    return semantic, codes, starts, ends


def make(name, pattern="auto"):
    return stage_spec(name, NUM_SEMANTIC, NUM_CODEBOOKS, CODEBOOK_SIZE, 2, pattern=pattern)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("pattern", ["flatten", "delay"])
@pytest.mark.parametrize("name", STAGES)
@given(sizes=CROPS.map(lambda found: found[:4]))
@settings(max_examples=40, deadline=None)
def test_every_batch_fits_and_keeps_its_clips(name, pattern, packed, sizes):
    spec = make(name, pattern)
    fixed = Sizes(4, spec.longest(LONGEST, LONGEST, packed))
    batch = spec.sequences(*crops(sizes), packed=packed)
    found = fixed.fill(batch)
    N = found.positions.shape[1]
    if found is batch:  # so many targets at so few places as few batches have
        assert packed
        return
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


def test_few_sizes_of_a_packed_row():
    spec = make("coarse")
    fixed = Sizes(32, spec.longest(500, 500, True))
    draw, seen = torch.Generator().manual_seed(0), set()
    for _ in range(60):
        lengths = torch.randint(100, 501, (32,), generator=draw).tolist()
        encoded = [(torch.zeros(3 * n, 1).long(), torch.full((3 * n, 2), IGNORE)) for n in lengths]
        for ids, _ in encoded:
            ids[0] = 1
        found = fixed.fill(spec.layout.pack(encoded))
        seen.add(tuple(t.shape for t in found.tensors().values()))
        assert found.positions.shape[1] - found.num_places < 0.07 * fixed.longest.num_places * 32
    assert 1 < len(seen) < 7


def test_what_is_longer_than_expected_is_left_alone():
    spec = make("coarse")
    for packed in (False, True):
        batch = spec.sequences(*crops([(9, True, True)] * 4), packed=packed)
        assert Sizes(4, spec.longest(5, 5, packed)).fill(batch) is batch


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", STAGES)
def test_filled_batches_give_the_same_nats_and_gradients(name, packed):
    spec = make(name)
    torch.manual_seed(0)
    sizes = {"dim": 32, "num_layers": 2, "num_heads": 4, "head_dim": 8, "num_kv_heads": 2}
    stage = Stage(spec, ModelConfig(**sizes))
    batch = spec.sequences(*crops([(8, 1, 1), (2, 0, 0), (5, 1, 0), (7, 0, 1)]), packed=packed)
    filled = Sizes(4, spec.longest(LONGEST, LONGEST, packed)).fill(batch)
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


def test_captured_is_chosen_on_one_gpu():
    assert choose_captured(None, "cuda", 1)[0] is True
    assert choose_captured(None, "cuda", 2) == (False, "that takes one process")
    assert choose_captured(None, "cpu", 1) == (False, "that takes a CUDA GPU")
    assert choose_captured(False, "cuda", 1) == (False, "as configured")
    with pytest.raises(ValueError, match=r"train\.captured=true needs a CUDA GPU and one process"):
        choose_captured(True, "cpu", 2)


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
    monkeypatch.setattr(module, "Sizes", lambda *_: None)  # nothing filled: to the bit
    train(config(tokens, tmp_path / "ragged", *changes))
    assert_same_run(tmp_path / "ragged", tmp_path / "plain")


VARIANTS = {
    "padded": ("data.packed=false",),
    "packed": ("data.packed=true",),
    "dropout": ("data.packed=true", "model.dropout=0.2"),
    "muon, micro-batches": ("optim.muon_lr=0.02", "train.num_micro_batches=2"),
    "delay": ("pattern=delay",),
    "loader": ("data.packed=true", "data.num_workers=2", "train.batch_size=32"),
}


@needs_gpu
@pytest.mark.parametrize("name", VARIANTS)
def test_captured_runs_are_the_plain_ones_on_a_gpu(name, tokens, tmp_path, monkeypatch):
    """To the bit, on the same filled batches, where the kernels themselves give the same bits."""
    changes = ("train.steps=24", "model.head_dim=16", *VARIANTS[name])
    train(config(tokens, tmp_path / "captured", *changes))
    assert log_lines(tmp_path / "captured", "start")[0]["captured"].startswith("yes")
    monkeypatch.setattr(backward, "Captured", Uncaptured)
    train(config(tokens, tmp_path / "again", *changes))
    ours, theirs = losses(tmp_path / "captured"), losses(tmp_path / "again")
    assert len(ours) == 16
    assert ours == pytest.approx(theirs, rel=1e-5)
    monkeypatch.undo()
    train(config(tokens, tmp_path / "plain", *changes, "train.captured=false"))
    if "dropout" not in name:  # which place is dropped changes with the size
        assert ours == pytest.approx(losses(tmp_path / "plain"), rel=5e-3)


@needs_gpu
def test_a_captured_run_is_captured_and_resumes_on_a_gpu(tokens, tmp_path, monkeypatch):
    """Few sizes, so graphs are replayed; interrupted it is what it would have been."""
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda g: replays.append(g) or replay(g))
    changes = ("train.steps=30", "train.save_every=10", "model.head_dim=16", "data.packed=false")
    train(config(tokens, tmp_path / "whole", *changes))
    assert len(replays) == 27  # all but the first three
    train_until(13, config(tokens, tmp_path / "halves", *changes))
    train(config(tokens, tmp_path / "halves", *changes), resume=True)
    ours, theirs = losses(tmp_path / "halves"), losses(tmp_path / "whole")
    assert ours == pytest.approx(theirs, rel=1e-5)
    for key, value in weights(tmp_path / "whole").items():
        torch.testing.assert_close(weights(tmp_path / "halves")[key], value, rtol=1e-3, atol=1e-4)
