"""scripts/prepare.py: the same bytes for any number of processes, a reason for what is left out."""

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from accelerate import PartialState

from configs.codec_schema import CodecConfig
from data.audio import Recording, find_recordings, resample
from data.shards import TokenFolder
from model.codec import Codec
from model.semantic import MfccConfig, MfccKMeans
from scripts import prepare as script
from scripts.prepare import Options, assign_splits, prepare

REPO = Path(__file__).parent.parent
RATE = 16_000


class FakeCodec:
    """Codes that follow from the wav at once: 2 codebooks at 8 kHz, 40 frames/s."""

    name, sample_rate, hop_length, frame_rate = "fake", 8_000, 200, 40.0
    num_codebooks, codebook_size, fingerprint = 2, 256, "00000000000000fa"
    config = CodecConfig(causal=True)

    def __init__(self, stop_after=None):
        self.encoded, self.stop_after = 0, stop_after

    def encode(self, wav):
        if self.encoded == self.stop_after:
            raise KeyboardInterrupt
        self.encoded += len(wav)
        wav = torch.nn.functional.pad(wav, (0, -wav.shape[2] % self.hop_length))
        loud = wav.view(len(wav), 1, -1, self.hop_length).abs().amax(3)  # [B, 1, T]
        return (torch.cat([loud, loud / 2], dim=1).clamp(max=1) * 255).long()  # [B, 2, T]


@pytest.fixture(scope="module")
def semantic():
    tokenizer = MfccKMeans(MfccConfig(num_mels=20, num_mfcc=5))
    generator = torch.Generator().manual_seed(0)
    tokenizer.set_codebook(
        torch.zeros(35), torch.ones(35), torch.randn(30, 35, generator=generator)
    )
    return tokenizer


@pytest.fixture(autouse=True)
def _no_state_left_behind():
    """main() fixes accelerate's device and torch's threads for the process; other tests differ."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    PartialState._reset_state()


def write_wav(path, seconds=0.5, seed=0, rate=RATE, scale=0.1):
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = scale * np.random.default_rng(seed).standard_normal(int(seconds * rate))
    soundfile.write(path, samples.astype(np.float32), rate, subtype="FLOAT")
    return path


@pytest.fixture
def audio(tmp_path):
    for i in range(11):
        write_wav(tmp_path / f"audio/{i:02d}.wav", 0.3 + 0.05 * i, seed=i)
    return tmp_path / "audio"


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def run_in_threads(world, audio, semantic, out, options):
    """`world` ranks as threads with a real barrier between them."""
    barrier, failed = threading.Barrier(world, timeout=60), []

    def work(rank):
        try:
            arguments = (rank, world, barrier.wait)
            prepare(find_recordings(audio), FakeCodec(), semantic, out, options, *arguments)
        except Exception as error:
            failed.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed


def skipped(out):
    with open(out / "skipped.jsonl", encoding="utf-8") as file:
        return {entry["name"]: entry["reason"] for entry in map(json.loads, file)}


def test_tokens_are_those_of_the_tokenizers(audio, semantic, tmp_path):
    codec = FakeCodec()
    prepare(find_recordings(audio), codec, semantic, tmp_path / "out")
    tokens = TokenFolder(tmp_path / "out")
    assert [clip.name for clip in tokens.all_clips] == [f"{i:02d}.wav" for i in range(11)]
    for clip in tokens.all_clips:
        samples, _ = soundfile.read(audio / clip.name, dtype="float32")
        wav = torch.from_numpy(samples)[None, None]
        semantic_tokens, codes = tokens.read(clip)
        assert np.array_equal(semantic_tokens, semantic.encode(wav)[0])
        halved = resample(wav, RATE, 8_000)
        assert np.array_equal(codes, codec.encode(halved)[0])
        assert codes.max() > 20
        assert clip.duration == pytest.approx(len(samples) / RATE, abs=1e-4)
    assert tokens.codec["name"] == "fake"
    assert tokens.codec["fingerprint"] == "00000000000000fa"
    assert tokens.semantic["fingerprint"] == semantic.fingerprint


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_processes_writes_the_same_bytes(audio, semantic, tmp_path, world):
    (audio / "05.wav").write_text("damaged")
    options = Options(shard_clips=2)
    run_in_threads(1, audio, semantic, tmp_path / "one", options)
    run_in_threads(world, audio, semantic, tmp_path / "many", options)
    assert contents(tmp_path / "one") == contents(tmp_path / "many")
    assert len(list((tmp_path / "one").glob("shard-*.bin"))) == 6


def test_an_interrupted_run_continues_and_encodes_nothing_twice(audio, semantic, tmp_path, capsys):
    recordings, options = find_recordings(audio), Options(shard_clips=3)
    prepare(recordings, FakeCodec(), semantic, tmp_path / "whole", options)
    first, second = FakeCodec(stop_after=6), FakeCodec()
    with pytest.raises(KeyboardInterrupt):
        prepare(recordings, first, semantic, tmp_path / "out", options)
    with pytest.raises(ValueError, match=r"no header\.json"):
        TokenFolder(tmp_path / "out")
    (tmp_path / "out/.shard-00002.bin.1.part").write_text("left by a kill")
    capsys.readouterr()
    prepare(recordings, second, semantic, tmp_path / "out", options)
    assert "continuing" in (output := capsys.readouterr().out)
    assert "2 of 4 shards are finished" in output
    assert second.encoded == 11 - 6
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")

    third = FakeCodec()
    prepare(recordings, third, semantic, tmp_path / "out", options)
    assert "already prepared" in capsys.readouterr().out
    assert third.encoded == 0


def test_every_reason_to_skip_is_recorded(audio, semantic, tmp_path, capsys):
    write_wav(audio / "short.wav", 0.1)
    write_wav(audio / "long.wav", 3)
    write_wav(audio / "silent.wav", 1, scale=1e-5)
    write_wav(audio / "empty.wav", 0)
    (audio / "damaged.wav").write_text("not audio")
    soundfile.write(audio / "nan.wav", np.full(RATE, np.nan), RATE, subtype="FLOAT")
    soundfile.write(audio / "cut.flac", np.random.default_rng(0).random(RATE) - 0.5, RATE)
    (audio / "cut.flac").write_bytes((audio / "cut.flac").read_bytes()[:9000])
    lines = [{"path": path.name} for path in sorted(audio.iterdir())]
    lines += [{"path": "gone.wav"}, {"path": "00.wav", "text": "again"}, {"path": "./01.wav"}]
    manifest = audio / "m.jsonl"
    manifest.write_text("\n".join(json.dumps(line) for line in lines))
    options = Options(max_seconds=2)
    prepare(find_recordings(manifest), FakeCodec(), semantic, tmp_path / "out", options)
    reasons = skipped(tmp_path / "out")
    expected = {
        "short.wav": "too short (0.10 s)",
        "long.wav": "too long (3.0 s)",
        "silent.wav": "silent (peak",
        "empty.wav": "empty",
        "damaged.wav": "cannot be decoded (",
        "cut.flac": "damaged (",
        "nan.wav": "holds NaN",
        "gone.wav": "no such file",
        "00.wav": "listed twice",
    }
    for name, reason in expected.items():
        assert reasons[name].startswith(reason), (name, reasons[name])
    assert set(reasons) == {*expected, "01.wav"}  # "./01.wav" sorts first and stays
    tokens = TokenFolder(tmp_path / "out")
    assert len(tokens.all_clips) == 11
    assert all(clip.text is None for clip in tokens.all_clips)
    assert "10 recordings skipped: 2 listed twice" in capsys.readouterr().out
    assert not any(str(tmp_path) in reason for reason in reasons.values())


def test_nothing_usable_is_an_error_with_reasons(tmp_path, semantic):
    write_wav(tmp_path / "a/x.wav", 0.1)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"none of the 1 recordings could be used"):
            prepare(find_recordings(tmp_path / "a"), FakeCodec(), semantic, tmp_path / "out")
    assert skipped(tmp_path / "out") == {"x.wav": "too short (0.10 s)"}


def test_other_settings_are_refused_by_name(audio, semantic, tmp_path):
    out = tmp_path / "out"
    prepare(find_recordings(audio), FakeCodec(), semantic, out)
    moved = FakeCodec()
    moved.name = "elsewhere/fake"  # the same fingerprint: the same codec
    prepare(find_recordings(audio), moved, semantic, out)
    other = FakeCodec()
    other.name, other.fingerprint = "other", "00000000000000ff"
    with pytest.raises(
        ValueError,
        match=r"codec was fake \(00000000000000fa\), is now other \(00000000000000ff\).*--out",
    ):
        prepare(find_recordings(audio), other, semantic, out)
    with pytest.raises(ValueError, match=r"min_seconds was 0\.3, is now 0\.2"):
        prepare(find_recordings(audio), FakeCodec(), semantic, out, Options(min_seconds=0.2))
    write_wav(audio / "03.wav", 1.5)  # the same list, another size
    with pytest.raises(ValueError, match="recordings was 11 files"):
        prepare(find_recordings(audio), FakeCodec(), semantic, out)
    (out / "prepare.json").write_text("{")
    with pytest.raises(ValueError, match=r"prepare\.json: damaged"):
        prepare(find_recordings(audio), FakeCodec(), semantic, out)


def test_a_folder_of_other_files_is_left_alone(audio, semantic, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="holds other files"):
        prepare(find_recordings(audio), FakeCodec(), semantic, tmp_path / "out")
    assert contents(tmp_path / "out") == {"thesis.txt": b"precious"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"min_seconds": 3, "max_seconds": 2}, "--max-seconds 2: expected"),
        ({"valid": 0.6, "test": 0.4}, "--valid 0.6 --test 0.4"),
        ({"valid": -0.1}, "--valid -0.1"),
        ({"shard_clips": 0}, "--shard-clips 0"),
    ],
)
def test_senseless_options_are_named(options, says):
    with pytest.raises(ValueError, match=says):
        Options(**options)


def recordings_of(speakers, split=None):
    return [Recording(f"{i}", Path(f"{i}"), None, s, split) for i, s in enumerate(speakers)]


def speakers_of(recordings, splits):
    found = {}
    for recording in recordings:
        found.setdefault(splits[recording.name], set()).add(recording.speaker)
    return found


def test_speakers_stay_together():
    recordings = recordings_of([f"s{i % 60}" for i in range(600)])
    splits = assign_splits(recordings, valid=0.2, test=0.1)
    found = speakers_of(recordings, splits)
    assert sum(len(speakers) for speakers in found.values()) == 60
    assert 5 <= len(found["valid"]) <= 20
    assert 1 <= len(found["test"]) <= 12
    shuffled = assign_splits(recordings[::-1], valid=0.2, test=0.1)
    assert splits == shuffled


def test_the_manifest_s_splits_stay_and_speakers_follow_them():
    recordings = [
        Recording("a", Path("a"), speaker="x", split="test"),
        Recording("b", Path("b"), speaker="x"),
        Recording("c", Path("c"), speaker="y", split="train"),
        Recording("d", Path("d"), speaker="y", split="valid"),
        Recording("e", Path("e"), speaker="y"),
    ]
    splits = assign_splits(recordings, valid=0.05, test=0)
    assert splits == {"a": "test", "b": "test", "c": "train", "d": "valid", "e": "train"}


@pytest.mark.parametrize("speaker", [None, "only"])
@pytest.mark.parametrize("num", [2, 3, 5, 20])
def test_a_tiny_corpus_of_one_voice_has_train_and_valid(num, speaker):
    for valid in (0.01, 0.05, 0.9):
        splits = assign_splits(recordings_of([speaker] * num), valid=valid, test=0)
        assert set(splits.values()) == {"train", "valid"}
    if num > 2:
        splits = assign_splits(recordings_of([speaker] * num), valid=0.01, test=0.01)
        assert set(splits.values()) == {"train", "valid", "test"}


def test_two_speakers_give_the_smaller_one_to_valid():
    recordings = recordings_of(["big"] * 9 + ["small"] * 3)
    splits = assign_splits(recordings, valid=0.001, test=0)
    assert speakers_of(recordings, splits) == {"train": {"big"}, "valid": {"small"}}


def test_one_recording_is_for_training():
    assert assign_splits(recordings_of(["s"]), valid=0.05, test=0) == {"0": "train"}
    assert set(assign_splits(recordings_of([None] * 9), valid=0, test=0).values()) == {"train"}


def test_shares_are_about_what_was_asked_for():
    counts = Counter(assign_splits(recordings_of([None] * 4000), 0.1, 0.05).values())
    assert 330 < counts["valid"] < 470
    assert 150 < counts["test"] < 250


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory, semantic):
    folder = tmp_path_factory.mktemp("tokenizers")
    torch.manual_seed(0)
    config = CodecConfig(
        ratios=(8, 5, 4, 2),
        encoder_filters=2,
        decoder_filters=2,
        num_lstm=0,
        dimension=8,
        num_codebooks=2,
        codebook_size=16,
    )
    Codec(config).save(folder / "codec")
    semantic.save(folder / "semantic")
    return ["--codec", folder / "codec", "--semantic", folder / "semantic"]


def command(*arguments, launcher=()):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    line = [sys.executable, *launcher, "-m", "scripts.prepare", *map(str, arguments)]
    return subprocess.run(line, cwd=REPO, env=environment, capture_output=True, text=True)


def test_a_launcher_writes_what_plain_python_writes(
    audio, tokenizers, tmp_path, monkeypatch, capsys
):
    arguments = ["--audio", audio, *tokenizers, "--shard-clips", 3, "--device", "cpu", "--out"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    faster = ["--workers", 2, "--batch-seconds", 1.5]
    launched = command(*arguments, tmp_path / "two", *faster, launcher=launcher)
    assert launched.returncode == 0, launched.stderr
    assert launched.stdout.count("prepared") == 1  # the main process alone speaks
    monkeypatch.setattr("sys.argv", ["prepare", *map(str, arguments), str(tmp_path / "one")])
    script.main()
    alone = capsys.readouterr()
    assert "prepared" in alone.out
    shards = [said.count("shard ") for said in (alone.err, launched.stderr)]
    assert 0 < shards[1] < shards[0]  # the main process tells of its own shards: there were two
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert TokenFolder(tmp_path / "two").codec["num_codebooks"] == 2


def test_mistakes_on_the_command_line_are_one_line(tmp_path, monkeypatch, capsys, audio):
    (tmp_path / "m.jsonl").write_text("{oops\n")
    (tmp_path / "none").mkdir()
    cases = [
        (tmp_path / "gone", "no such folder or manifest"),
        (tmp_path / "none", "no recordings found"),
        (tmp_path / "m.jsonl", "line 1: not JSON"),
    ]
    for given, says in cases:
        monkeypatch.setattr("sys.argv", ["prepare", "--audio", str(given), "--out", "x"])
        with pytest.raises(SystemExit) as exited:
            script.run_cli(script.main)
        assert exited.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert says in error
        assert error.count("\n") == 1


def test_ctrl_c_says_how_to_continue(tmp_path, monkeypatch, capsys, audio, tokenizers):
    arguments = ["--audio", audio, *tokenizers, "--out", tmp_path / "out", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["prepare", *map(str, arguments)])
    monkeypatch.setattr(script, "prepare", lambda *_: FakeCodec(stop_after=0).encode(None))
    with pytest.raises(SystemExit) as exited:
        script.run_cli(script.main)
    assert exited.value.code == 130
    assert "run the same command again to continue" in capsys.readouterr().err
