"""Pretraining the small HuBERT: masks, crops, the loss, and whole tiny runs to a tokenizer."""

import json
import math
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from configs.load import load_config
from configs.semantic_schema import (
    SemanticDataConfig,
    SemanticTrainConfig,
    SmallHubertConfig,
)
from data.audio import save_audio
from data.segments import FULL_SCALE, decode_recordings, find_split
from model.checkpoint import find_checkpoint, list_checkpoints, read_tensors
from model.hubert import (
    HOP_LENGTH,
    TEMPERATURE,
    MaskedPrediction,
    build_hubert,
    level,
    load_hubert,
    loss_weights,
    pad_to_frames,
    span_mask,
)
from model.semantic import MfccConfig, MfccKMeans, load_semantic
from scripts import fit_kmeans, tokenizer_trainer, train_semantic
from scripts.semantic_segments import LabelledSegments

RATE = 16_000
TINY = SmallHubertConfig((8,) * 7, 16, 3, 2, 32, 8, 4, dropout=0.0)
RECIPES = sorted((Path(__file__).parent.parent / "configs").glob("hubert_*.yaml"))


def voice(seconds: float, seed: int) -> torch.Tensor:
    """wav [1, L] of 0.1 s tones at five pitches: what comes next can be guessed."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(int(seconds * RATE)) / RATE
    pitch = 200 * 1.5 ** ((time * 10).long() % 5)
    return (0.2 * torch.sin(2 * math.pi * pitch * time))[None] + 0.002 * torch.randn(
        1, len(time), generator=generator
    )


@pytest.fixture(scope="module")
def audio(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audio")
    lines = []
    for i in range(6):
        save_audio(folder / f"{i}.wav", voice(0.31 + 0.4 * i, i), RATE)
        lines.append(json.dumps({"path": f"{i}.wav", "split": "train" if i < 4 else "valid"}))
    (folder / "manifest.jsonl").write_text("\n".join(lines))
    return folder / "manifest.jsonl"


@pytest.fixture(scope="module")
def labels(audio, tmp_path_factory):
    folder = tmp_path_factory.mktemp("labels") / "mfcc"
    fit(audio, folder, "mfcc")
    return folder


def fit(audio, out, features, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        options = ["--audio", audio, "--features", features, "--num-tokens", 8, "--out", out]
        patch.setattr("sys.argv", ["fit_kmeans", *map(str, [*options, *arguments])])
        fit_kmeans.main()


def run(audio, labels, out, *extra: str, resume: bool = False) -> None:
    tiny = ["train.steps=6", "train.batch_size=3", "train.log_every=2", "train.num_valid_clips=2"]
    tiny += ["data.segment_seconds=0.8", "optim.warmup_steps=2", "model.dropout=0.1"]
    arguments = ["--config", "configs/hubert_tiny.yaml", f"data.audio={audio}", f"out={out}"]
    arguments += [f"labels={labels}", *tiny, *extra, *["--resume"] * resume]
    train_semantic.main(arguments)


def state(out) -> dict[str, torch.Tensor]:
    folder = find_checkpoint(out)
    stems = [path.stem for path in folder.glob("*.safetensors")]
    return {f"{stem}/{k}": v for stem in stems for k, v in read_tensors(folder, stem).items()}


def log(out, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


@pytest.fixture(scope="module")
def whole(audio, labels, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    run(audio, labels, out)
    return out


# ---- masks, crops, loss --------------------------------------------------------------------------


def test_masks_cover_about_half_in_spans():
    draws = torch.rand(500, 301, generator=torch.Generator().manual_seed(0))
    frames = torch.full((500,), 300)
    mask = span_mask(draws, frames, 0.8, 10)
    assert mask.shape == (500, 300)
    assert mask.float().mean() == pytest.approx(0.56, abs=0.01)  # 1 - (1 - 10 / 291) ** 24
    assert mask[:, 140:160].float().mean() == pytest.approx(0.57, abs=0.03)
    for row in mask[:50].int().tolist():
        spans = re.findall("1+", "".join(map(str, row)))
        assert min(map(len, spans)) >= 10
        assert 1 <= len(spans) <= 24
    assert torch.equal(mask, span_mask(draws, frames, 0.8, 10))
    counts = span_mask(draws, frames, 0.35, 10).sum(1)  # 10.5 spans: 10 or 11, at random
    assert counts.max() <= 110


def test_masks_keep_to_the_frames_of_each_clip():
    draws = torch.rand(4, 41, generator=torch.Generator().manual_seed(0))
    frames = torch.tensor([40, 15, 10, 3])
    mask = span_mask(draws, frames, 0.8, 10)
    assert not (mask & (torch.arange(40) >= frames[:, None])).any()
    assert mask.sum(1)[1:].tolist() == [mask[1].sum(), 10, 3]  # a short clip is masked whole
    assert 10 <= mask[1].sum() <= 15
    longer = span_mask(draws.repeat(2, 1), frames.repeat(2), 0.8, 10)
    assert torch.equal(longer[:4], mask)


@pytest.fixture(scope="module")
def segments(audio, labels):
    recordings = decode_recordings(find_split(audio, "train"), RATE)
    config = SemanticDataConfig("x", 0.8, 0.0, (0.0, 0.0), 0.0)
    return LabelledSegments(recordings, load_semantic(str(labels)), config)


def test_crops_carry_the_labels_of_their_frames(segments, labels):
    wav, tokens, frames = segments.random_crops(np.random.default_rng(0), 32)
    assert (wav.shape, tokens.shape) == ((32, 12_800), (32, 40))
    assert set(frames.tolist()) == {16, 36, 40}  # of 0.31 s, of 0.71 s, of longer ones
    tokenizer, cuts = load_semantic(str(labels)), {}
    for start, length in zip(segments.starts, segments.lengths, strict=True):
        whole = segments.samples[start : start + length].float() / FULL_SCALE  # [L]
        whole_tokens = tokenizer.encode(whole[None, None])[0]
        for first in range(len(whole_tokens)):
            cut = whole[first * HOP_LENGTH :][:12_800]
            cuts[cut.numpy().tobytes()] = whole_tokens[first:][:40].tolist()
    for row, found, T in zip(wav, tokens, frames.tolist(), strict=True):
        cut = row[: T * HOP_LENGTH]
        expected = next(
            cuts[cut[:n].numpy().tobytes()]
            for n in range(len(cut), len(cut) - HOP_LENGTH, -1)  # zeros fill the last frame
            if cut[:n].numpy().tobytes() in cuts
        )
        assert found[:T].tolist() == expected
    again = segments.random_crops(np.random.default_rng(0), 32)
    assert all(map(torch.equal, (wav, tokens, frames), again))
    other = segments.random_crops(np.random.default_rng(1), 32)
    assert not torch.equal(wav, other[0])


def test_labels_are_those_of_the_recording_at_its_own_speed(audio, labels, segments):
    speeds = (0.8, 1.0, 1.25)
    recordings = decode_recordings(find_split(audio, "train"), RATE, speeds)
    found = LabelledSegments(recordings, load_semantic(str(labels)), segments.config, speeds)
    for i in range(len(segments.lengths)):
        plain = segments.labels[segments.label_starts[i] :][: -(-segments.lengths[i] // HOP_LENGTH)]
        for version, speed in enumerate(speeds):
            n = 3 * i + version
            played = found.labels[found.label_starts[n] :][: -(-found.lengths[n] // HOP_LENGTH)]
            assert len(played) == pytest.approx(len(plain) / speed, abs=1)
            expected = [
                plain[min(int((t + 0.5) * speed), len(plain) - 1)] for t in range(len(played))
            ]
            assert played.tolist() == [int(token) for token in expected]


def test_disturbed_crops(segments, monkeypatch):
    clean = segments.random_crops(np.random.default_rng(0), 16)
    config = SemanticDataConfig("x", 0.8, 1.0, (3.0, 3.0), 0.0)
    monkeypatch.setattr(segments, "config", config)
    mixed = segments.random_crops(np.random.default_rng(0), 16)
    assert torch.equal(mixed[1], clean[1])
    added = mixed[0] - clean[0]
    touched = (added.abs() > 1e-5).float().mean(1)
    assert 0 < touched.max() <= 0.5
    outside = torch.arange(12_800) >= clean[2][:, None] * HOP_LENGTH
    assert not mixed[0][outside].any()
    config = SemanticDataConfig("x", 0.8, 0.0, (0.0, 0.0), 1.0, (10.0, 10.0))
    monkeypatch.setattr(segments, "config", config)
    noise = segments.random_crops(np.random.default_rng(0), 16)[0] - clean[0]
    snr = 10 * (clean[0].square().sum(1) / noise.square().sum(1)).log10()
    assert torch.allclose(snr, torch.tensor(10.0), atol=0.3)


def test_the_loss_is_that_of_torchaudios_own_forward():
    torch.manual_seed(0)
    model = MaskedPrediction(TINY, 7).eval()
    wav = 0.1 * torch.randn(3, 9600)
    frames = torch.tensor([30, 20, 11])
    wav = wav * (torch.arange(9600) < 320 * frames[:, None])
    labels = torch.randint(0, 7, (3, 30))
    mask = span_mask(torch.rand(3, 31), frames, 0.8, 10)
    nats, right, penalty = model(wav, labels, frames, mask)

    def fixed_mask(x, _):
        x[mask] = model.hubert.mask_generator.mask_embedding
        return x, mask

    generator, embedding = model.hubert.mask_generator, model.hubert.mask_generator.mask_embedding
    model.hubert.mask_generator = torch.nn.Module()
    model.hubert.mask_generator.mask_embedding = embedding
    model.hubert.mask_generator.forward = fixed_mask
    with torch.no_grad():
        padded = pad_to_frames(level(wav, 320 * frames[:, None]), 400, 320)
        masked, heard, expected = model.hubert(padded, labels, 320 * frames + 80)
    model.hubert.mask_generator = generator
    zeros = torch.zeros(len(masked), dtype=torch.int64)  # the right class comes first
    torch.testing.assert_close(nats[mask], F.cross_entropy(masked, zeros, reduction="none"))
    assert torch.equal(right[mask], masked[:, 1:].max(1).values <= masked[:, 0])
    weights = loss_weights(mask, frames, 0.5)
    zeros = torch.zeros(len(heard), dtype=torch.int64)
    torch.testing.assert_close(
        nats[weights == 0.5], F.cross_entropy(heard, zeros, reduction="none")
    )
    assert weights.sum() == len(masked) + 0.5 * len(heard) == mask.sum() + 0.5 * (61 - mask.sum())
    assert penalty.item() == pytest.approx(expected.item())
    assert masked.max() <= 1 / TEMPERATURE + 1e-4


def test_the_step_weighs_what_is_not_masked(whole, tmp_path):
    plain = ["loss.unmasked=0.5", "loss.feature_penalty=0", "model.dropout=0", f"out={tmp_path}"]
    config = load_config(SemanticTrainConfig, whole / "config.yaml", plain)
    trainer = train_semantic.Trainer(config, resume=False)
    wav, tokens, frames = trainer.segments.random_crops(np.random.default_rng(1), 3)
    mask = span_mask(torch.rand(3, 41), frames, 0.8, 10)
    nats, _, _ = trainer.module(wav, tokens, frames, mask)
    heard = ~mask & (torch.arange(40) < frames[:, None])
    mean = (nats[mask].sum() + 0.5 * nats[heard].sum()) / (mask.sum() + 0.5 * heard.sum())
    embeddings, found = trainer.module.hubert.logit_generator.label_embeddings, {}
    expected = torch.autograd.grad(mean, embeddings)[0]
    embeddings.register_post_accumulate_grad_hook(lambda p: found.update(grad=p.grad.clone()))
    logged = trainer._update("step", wav, tokens, frames, mask)
    torch.testing.assert_close(found["grad"], expected)
    torch.testing.assert_close(logged["loss"], nats[mask].mean().detach())


def test_gradient_multiplier_and_export():
    wav, labels = 0.1 * torch.randn(2, 6400), torch.zeros(2, 20, dtype=torch.int64)
    frames, mask = torch.tensor([20, 20]), torch.ones(2, 20, dtype=torch.bool)
    gradients = []
    for mult in (1.0, 0.1):
        torch.manual_seed(0)
        model = MaskedPrediction(TINY, 7, mult)
        model(wav, labels, frames, mask)[0].sum().backward()
        gradients.append(next(model.hubert.wav2vec2.feature_extractor.parameters()).grad)
    torch.testing.assert_close(gradients[0] * 0.1, gradients[1])
    model.eval()
    hubert = build_hubert(TINY, model.weights(), 2)
    features = hubert.extract_features(wav)[0]
    expected = model.hubert.wav2vec2.extract_features(wav)[0]
    assert len(features) == 2
    torch.testing.assert_close(features[1], expected[1], atol=0.02, rtol=0.02)  # fp16 weights
    with pytest.raises(ValueError, match="layer 4 asked for, it has 1 to 3"):
        build_hubert(TINY, model.weights(), 4)
    with pytest.raises(ValueError, match="weights of another architecture"):
        build_hubert(SmallHubertConfig((8,) * 7, 32, 3, 2, 32, 8, 4), model.weights(), 2)


# ---- runs ----------------------------------------------------------------------------------------


def test_a_run_learns_below_the_unigram(audio, labels, tmp_path):
    out = tmp_path / "run"
    run(
        audio,
        labels,
        out,
        "train.steps=80",
        "train.batch_size=8",
        "optim.lr=3e-3",
        "optim.muon_lr=1e-2",
        "model.dropout=0",
    )
    train, valid = log(out, "train"), log(out, "valid")[-1]
    assert train[-1]["loss"] < 0.6 * train[0]["loss"]
    assert valid["loss"] < 0.8 * valid["unigram"]
    assert 0.4 < valid["accuracy"] <= 1
    assert 0 < valid["unigram"] < math.log(8) + 0.5
    config = load_config(SemanticTrainConfig, out / "config.yaml")
    assert config.train.steps == 80
    assert not list(out.rglob("*.part"))


def test_resumed_equals_uninterrupted(audio, labels, whole, tmp_path, monkeypatch):
    out, step = tmp_path / "cut", train_semantic.Trainer.train_step

    def interrupted_in_the_fourth(self):
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    monkeypatch.setattr(train_semantic.Trainer, "train_step", interrupted_in_the_fourth)
    with pytest.raises(SystemExit) as stop:
        run(audio, labels, out)
    monkeypatch.undo()
    assert stop.value.code == 130
    assert find_checkpoint(out).name == "step-00000004"
    run(audio, labels, out, resume=True)
    expected, found = state(whole), state(out)
    assert expected.keys() == found.keys()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    assert [entry["loss"] for entry in log(out, "train")] == [
        entry["loss"] for entry in log(whole, "train")
    ]
    assert log(out, "valid")[-1]["loss"] == log(whole, "valid")[-1]["loss"]
    assert len(list_checkpoints(out)) == 1


def test_from_a_run_to_a_tokenizer_to_the_next_run(audio, whole, tmp_path):
    fit(audio, tmp_path / "s", whole, "--layer", 1)
    tokenizer = load_semantic(str(tmp_path / "s"))
    assert (tokenizer.num_tokens, tokenizer.frame_rate, tokenizer.config.layer) == (8, 50, 1)
    assert len(tokenizer.hubert.encoder.transformer.layers) == 1
    assert {p.name for p in (tmp_path / "s").iterdir()} == {"config.json", "semantic.safetensors"}
    shutil.copytree(tmp_path / "s", tmp_path / "moved")
    assert load_semantic(str(tmp_path / "moved")).fingerprint == tokenizer.fingerprint
    fit(audio, tmp_path / "again", whole / "hubert", "--layer", 1)
    assert load_semantic(str(tmp_path / "again")).fingerprint == tokenizer.fingerprint
    fit(audio, tmp_path / "other", whole, "--layer", 2)
    assert load_semantic(str(tmp_path / "other")).fingerprint != tokenizer.fingerprint
    _, weights = load_hubert(whole)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    run(audio, tmp_path / "s", tmp_path / "next", "train.steps=1")
    assert json.loads((tmp_path / "next/hubert/config.json").read_text())["labels"] == (
        tokenizer.fingerprint
    )


def test_validates_and_saves_on_the_way(audio, labels, tmp_path):
    run(audio, labels, tmp_path / "run", "train.valid_minutes=1e-9", "train.steps=2")
    assert [entry["step"] for entry in log(tmp_path / "run", "valid")] == [1, 2, 2]


def test_refusals(audio, labels, whole, tmp_path):
    with pytest.raises(ValueError, match="not empty; continue it with --resume"):
        run(audio, labels, whole)
    with pytest.raises(ValueError, match=r"begun \(model\.dim: 32 -> 16\)"):
        run(audio, labels, whole, "model.dim=16", resume=True)
    with pytest.raises(ValueError, match="not a semantic tokenizer"):
        run(audio, tmp_path / "nothing", tmp_path / "x")
    with pytest.raises(ValueError, match=r"model\.dim=30: not a multiple of model\.position_group"):
        run(audio, labels, tmp_path / "x", "model.dim=30")
    with pytest.raises(ValueError, match=r"conv_channels=.*seven numbers"):
        run(audio, labels, tmp_path / "x", "model.conv_channels=[8,8]")
    fit(audio, tmp_path / "refitted", "mfcc", "--seed", 1)
    with pytest.raises(ValueError, match="not the tokenizer that this run was begun with"):
        run(audio, tmp_path / "refitted", whole, resume=True)
    slow = MfccKMeans(MfccConfig(hop_length=640))
    slow.set_codebook(torch.zeros(91), torch.ones(91), torch.randn(4, 91))
    slow.save(tmp_path / "slow")
    with pytest.raises(ValueError, match="not 50 frames/s at 16 kHz"):
        run(audio, tmp_path / "slow", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_refusals_of_fit_kmeans(audio, whole, tmp_path):
    with pytest.raises(ValueError, match=r"--features hubert_bass: none of mfcc, hubert_base.*run"):
        fit(audio, tmp_path / "x", "hubert_bass")
    with pytest.raises(ValueError, match="no HuBERT here; pass the out=FOLDER"):
        fit(audio, tmp_path / "x", tmp_path)
    with pytest.raises(ValueError, match="whole: layer 7 asked for, it has 1 to 2"):
        fit(audio, tmp_path / "x", whole)
    shutil.copytree(whole / "hubert", tmp_path / "hubert")
    weights = tmp_path / "hubert/hubert.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(ValueError, match="hubert: damaged or not ours"):
        fit(audio, tmp_path / "x", tmp_path, "--layer", 1)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_runs_a_step(recipe, audio, labels, tmp_path):
    small = ["train.steps=1", "train.batch_size=1", "train.compile=false"]
    paths = [f"data.audio={audio}", f"labels={labels}", f"out={tmp_path / 'run'}"]
    train_semantic.main(["--config", str(recipe), *small, *paths])
    assert (tmp_path / "run/hubert/hubert.safetensors").is_file()


def test_what_may_change_at_a_resume():
    may = ("out", "labels", "data.audio", "optim.lr", "train.steps", "train.compile", "wandb.mode")
    assert all(map(tokenizer_trainer.CHANGEABLE.fullmatch, may))
    fixed = ("model.dim", "loss.mask_span", "data.mix_share", "train.batch_size", "train.seed")
    assert not any(map(tokenizer_trainer.CHANGEABLE.fullmatch, fixed))
