"""scripts/evaluate.py: the codec's report on a few clips, with and without optional packages."""

import json
import struct
import sys
import types
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from encodec import EncodecModel

from configs.codec_schema import CodecConfig
from data.audio import load_audio, save_audio
from model.codec import Codec
from scripts import evaluate, evaluate_codec
from scripts.codec_metrics import confidence_interval
from scripts.speech_metrics import (
    PACKAGES,
    SAMPLE_RATE,
    Judge,
    SpeakerSimilarity,
    judge_all,
    mos,
    not_measured,
    pesq_wb,
)

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "data" / "demo" / "audio"
TEXT, ALMOST = "Mr. Brown saw it.", "mister brown saw"


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"encoder_filters": 4, "decoder_filters": 4, "dimension": 8}
    config = CodecConfig(8000, (8, 4), num_codebooks=3, codebook_size=16, **sizes)
    codec = Codec(config)
    for layer in codec.quantizer.vq.layers:
        layer._codebook.embed.normal_(std=0.1)
    folder = tmp_path_factory.mktemp("codec")
    codec.save(folder)
    return folder


@pytest.fixture(scope="module")
def audio(tmp_path_factory):
    """In the split "test": noise in a/one, faint noise, silence and a broken file in b."""
    folder = tmp_path_factory.mktemp("audio")
    torch.manual_seed(1)
    for i, (place, level) in enumerate((("a/one", 0.1), ("a/one", 0.1), ("b", 0.001), ("b", 0))):
        wav = level * torch.randn(1, 8000 + 100 * i)
        save_audio(folder / place / f"{i}.wav", wav, 8000)
    (folder / "b" / "broken.wav").write_bytes(b"RIFF")
    lines = [
        {"path": "a/one/0.wav", "split": "test", "text": TEXT},
        {"path": "a/one/1.wav", "split": "train"},
        {"path": "b/2.wav", "split": "test"},
        {"path": "b/3.wav", "split": "test"},
        {"path": "b/broken.wav", "split": "test"},
    ]
    (folder / "manifest.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return folder / "manifest.jsonl"


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    return load_audio(DEMO / "vm-newuser.opus", SAMPLE_RATE)[0, : 3 * SAMPLE_RATE].numpy()  # [L]


def noisy(wav: np.ndarray, level: float) -> np.ndarray:
    noise = np.random.default_rng(0).standard_normal(len(wav))
    return (wav + level * noise).astype(np.float32)


def take_away(monkeypatch) -> None:
    """Packages of `evaluate` cannot be imported."""
    for _, modules, _ in PACKAGES.values():
        for module in modules:
            monkeypatch.setitem(sys.modules, module, None)


def report_of(codec, audio, out, *extra: str) -> dict:
    options = ["--codec", str(codec), "--audio", str(audio), "--out", str(out), "--workers", "1"]
    evaluate.main(["codec", *options, *extra])
    return json.loads(out.read_text())


def test_report(codec, audio, tmp_path, capsys, monkeypatch):
    take_away(monkeypatch)
    report = report_of(codec, audio, tmp_path / "x.json", "--num-codebooks", "3", "1")
    rows = report["rows"]
    assert [row["num_codebooks"] for row in rows] == [1, 3]
    assert [row["bits_per_second"] for row in rows] == [1000, 3000]  # 4 bits, 250 frames/s
    assert all(row["num_clips"] == 2 and -1 <= row["stoi"] <= 1 for row in rows)
    assert rows[1]["minutes"] == pytest.approx(16200 / 8000 / 60)
    assert 0 < rows[1]["codes_used"] <= 1
    assert 0 <= rows[1]["entropy_bits"] <= 4
    assert [entry["name"] for entry in report["skipped"]] == ["b/3.wav", "b/broken.wav"]
    assert "silent" in report["skipped"][0]["reason"]
    assert {"fingerprint", "name", "sample_rate"} == set(report["codec"])
    assert {"device", "versions", "commit", "split", "clips"} <= set(report)
    assert [clip["name"] for clip in report["clips"]] == ["a/one/0.wav", "b/2.wav"]
    assert set(report["clips"][0]["figures"]["1"]) == set(evaluate_codec.FIGURES)
    (speed,) = (s for s in report["speed"] if s["device"].startswith("cpu"))
    assert min(speed["encode"], *speed["decode"].values()) > 0
    assert set(speed["decode"]) == {"1", "3"}
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    table = [line[:2] for line in lines if line[0] in ("K", "1", "3")]
    assert table == [["K", "bit/s"], ["1", "1000"], ["3", "3000"]]
    again = report_of(codec, audio, tmp_path / "y.json", "--num-codebooks", "3", "1")
    assert [again[key] for key in ("rows", "clips")] == [report[key] for key in ("rows", "clips")]


def test_a_folder_without_splits_is_measured_whole(codec, audio, tmp_path, monkeypatch):
    take_away(monkeypatch)
    report = report_of(codec, audio.parent, tmp_path / "x.json", "--num-codebooks", "1")
    assert report["split"] == "all"
    assert [c["name"] for c in report["clips"]] == ["a/one/0.wav", "a/one/1.wav", "b/2.wav"]
    with pytest.raises(ValueError, match='no recordings in split "test"'):
        report_of(codec, audio.parent, tmp_path / "x.json", "--split", "test")


def test_rows_for_each_folder(codec, audio, tmp_path, monkeypatch):
    take_away(monkeypatch)
    rows = report_of(codec, audio, tmp_path / "x.json", "--by", "folder")["rows"]
    assert [(row["group"], row["num_clips"]) for row in rows] == [
        ("all", 2),
        ("a/one", 1),
        ("b", 1),
    ]
    assert rows[0]["mel_distance"] == pytest.approx(
        (rows[1]["mel_distance"] + rows[2]["mel_distance"]) / 2
    )
    assert rows[0]["codes_used"] >= rows[1]["codes_used"]


def test_what_is_not_installed_is_said_and_left_out(codec, audio, tmp_path, capsys, monkeypatch):
    take_away(monkeypatch)
    picture = tmp_path / "x.png"
    report = report_of(codec, audio, tmp_path / "x.json", "--asr", "x", "--picture", str(picture))
    printed = capsys.readouterr().out
    assert "PESQ: not measured (" in printed
    wanted = {key: value for key, value in PACKAGES.items() if key != "mos"}
    assert all(f"pip install {packages}" in printed for _, _, packages in wanted.values())
    assert set(report["not_measured"]) == set(wanted)
    assert [report["rows"][0][key] for key in ("pesq", "speaker_similarity", "wer")] == [None] * 3
    assert report["rows"][0]["stoi"] is not None
    assert not picture.exists()


def test_the_pins_are_those_of_pyproject():
    project = (ROOT / "pyproject.toml").read_text()
    pins = [word for *_, text in PACKAGES.values() for word in text.split(";")[0].split()]
    assert len(pins) == 8
    for pin in pins:
        assert f'"{pin}"' in project, pin
    assert "`pip install --no-deps resemblyzer==0.1.4`" in project
    assert PACKAGES["speaker_similarity"][2].endswith("pip install --no-deps resemblyzer==0.1.4")


def test_pesq_knows_the_best_and_the_worse(speech):
    pytest.importorskip("pesq")
    assert pesq_wb(speech, speech) == pytest.approx(4.64, abs=0.01)  # the scale's top
    scores = [pesq_wb(noisy(speech, level), speech) for level in (1e-3, 1e-2, 0.1)]
    assert 4.64 > scores[0] > scores[1] > scores[2] >= 1
    silence = np.zeros_like(speech)
    assert pesq_wb(silence, silence) is pesq_wb(silence, speech) is pesq_wb(speech, silence) is None
    assert pesq_wb(speech[:1000], speech[:1000]) is None  # too short


def test_listeners_would_rather_hear_the_clean(speech):
    pytest.importorskip("speechmos")
    scores = [mos(speech), mos(noisy(speech, 0.03)), mos(noisy(speech, 0.3) * 9)]
    assert 5 > scores[0] > scores[1] > scores[2] >= 1
    assert mos(np.zeros_like(speech)) is mos(speech[:0]) is None


def test_the_figures_of_a_clip(speech):
    found = Judge(frozenset())(speech, {1: speech, 2: noisy(speech, 0.1)}, "")
    same, worse = found["figures"][1], found["figures"][2]
    assert same["stoi"] == pytest.approx(1)
    assert same["mel_distance"] == 0
    assert worse["stoi"] < 0.9
    assert worse["si_sdr_db"] < 5
    assert worse["mel_distance"] > 0.5
    assert same["pesq"] is same["speaker_similarity"] is None
    assert "word_errors" not in same


def test_speaker_similarity(speech):
    pytest.importorskip("resemblyzer")
    similarity = SpeakerSimilarity()
    embedding = similarity.embed(speech)
    assert similarity(speech, embedding) == pytest.approx(1)
    assert similarity(noisy(speech, 0.1), embedding) < 0.9
    assert similarity(np.zeros_like(speech), embedding) == 0  # the codec lost the voice
    assert similarity.embed(np.zeros_like(speech)) is None
    assert similarity(speech, None) is None


def test_wer_against_the_texts(codec, audio, tmp_path, monkeypatch, capsys):
    pytest.importorskip("jiwer")
    pytest.importorskip("whisper_normalizer")
    original = load_audio(audio.parent / "a/one/0.wav", SAMPLE_RATE)[0].numpy()

    class WhisperModel:
        """Hears all of the original but a word, and two words of any reconstruction."""

        def __init__(self, name: str, *_, **__):
            if name != "whisper":
                raise RuntimeError("not a folder")

        def transcribe(self, wav: np.ndarray, **settings):
            assert settings["temperature"] == 0
            text = ALMOST if np.array_equal(wav, original) else "Mister Brown"
            return [types.SimpleNamespace(text=f" {text}")], None

    stub = types.SimpleNamespace(WhisperModel=WhisperModel)
    monkeypatch.setitem(sys.modules, "faster_whisper", stub)
    report = report_of(codec, audio, tmp_path / "x.json", "--asr", "whisper")
    (row,) = report["rows"]
    assert (row["wer_of_originals"], row["wer"], row["wer_ratio"]) == (0.25, 0.5, 2)
    assert row["num_words"] == 4  # the clip without a text is left out
    assert report["clips"][0]["original"]["transcript"] == ALMOST
    assert "50.0%" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--asr nobody: no such folder, and not fetched"):
        report_of(codec, audio, tmp_path / "y.json", "--asr", "nobody")


def test_confidence_interval():
    low, high = confidence_interval([0.0, 1.0] * 200)
    assert low == pytest.approx(0.45, abs=0.02)  # 1.96 * 0.5 / sqrt(400) on either side
    assert high == pytest.approx(0.55, abs=0.02)
    assert confidence_interval([3.0, None, 3.0]) == [3, 3]
    assert confidence_interval([1, 10], [10, 100]) == pytest.approx([0.1, 0.1])  # of a ratio
    assert confidence_interval([1.0, None]) is None


def test_processes_find_what_one_finds(speech):
    clips = [(wav, {1: noisy(wav, 0.01)}, "") for wav in (speech, speech[:20_000], speech[8_000:])]
    make = partial(Judge, frozenset())
    one, two = (list(judge_all(iter(clips), make, n)) for n in (1, 2))
    assert len(one) == 3
    for a, b in zip(one, two, strict=True):
        for figure in ("stoi", "si_sdr_db", "mel_distance"):
            assert a["figures"][1][figure] == pytest.approx(b["figures"][1][figure], rel=1e-4)


def test_picture(codec, audio, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "x.png"
    report_of(codec, audio, tmp_path / "x.json", "--picture", str(picture))
    data = picture.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width > 1.5 * height  # two versions in a row: the original, 3 codebooks
    assert len(data) > 5_000


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_encodec_24khz_is_measured_on_the_same_clips(audio, tmp_path, monkeypatch):
    take_away(monkeypatch)
    torch.manual_seed(0)
    model = EncodecModel.encodec_model_24khz(pretrained=False)
    torch.save(model.state_dict(), tmp_path / "encodec.th")
    name = f"encodec_24khz:{tmp_path / 'encodec.th'}"
    report = report_of(
        name, audio, tmp_path / "x.json", "--num-codebooks", "2", "8", "--match", "one"
    )
    assert [row["bits_per_second"] for row in report["rows"]] == [1500, 6000]
    assert report["codec"]["sample_rate"] == 24_000
    (clip,) = report["clips"]
    assert clip["duration"] == 1
    assert clip["figures"]["8"]["stoi"] is not None


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--num-codebooks", "4"), "has 1 to 3"),
        (("--split", "valid"), 'no recordings in split "valid"'),
        (("--match", "nobody"), "--match nobody: in no name"),
        (("--device", "nowhere"), "--device nowhere: cannot be used here"),
        (("--limit", "0"), "--limit 0: at least 1"),
    ],
)
def test_mistakes(codec, audio, tmp_path, extra, message):
    with pytest.raises(ValueError, match=message):
        report_of(codec, audio, tmp_path / "x.json", *extra)
    assert not (tmp_path / "x.json").exists()


def test_all_figures_named_can_be_asked_for():
    assert not_measured([]) == {}
    assert set(PACKAGES) - set(evaluate_codec.FIGURES) == {"wer", "picture", "mos"}
