"""Training with the options that other tests leave at their defaults."""

import json
import shutil
from fractions import Fraction
from itertools import groupby, pairwise
from math import ceil, log2

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from runs import assert_same_run, config, log_lines, losses, train_until, weights
from tokens import SEMANTIC, write_tokens

from data.audio import read_audio
from data.shards import TokenFolder
from model.checkpoint import find_checkpoint, load_stage, read_state
from model.layouts import PAD
from train import Training, make_accelerator, train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def forget_precision():
    """Accelerate keeps the first precision of a process; a call forgets it."""
    AcceleratorState._reset_state()
    yield AcceleratorState._reset_state
    AcceleratorState._reset_state()


def test_bf16_learns_as_fp32_does(tokens, tmp_path, forget_precision):
    for kind in ("fp32", "bf16"):
        forget_precision()
        changes = (f"train.precision={kind}", "train.steps=40", "train.valid_every=20")
        train(config(tokens, tmp_path / kind, *changes))
    ours, theirs = losses(tmp_path / "bf16"), losses(tmp_path / "fp32")
    assert ours["valid", 40] < 0.5 * ours["train", 2]
    assert ours == pytest.approx(theirs, rel=0.05)
    assert ours != theirs  # or it was fp32 after all
    assert {t.dtype for t in weights(tmp_path / "bf16").values()} == {torch.float32}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("changes", [(), ("optim.muon_lr=0.02",), ("data.packed=true",)])
def test_a_step_never_waits_for_the_gpu(changes, tokens, tmp_path):
    settings = config(tokens, tmp_path / "run", "train.num_micro_batches=2", *changes)
    run = Training(settings, make_accelerator(settings), resume=False)
    batches = iter(run.loaders()[0])
    micro_batches = [next(batches) for _ in range(2)]
    for strict in (*[False] * 5, True):  # the fourth is captured, if any
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if strict else "default")
        try:
            norm = run.update(micro_batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert float(norm) > 0


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_kernels_equal_plain_ones(tokens, tmp_path, monkeypatch):
    """Training alone, at two lengths: what is compiled takes some ten seconds."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    nothing = {"loss": 0.0, "per_codebook": [], "bits_per_second": 0.0, "places": 0}
    monkeypatch.setattr(Training, "validate", lambda *_: dict(nothing))
    small = ("model.num_layers=3", "train.steps=3", "train.log_every=1", "data.crop_seconds=0.16")
    for choice in ("plain", "compiled"):
        torch._dynamo.utils.counters.clear()
        changes = (*small, f"train.kernels={choice}", "train.save_every=3")
        train(config(tokens, tmp_path / choice, *changes, stage="semantic"))
        # the layers share them; another graph may come for another length
        num_graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert num_graphs in (range(6, 13) if choice == "compiled" else (0,))
    ours, theirs = losses(tmp_path / "compiled"), losses(tmp_path / "plain")
    assert len(theirs) == 4
    tolerance = 2e-3 if torch.cuda.is_available() else 1e-4  # a GPU's products round to TF32
    assert ours == pytest.approx(theirs, abs=tolerance)
    compiled, plain = weights(tmp_path / "compiled"), weights(tmp_path / "plain")
    assert compiled.keys() == plain.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(compiled[name], tensor, atol=tolerance, rtol=1e-3)
    load_stage(tmp_path / "compiled")


def test_wsd_falls_at_the_end_of_a_run(tokens, tmp_path):
    changes = ("optim.schedule=wsd", "optim.decay_share=0.25", "train.log_every=1")
    train(config(tokens, tmp_path / "run", *changes))
    rates = [line["lr"] for line in log_lines(tmp_path / "run", "train")]
    thirds = [0.01 * n / 3 for n in (1, 2)]
    decay = [0.01 * (0.1 + 0.9 * share) for share in (2 / 3, 1 / 3, 0)]  # steps 10, 11 and 12
    assert rates == pytest.approx([*thirds, *[0.01] * 7, *decay])
    assert losses(tmp_path / "run")["valid", 12] < losses(tmp_path / "run")["valid", 6]


def test_a_run_without_averaged_weights(tokens, tmp_path):
    """Resumed to the bit, and sampled from the weights themselves."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(config(tokens, whole, "optim.ema_decay=0"))
    train_until(5, config(tokens, parts, "optim.ema_decay=0"))
    train(config(tokens, parts, "optim.ema_decay=0"), resume=True)
    assert_same_run(whole, parts, stems=("model", "optimizer"))
    assert not list(parts.glob("checkpoints/*/ema.safetensors"))
    stage, state = load_stage(find_checkpoint(parts))
    assert state["step"] == 12
    own = dict(stage.named_parameters())
    assert all(torch.equal(own[name], tensor) for name, tensor in weights(parts).items())


def test_loader_processes_change_nothing(tokens, tmp_path):
    micro, whole, parts = "train.num_micro_batches=2", tmp_path / "whole", tmp_path / "parts"
    train(config(tokens, whole, micro))
    train_until(5, config(tokens, parts, micro))
    train(config(tokens, parts, micro, "data.num_workers=2"), resume=True)
    assert_same_run(whole, parts)


def validation_windows(folder):
    """(clip, first frame, frame after the last) of 0.4 s each, in the order of validation."""
    return [
        (clip, a, min(a + 20, clip.num_frames))
        for clip in folder.clips("valid")
        for a in range(0, clip.num_frames, 20)
    ]


@pytest.mark.parametrize("rate", [25.0, 100 / 3, 80.0])
def test_streams_of_different_rates_stay_together(rate, tmp_path):
    """The codec has 50 frames a second. What a validation batch holds is what is in the files."""
    tokens = write_tokens(tmp_path, semantic={**SEMANTIC, "frame_rate": rate})
    run = Training(config(tokens, tmp_path / "run"), Accelerator(), resume=False)
    ratio = Fraction(rate / 50).limit_denominator(100)
    rows = [row for batch in run.loaders()[1] for row in batch.ids]  # [N,1] each
    for ids, (clip, a, b) in zip(rows, validation_windows(run.folder), strict=True):
        semantic, codes = (torch.tensor(t.astype(int)) for t in run.folder.read(clip))
        assert len(semantic) == ceil(clip.num_frames * ratio)
        same_time = semantic[None, int(a * ratio) : ceil(b * ratio)]
        ends = b == clip.num_frames
        expected, _ = run.spec.layout.encode(same_time, codes[:2, a:b], a == 0, ends)
        assert torch.equal(ids[: len(expected)], expected)
        assert (ids[len(expected) :] == PAD).all()


def test_rates_that_differ_are_learnt(tmp_path):
    tokens = write_tokens(tmp_path, semantic={**SEMANTIC, "frame_rate": 100 / 3})
    out = tmp_path / "run"
    train(config(tokens, out, "train.steps=60", "train.sample_every=60", stage="semantic"))
    first, last = log_lines(out, "start", "valid")[0], log_lines(out, "valid")[-1]
    assert last["bits_per_second"] < 0.75 * first["unigram"]["bits_per_second"]
    assert first["uniform"]["bits_per_second"] == pytest.approx(100 / 3 * log2(12))
    clips = TokenFolder(tokens).clips("valid")[:2]
    made = [json.loads(file.read_text()) for file in sorted(out.glob("samples/*/*.made.json"))]
    assert [preview["clip"] for preview in made] == [clip.name for clip in clips]
    most = [min(clip.num_semantic, round(0.4 * 100 / 3)) for clip in clips]
    assert all(0 < len(x["tokens"][0]) <= n for x, n in zip(made, most, strict=True))


def test_repeats_are_dropped_and_nothing_else(tokens, tmp_path):
    """data.collapse_semantic, with which the semantic stage never sees a token twice in a row."""
    on = "data.collapse_semantic=true"
    train(config(tokens, tmp_path / "coarse", on))
    assert read_state(find_checkpoint(tmp_path / "coarse"))["collapse_semantic"] is True
    with pytest.raises(ValueError, match=r"as it was begun \(data.collapse_semantic"):
        train(config(tokens, tmp_path / "coarse", "train.steps=14"), resume=True)
    changes = (on, "train.steps=60", "train.sample_every=60")
    run = train(config(tokens, tmp_path / "semantic", *changes, stage="semantic"))
    rows = [row for batch in run.loaders()[1] for row in batch.ids]
    for ids, (clip, a, b) in zip(rows, validation_windows(run.folder), strict=True):
        semantic = torch.tensor(run.folder.read(clip)[0][a:b].astype(int))
        once = torch.tensor([int(token) for token, _ in groupby(semantic.tolist())])[None]
        expected, _ = run.spec.layout.encode(None, once, a == 0, b == clip.num_frames)
        assert torch.equal(ids[: len(expected)], expected)
        assert (ids[len(expected) :] == PAD).all()
    for file in (tmp_path / "semantic").glob("samples/*/*.json"):
        made = json.loads(file.read_text())["tokens"][0]
        assert all(a != b for a, b in pairwise(made))


@pytest.mark.parametrize(
    ("stage", "num_codebooks", "kind"),
    [("coarse", 2, "fp32"), ("fine", 4, "bf16"), ("acoustic", 4, "fp32")],
)
def test_previews_are_heard(stage, num_codebooks, kind, decodable, tmp_path, forget_precision):
    """Of two clips three wavs every 6 steps, each what its JSON decodes to, none longer than its
    clip: made from its condition, continued after its first half, its own codes."""
    changes = ("train.sample_every=6", "train.sample_seconds=0.3", f"train.precision={kind}")
    run = train(config(decodable, tmp_path / "run", *changes, stage=stage))
    assert sorted(f.name for f in (tmp_path / "run/samples").iterdir()) == [
        "step-00000006",
        "step-00000012",
    ]
    clips = {clip.name: clip for clip in run.folder.clips("valid")[:2]}
    wavs = sorted((tmp_path / "run/samples").glob("*/*.wav"))
    assert len(wavs) == 2 * 2 * 3
    first, last = (0, 2) if stage == "coarse" else (2, 4) if stage == "fine" else (0, 4)
    for path in wavs:
        made = json.loads(path.with_suffix(".json").read_text())
        tokens = torch.tensor(made["tokens"])
        clip = clips[made["clip"]]
        wav, rate = read_audio(path)
        assert rate == 16_000
        assert wav.shape == (1, 320 * tokens.shape[1])
        assert tokens.shape[0] == num_codebooks
        assert 0 < tokens.shape[1] <= min(15, clip.num_frames)
        own = torch.tensor(run.folder.read(clip)[1].astype(int))[:, :15]
        if stage == "fine":  # its coarse codes are those of the clip
            assert torch.equal(tokens[:2], own[:2, : tokens.shape[1]])
        version = path.suffixes[-2][1:]
        given = {"made": 0, "continued": own.shape[1] // 2, "real": own.shape[1]}[version]
        assert torch.equal(tokens[first - last :, :given], own[first:last, :given])
        heard = run.codec.decode(tokens[None].to(run.process.device))[0].clamp(-1, 1)
        torch.testing.assert_close(wav, heard.cpu(), atol=1e-4, rtol=0)
