"""Clips one after another in a row: the numbers of a padded batch, without its padding."""

import os

import pytest
import torch
from runs import config, log_lines, losses
from tokens import CODEBOOK_SIZE, NUM_CODEBOOKS, NUM_SEMANTIC

from configs.schema import ModelConfig
from model.attend import Attend, Segments
from model.backends import AttentionChoice, choose_packing, let_segments_grow
from model.stages import STAGES, Stage, stage_spec
from train import train

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTHS = (3, 11, 1, 7)
FULL = "padded batches would be at worst 50% full"
FLASH = AttentionChoice(("flash", "math"), "test")


def segments(device="cpu"):
    bounds = torch.tensor([0, *LENGTHS], device=device).cumsum(0).int()
    return Segments(LENGTHS, bounds, max(LENGTHS))


def crops(seed=0):
    """A padded Batch's tensors: four crops of 9, 2, 5 and 9 frames."""
    generator = torch.Generator().manual_seed(seed)
    semantic = torch.full((4, 9), -1)
    codes = torch.full((4, NUM_CODEBOOKS, 9), -1)
    for row, T in enumerate((9, 2, 5, 9)):
        semantic[row, :T] = torch.randint(NUM_SEMANTIC, (T,), generator=generator)
        shape = (NUM_CODEBOOKS, T)
        codes[row, :, :T] = torch.randint(CODEBOOK_SIZE, shape, generator=generator)
    return semantic, codes, torch.tensor([1, 0, 1, 0]) > 0, torch.tensor([1, 1, 0, 0]) > 0


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("backend", ["einsum", "math", "flash"])
def test_packed_equals_padded_forward_and_backward(name, backend):
    spec = stage_spec(name, NUM_SEMANTIC, NUM_CODEBOOKS, CODEBOOK_SIZE, 2)
    torch.manual_seed(0)
    sizes = {"dim": 32, "num_layers": 2, "num_heads": 4, "head_dim": 8, "num_kv_heads": 2}
    stage = Stage(spec, ModelConfig(**sizes), AttentionChoice((backend,), "test"))
    found = {}
    for packed in (False, True):
        batch = spec.sequences(*crops(), packed=packed)
        stage.zero_grad()
        nats = stage(batch)
        nats.sum().backward()
        found[packed] = (batch, nats, {n: p.grad.clone() for n, p in stage.named_parameters()})
    (padded, wanted, gradients), (packed, nats, others) = found[False], found[True]
    assert packed.ids.shape[:2] == (1, padded.num_places)
    assert packed.num_places == padded.num_places < padded.positions.numel()
    assert packed.num_targets == padded.num_targets
    assert padded.context == padded.positions.shape[1]
    assert packed.context < padded.context
    torch.testing.assert_close(nats, wanted)
    for key, gradient in gradients.items():
        torch.testing.assert_close(others[key], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("flash", [False, True])
def test_a_segment_hears_itself_alone(flash):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, sum(LENGTHS), 8) for heads in (4, 2, 2))
    attend = Attend(causal=True, flash=flash, choice=FLASH if flash else None)
    whole = attend(q, k, v, segments=segments())
    for other in (0, 1, 3):  # what the others hold is of no matter
        here, there = whole.split(LENGTHS, dim=2)[2], slice(*segments().bounds[other : other + 2])
        k[:, :, there], v[:, :, there] = 77.0, -5.0
        again = attend(q, k, v, segments=segments()).split(LENGTHS, dim=2)[2]
        assert torch.equal(here, again)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("heads", [(4, 1), (4, 2), (4, 4)])
def test_one_call_of_the_flash_kernel_equals_one_for_each_segment(heads):
    torch.manual_seed(0)
    h, g = heads
    lengths = (3, 300, 1, 129)
    q, k, v = (  # [1,h,M,d] as views of [1,M,h,d], as the projections give them
        torch.randn(1, sum(lengths), n, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for n in (h, g, g)
    )
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    bounds = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    out = Attend(causal=True, flash=True, choice=FLASH)(
        q, k, v, segments=Segments(lengths, bounds, 300)
    )
    alone = Attend(causal=True)
    pieces = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
    wanted = torch.cat([alone(*piece) for piece in pieces], dim=2)
    torch.testing.assert_close(out, wanted, atol=2e-2, rtol=2e-2)
    gradient = torch.randn_like(out)
    ours, theirs = (torch.autograd.grad(x, (q, k, v), gradient) for x in (out, wanted))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=4e-2, rtol=4e-2)


def test_packing_is_chosen_where_it_saves_and_can_be_done():
    cudnn, einsum = AttentionChoice(("cudnn",), "configured"), AttentionChoice(("einsum",), "test")
    assert choose_packing(None, 0.5, einsum, "cpu", 64) == (True, FULL)
    assert choose_packing(None, 0.9, einsum, "cpu", 64)[0] is False
    assert choose_packing(True, 0.5, FLASH, "cuda", 64)[0] is True
    assert choose_packing(None, 0.5, FLASH, "cuda", 64)[0] is True
    assert choose_packing(None, 0.5, FLASH, "mps", 64)[0] is False
    for choice, head_dim in ((cudnn, 64), (einsum, 64), (FLASH, 30)):
        assert not choose_packing(None, 0.5, choice, "cuda", head_dim)[0]
        with pytest.raises(ValueError, match=r"data.packed=true needs PyTorch's flash kernel"):
            choose_packing(True, 0.5, choice, "cuda", head_dim)
    assert choose_packing(False, 0.5, FLASH, "cuda", 64) == (False, "as configured")


def test_a_packed_run_learns_what_a_padded_one_does(tokens, tmp_path):
    for packed in (True, False):
        train(config(tokens, tmp_path / str(packed), f"data.packed={packed}"))
    tolerance = 2e-3 if torch.cuda.is_available() else 1e-4  # a GPU's products round to TF32
    assert losses(tmp_path / "True") == pytest.approx(losses(tmp_path / "False"), abs=tolerance)
    (line,) = log_lines(tmp_path / "True", "start")
    assert line["packed"] == "yes (as configured)"


def test_memory_that_grows_is_what_the_user_did_not_forbid(monkeypatch):
    ours, theirs = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
    monkeypatch.setattr("sys.platform", "linux")
    for name in (ours, theirs):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    let_segments_grow()
    assert os.environ[ours] == "expandable_segments:True"
    monkeypatch.setenv(ours, "max_split_size_mb:64")
    let_segments_grow()
    assert os.environ[ours] == "max_split_size_mb:64"
    monkeypatch.delenv(ours)
    monkeypatch.setenv(theirs, "max_split_size_mb:64")
    let_segments_grow()
    assert ours not in os.environ
