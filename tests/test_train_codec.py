"""Training the codec: segments, losses, balancer, and whole tiny runs on synthetic voices."""

import json
import math

import pytest
import safetensors.torch
import torch
from accelerate import Accelerator

from configs.codec_schema import CodecOptimConfig, CodecTrainConfig
from configs.load import load_config
from data.audio import save_audio
from data.segments import RandomSegments, decode_recordings, find_split, split_of, spread
from model.codec import load_codec
from scripts import train_codec
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
    tiny = ["train.steps=6", "train.batch_size=2", "loss.adversarial_from_step=3"]
    tiny += [
        "loss.quantize_from_step=1",
        "optim.warmup_steps=2",
        "model.num_codebooks=2",
        "train.num_valid_clips=2",
    ]
    arguments = ["--config", "configs/codec_tiny.yaml", f"data.audio={audio}", f"out={out}"]
    train_codec.main(arguments + tiny + list(extra) + ["--resume"] * resume)


def state(out) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(out / "checkpoint" / "state.safetensors")


@pytest.fixture(scope="module")
def whole(audio, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    run(audio, out, "train.log_every=2")
    return out


def test_a_run_leaves_a_codec_samples_and_a_log(whole):
    codec = load_codec(str(whole / "codec"))
    wav = voice(0.5, 1)[None]
    assert codec.decode(codec.encode(wav), length=wav.shape[-1]).shape == wav.shape
    assert {p.name for p in (whole / "samples").iterdir()} == {
        f"{i}_{kind}.wav" for i in range(2) for kind in ("original", "decoded")
    }
    entries = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [2, 4, 6, 6]
    assert "adversarial" not in entries[0]
    assert entries[1]["adversarial"] > 0
    assert entries[2]["lr"] < entries[0]["lr"]
    assert entries[3]["valid_mel"] > 0
    config = load_config(CodecTrainConfig, whole / "config.yaml")
    assert config.train.steps == 6
    assert not list(whole.rglob("*.part"))


def test_resumed_equals_uninterrupted(audio, whole, tmp_path, monkeypatch):
    out = tmp_path / "cut"
    take_step = train_codec.Trainer.train_step

    def cut_after_four(self):
        logged = take_step(self)
        if self.step == 4:
            self.stopping = "signal"
        return logged

    monkeypatch.setattr(train_codec.Trainer, "train_step", cut_after_four)
    with pytest.raises(SystemExit) as stop:
        run(audio, out, "train.log_every=2")
    assert stop.value.code == 130
    monkeypatch.undo()
    with open(out / "log.jsonl", "a") as file:
        file.write('{"step": 5, "time": 9}\n{"st')  # written after the checkpoint, then a crash
    run(audio, out, "train.log_every=2", resume=True)
    expected, found = state(whole), state(out)
    assert expected.keys() == found.keys()
    different = [key for key in expected if not torch.equal(expected[key], found[key])]
    assert different == []
    assert (
        load_codec(str(out / "codec")).fingerprint == load_codec(str(whole / "codec")).fingerprint
    )
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [2, 4, 6, 6]


def test_time_limit_stops_and_exports(audio, tmp_path):
    run(audio, tmp_path / "run", "train.max_minutes=0.0001", "train.steps=1000")
    assert (tmp_path / "run" / "codec" / "codec.safetensors").is_file()
    assert (tmp_path / "run" / "checkpoint" / "state.safetensors").is_file()


def test_refusals(audio, whole, tmp_path):
    before = (whole / "log.jsonl").read_bytes()
    with pytest.raises(ValueError, match="not empty; pass --resume"):
        run(audio, whole)
    with pytest.raises(ValueError, match=r"no checkpoint to resume"):
        run(audio, tmp_path / "absent", resume=True)
    with pytest.raises(ValueError, match=r"model\.dimension is 8"):
        run(audio, whole, "model.dimension=8", resume=True)
    with pytest.raises(ValueError, match=r"train\.batch_size is 3"):
        run(audio, whole, "train.batch_size=3", resume=True)
    with pytest.raises(ValueError, match=r"model\.ratios"):
        run(audio, tmp_path / "x", "model.ratios=[4,0]")
    with pytest.raises(ValueError, match="no such folder or manifest"):
        run(tmp_path / "nothing", tmp_path / "x")
    assert not (tmp_path / "x").exists()
    assert (whole / "log.jsonl").read_bytes() == before


def test_damaged_checkpoint(audio, whole, tmp_path):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "config.yaml").write_bytes((whole / "config.yaml").read_bytes())
    data = (whole / "checkpoint" / "state.safetensors").read_bytes()
    (tmp_path / "checkpoint" / "state.safetensors").write_bytes(data[:-100])
    with pytest.raises(ValueError, match=r"state.safetensors: damaged"):
        run(audio, tmp_path, resume=True)


@pytest.mark.parametrize("name", ["codec_16khz", "codec_tiny"])
def test_recipes_load(name):
    overrides = ["data.audio=x", "out=y"]
    config = load_config(CodecTrainConfig, f"configs/{name}.yaml", overrides)
    assert config.model.hop_length * 50 == config.model.sample_rate


def test_learning_rate_course():
    optim = CodecOptimConfig(warmup_steps=10, decay_from=0.5)
    rates = [train_codec.learning_rate(step, 1.0, 100, optim) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[50] == 1.0
    assert rates[75] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0.0)


@pytest.fixture(scope="module")
def recordings(audio):
    return decode_recordings(find_split(audio, "train"), RATE, 1.0, 2)


def test_recordings_in_memory(recordings, audio):
    assert recordings.names == ["0.wav", "1.wav", "2.wav", "3.wav"]
    assert [name for name, _ in recordings.skipped] == ["broken.wav"]
    torch.testing.assert_close(recordings.wav(2), voice(1.1, 2), atol=1e-4, rtol=0)
    assert recordings.wav(2, 100).shape == (1, 100)
    less = decode_recordings(find_split(audio, "train"), RATE, 1.0 / 3600, 2)
    assert less.hours * 3600 == pytest.approx(1.0)


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
    recordings.samples.copy_(torch.repeat_interleave(torch.arange(1, 5), recordings.lengths))
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
    splits = [split_of(r) for r in find_split(audio, "valid")]
    assert splits == ["valid", "valid"]
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
    distance(silence, torch.zeros(1, 1, 4000)).backward()
    assert torch.isfinite(silence.grad).all()


def test_balancer_gives_each_loss_its_share():
    balancer = Balancer({"small": 1.0, "large": 3.0, "unused": 0.0})
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
