"""Training the codec: segments, losses, balancer, and whole tiny runs on synthetic voices."""

import json
import math
import os
import shutil
import signal

import pytest
import torch
from accelerate import Accelerator

from configs.codec_schema import CodecOptimConfig, CodecTrainConfig
from configs.load import load_config
from data.audio import save_audio
from data.segments import RandomSegments, decode_recordings, find_split, spread
from model.checkpoint import find_checkpoint, list_checkpoints, read_tensors
from model.codec import fold_weight_norm, load_codec
from scripts import tokenizer_trainer, train_codec
from scripts.codec_losses import Balancer, MelDistance
from scripts.codec_metrics import mel_distance, stoi

RATE = 8000


def voice(seconds: float, seed: int) -> torch.Tensor:
    """Speech-like wav [1, L]: harmonics of a gliding pitch under syllables, plus a little noise."""
    torch.manual_seed(seed)
    time = torch.arange(int(seconds * RATE)) / RATE
    phase = 2 * math.pi * (110 + 20 * seed % 60) * (time + 0.02 * torch.sin(5 * time))
    harmonics = sum(torch.sin(n * phase) / n for n in range(1, 12))
    syllables = torch.sin(2 * math.pi * 3 * time).clamp(min=0)
    return (0.15 * harmonics * syllables + 0.002 * torch.randn(len(time)))[None]


@pytest.fixture(scope="module")
def audio(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audio")
    lines = []
    for i in range(6):
        save_audio(folder / f"{i}.wav", voice(0.3 + 0.4 * i, i), RATE)
        split = "train" if i < 4 else "valid"
        lines.append(json.dumps({"path": f"{i}.wav", "split": split}))
    (folder / "broken.wav").write_bytes(b"RIFF nothing")
    lines.append(json.dumps({"path": "broken.wav", "split": "train"}))
    (folder / "manifest.jsonl").write_text("\n".join(lines))
    return folder / "manifest.jsonl"


def run(audio, out, *extra: str, resume: bool = False) -> None:
    tiny = ["train.steps=6", "train.batch_size=2", "train.log_every=2", "train.num_valid_clips=2"]
    tiny += ["loss.quantize_from_step=1", "loss.adversarial_from_step=3"]
    tiny += ["optim.warmup_steps=2", "model.num_codebooks=2"]
    arguments = ["--config", "configs/codec_tiny.yaml", f"data.audio={audio}", f"out={out}"]
    train_codec.main(arguments + tiny + list(extra) + ["--resume"] * resume)


def state(out) -> dict[str, torch.Tensor]:
    folder = find_checkpoint(out)
    stems = [path.stem for path in folder.glob("*.safetensors")]
    return {f"{stem}/{k}": v for stem in stems for k, v in read_tensors(folder, stem).items()}


def log(out) -> list[dict]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] != "start"]


@pytest.fixture(scope="module")
def whole(audio, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    run(audio, out)
    return out


def test_a_run_leaves_a_codec_samples_and_a_log(whole):
    codec = load_codec(str(whole / "codec"))
    wav = voice(0.5, 1)[None]
    assert codec.decode(codec.encode(wav), length=wav.shape[-1]).shape == wav.shape
    assert {p.name for p in (whole / "samples").iterdir()} == {
        f"{i}_{kind}.wav" for i in range(2) for kind in ("original", "decoded")
    }
    entries = log(whole)
    kinds = [(entry["kind"], entry["step"]) for entry in entries]
    assert kinds == [("train", 2), ("train", 4), ("train", 6), ("valid", 6)]
    assert "adversarial" not in entries[0]
    assert entries[1]["adversarial"] > 0
    assert entries[2]["lr"] < entries[0]["lr"]
    assert entries[3]["mel"] > 0
    config = load_config(CodecTrainConfig, whole / "config.yaml")
    assert config.train.steps == 6
    assert not list(whole.rglob("*.part"))


def test_resumed_equals_uninterrupted(audio, whole, tmp_path, monkeypatch):
    out = tmp_path / "cut"
    take_step = train_codec.Trainer.train_step

    def interrupted_in_the_fourth(self):
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return take_step(self)

    monkeypatch.setattr(train_codec.Trainer, "train_step", interrupted_in_the_fourth)
    with pytest.raises(SystemExit) as stop:
        run(audio, out)
    monkeypatch.undo()
    assert stop.value.code == 130
    assert find_checkpoint(out).name == "step-00000004"
    assert load_codec(str(out / "codec")).num_codebooks == 2  # usable as far as it got
    run(audio, out, resume=True)
    expected, found = state(whole), state(out)
    assert expected.keys() == found.keys()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    codecs = [load_codec(str(folder / "codec")) for folder in (whole, out)]
    assert codecs[0].fingerprint == codecs[1].fingerprint
    assert [entry["step"] for entry in log(out)] == [2, 4, 6, 6]
    assert len(list_checkpoints(out)) == 1


def test_a_run_can_start_from_the_codec_of_another(audio, whole, tmp_path, monkeypatch):
    """It begins as good as that one is, quantised from the first step, and learns from there."""
    source, found = load_codec(str(whole / "codec")), []
    step = train_codec.Trainer.train_step

    def watched(trainer):
        if trainer.step == 0:
            found.append({k: v.clone() for k, v in trainer.average.state_dict().items()})
        losses = step(trainer)
        found.append(float(losses["quantizer_error"]))
        return losses

    monkeypatch.setattr(train_codec.Trainer, "train_step", watched)
    start = f"train.start_from={whole / 'codec'}"
    run(audio, tmp_path / "next", start, "train.steps=3", "loss.quantize_from_step=100")
    first = fold_weight_norm(found[0])
    for key, value in source.state_dict().items():
        if not key.endswith(("cluster_size", "embed_avg")):
            torch.testing.assert_close(first[key], value)
    assert all(error > 0 for error in found[1:])
    book = load_codec(str(tmp_path / "next/codec")).quantizer.vq.layers[0]._codebook.embed
    before = source.quantizer.vq.layers[0]._codebook.embed
    assert 0 < (book - before).norm() < 0.5 * before.norm()
    with pytest.raises(ValueError, match=r"start_from=.*set the same model"):
        run(audio, tmp_path / "other", start, "model.dimension=8")
    assert not (tmp_path / "other" / "config.yaml").exists()


def test_validates_and_saves_on_the_way(audio, tmp_path):
    run(audio, tmp_path / "run", "train.valid_minutes=1e-9", "train.steps=2")
    assert [entry["step"] for entry in log(tmp_path / "run") if "stoi" in entry] == [1, 2, 2]


def test_refusals(audio, whole, tmp_path):
    before = (whole / "log.jsonl").read_bytes()
    with pytest.raises(ValueError, match="not empty; continue it with --resume"):
        run(audio, whole)
    with pytest.raises(ValueError, match="no such run folder"):
        run(audio, tmp_path / "absent", resume=True)
    with pytest.raises(ValueError, match=r"begun \(model\.dimension: 16 -> 8\)"):
        run(audio, whole, "model.dimension=8", resume=True)
    with pytest.raises(ValueError, match=r"train\.batch_size: 2 -> 3"):
        run(audio, whole, "train.batch_size=3", resume=True)
    with pytest.raises(ValueError, match=r"model\.ratios"):
        run(audio, tmp_path / "x", "model.ratios=[4,0]")
    for setting in ("data.speeds=[]", "data.speeds=[1,0]", "loss.judged_share=0"):
        with pytest.raises(ValueError, match=setting.split("=")[0]):
            run(audio, tmp_path / "x", setting)
    with pytest.raises(ValueError, match="no such folder or manifest"):
        run(tmp_path / "nothing", tmp_path / "x")
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "config.yaml").touch()  # before its first checkpoint
    with pytest.raises(ValueError, match=r"killed: not empty; delete it, or set out="):
        run(audio, tmp_path / "killed")
    assert not (tmp_path / "x").exists()
    assert (whole / "log.jsonl").read_bytes() == before


def test_a_lost_run_keeps_the_checkpoint_to_go_back_to(audio, whole, tmp_path, monkeypatch):
    out = tmp_path / "lost"
    shutil.copytree(whole, out)
    take_step = train_codec.Trainer.train_step

    def diverged(self):
        losses = take_step(self)
        os.kill(os.getpid(), signal.SIGINT)
        return losses | {"mel": torch.tensor(math.nan)}

    monkeypatch.setattr(train_codec.Trainer, "train_step", diverged)
    with pytest.raises(ValueError, match="not finite"):
        run(audio, out, "train.steps=12", "train.log_every=100", resume=True)
    assert find_checkpoint(out).name == "step-00000006"


def test_what_may_change_at_a_resume():
    may = ("out", "data.audio", "optim.lr", "train.steps", "train.mixed_precision", "wandb.mode")
    assert all(map(tokenizer_trainer.CHANGEABLE.fullmatch, may))
    fixed = ("model.causal", "loss.mel", "data.gain_db", "data.segment_seconds")
    fixed += ("train.batch_size", "train.seed", "train.start_from")
    assert not any(map(tokenizer_trainer.CHANGEABLE.fullmatch, fixed))


def test_damaged_checkpoint(audio, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    file = find_checkpoint(tmp_path / "run") / "codec.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"damaged checkpoint, codec\.safetensors"):
        run(audio, tmp_path / "run", resume=True)


@pytest.mark.parametrize("name", ["codec_16khz", "codec_tiny"])
def test_recipes_load(name):
    overrides = ["data.audio=x", "out=y"]
    config = load_config(CodecTrainConfig, f"configs/{name}.yaml", overrides)
    assert config.model.hop_length * 50 == config.model.sample_rate


def test_learning_rate_course():
    optim = CodecOptimConfig(warmup_steps=10, decay_from=0.5)
    rates = [train_codec.rate_share(step, 100, optim) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[50] == 1.0
    assert rates[75] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0.0)


@pytest.fixture(scope="module")
def recordings(audio):
    return decode_recordings(find_split(audio, "train"), RATE)


def test_recordings_in_memory(recordings, audio):
    assert recordings.names == ["0.wav", "1.wav", "2.wav", "3.wav"]
    assert [name for name, _ in recordings.skipped] == ["broken.wav"]
    torch.testing.assert_close(recordings.wav(2), voice(1.1, 2), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="none of 1 recordings could be decoded"):
        decode_recordings([r for r in find_split(audio, "train") if r.name == "broken.wav"], RATE)


def test_recordings_at_several_speeds(audio):
    found = [r for r in find_split(audio, "train") if r.name == "3.wav"]
    played = decode_recordings(found, RATE, speeds=(0.8, 1.0, 1.25))
    assert played.names == ["3.wav"] * 3
    plain = decode_recordings(found, RATE)
    assert played.lengths.tolist() == [len(plain.samples) * 10 // 8, len(plain.samples), 9600]
    torch.testing.assert_close(played.wav(1), plain.wav(0))
    slow, fast = (torch.fft.rfft(played.wav(i)[0]).abs() for i in (0, 2))
    pitch = [
        int(x.argmax()) * RATE / n for x, n in zip((slow, fast), played.lengths[::2], strict=True)
    ]
    assert 1.4 < pitch[1] / pitch[0] < 1.75  # 1.25 / 0.8 = 1.56


def test_segments_depend_on_seed_step_and_rank_alone(recordings):
    segments = RandomSegments(recordings, 4000, (-12.0, 6.0), seed=1)
    first = segments.batch(7, 0, 8)
    segments.batch(8, 0, 8)
    assert first.shape == (8, 1, 4000)
    assert torch.equal(first, segments.batch(7, 0, 8))
    for other in (segments.batch(8, 0, 8), segments.batch(7, 1, 8)):
        assert not torch.equal(first, other)
    assert first.abs().max() <= 1 + 1e-6


def test_segments_stay_inside_one_recording(recordings):
    recordings.samples.copy_(
        torch.arange(1, 5).repeat_interleave(torch.from_numpy(recordings.lengths))
    )
    segments = RandomSegments(recordings, 4000, (0.0, 0.0), seed=0)
    wav = (segments.batch(0, 0, 64)[:, 0] * 32767).round()
    seen = set()
    for clip in wav:
        value = int(clip[0])
        length = min(4000, int(recordings.lengths[value - 1]))
        assert (clip[:length] == value).all()
        assert (clip[length:] == 0).all()
        seen.add(value)
    assert seen == {1, 2, 3, 4}


def test_splits_without_a_manifest(audio):
    names = [recording.name for recording in find_split(audio, "valid")]
    assert names == ["4.wav", "5.wav"]
    with pytest.raises(ValueError, match='no recordings in split "test"'):
        find_split(audio, "test")
    assert spread(list(range(10)), 2) == [2, 7]
    assert spread([1, 2], 5) == [1, 2]


def test_mel_distance_orders_reconstructions():
    distance, wav = MelDistance(RATE), voice(1.0, 3)
    noise = torch.randn_like(wav)
    far, near = wav + 0.1 * noise, wav + 0.01 * noise
    assert mel_distance(distance, wav, wav) == 0
    assert mel_distance(distance, far, wav) > mel_distance(distance, near, wav) > 0
    assert mel_distance(distance, near[:, :50], wav[:, :50]) > 0  # shorter than a window
    assert stoi(far, wav, RATE) < stoi(near, wav, RATE) <= 1
    assert stoi(near[:, :800], wav[:, :800], RATE) is None
    silence = torch.zeros(1, 1, 4000, requires_grad=True)
    MelDistance(RATE, linear=1.0)(silence, torch.zeros(1, 1, 4000)).backward()
    assert torch.isfinite(silence.grad).all()


def test_balancer_gives_each_loss_its_share():
    balancer = Balancer({"small": 1.0, "large": 3.0, "unused": 0.0}, torch.device("cpu"))
    wav = torch.zeros(2, 1, 4, requires_grad=True)
    directions = torch.eye(4)
    losses = {
        "small": 1e-4 * (wav * directions[0]).sum(),
        "large": 1e4 * (wav * directions[1]).sum(),
        "unused": (wav * directions[2]).sum(),
    }
    gradient = balancer.gradient(losses, wav, Accelerator())
    expected = torch.tensor([0.25, 0.75, 0.0, 0.0]) / 2  # shares; the batch has two clips
    torch.testing.assert_close(gradient, expected.expand(2, 1, 4))


def test_filters_stay_within_their_range(audio):
    recordings = decode_recordings(find_split(audio, "train"), RATE)
    segments = RandomSegments(recordings, 4000, (0.0, 0.0), seed=0)
    filtered = RandomSegments(recordings, 4000, (0.0, 0.0), seed=0, filter_db=6.0)
    plain, wav = segments.batch(3, 0, 8), filtered.batch(3, 0, 8)
    assert torch.equal(wav, filtered.batch(3, 0, 8))
    assert not torch.equal(wav, filtered.batch(4, 0, 8))
    before, after = (torch.fft.rfft(x).abs() for x in (plain, wav))  # [8, 1, bins]
    loud = before > 1e-3 * before.max()
    gain_db = 20 * (after / before)[loud].log10()
    assert 3 < gain_db.abs().max() < 6.01
