"""scripts/evaluate.py: the codec's report on two clips."""

import json

import pytest
import torch

from configs.codec_schema import CodecConfig
from data.audio import save_audio
from model.codec import Codec
from scripts import evaluate


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
    folder = tmp_path_factory.mktemp("audio")
    torch.manual_seed(1)
    for i, place in enumerate(("a/one", "a/one", "b")):
        wav = 0.1 * torch.randn(1, 8000 + 100 * i)
        save_audio(folder / place / f"{i}.wav", wav, 8000)
    (folder / "b" / "broken.wav").write_bytes(b"RIFF")
    lines = [
        {"path": "a/one/0.wav", "split": "test"},
        {"path": "a/one/1.wav", "split": "train"},
        {"path": "b/2.wav", "split": "test"},
        {"path": "b/broken.wav", "split": "test"},
    ]
    (folder / "manifest.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return folder / "manifest.jsonl"


def report_of(codec, audio, out, *extra: str) -> dict:
    arguments = ["codec", "--codec", str(codec), "--audio", str(audio), "--out", str(out)]
    evaluate.main(arguments + list(extra))
    return json.loads(out.read_text())


def without_speed(report: dict) -> dict:
    for row in report["rows"]:
        assert row.pop("times_real_time") > 0
    return report


def test_report(codec, audio, tmp_path, capsys):
    report = report_of(codec, audio, tmp_path / "x.json", "--num-codebooks", "3", "1")
    rows = report["rows"]
    assert [row["num_codebooks"] for row in rows] == [1, 3]
    assert [row["bits_per_second"] for row in rows] == [1000, 3000]  # 4 bits, 250 frames/s
    assert all(row["num_clips"] == 2 and -1 <= row["stoi"] <= 1 for row in rows)
    assert rows[1]["minutes"] == pytest.approx(16200 / 8000 / 60)
    assert 0 < rows[1]["codes_used"] <= 1
    assert 0 <= rows[1]["entropy_bits"] <= 4
    assert [entry["name"] for entry in report["skipped"]] == ["b/broken.wav"]
    table = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [(line[0], line[1]) for line in table] == [("1", "1000"), ("3", "3000")]
    again = report_of(codec, audio, tmp_path / "y.json", "--num-codebooks", "3", "1")
    assert without_speed(again) == without_speed(report)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--num-codebooks", "4"), "has 1 to 3"),
        (("--split", "valid"), 'no recordings in split "valid"'),
        (("--match", "nobody"), "--match nobody: in no name"),
        (("--device", "nowhere"), "--device nowhere: cannot be used here"),
    ],
)
def test_mistakes(codec, audio, tmp_path, extra, message):
    with pytest.raises(ValueError, match=message):
        report_of(codec, audio, tmp_path / "x.json", *extra)
    assert not (tmp_path / "x.json").exists()
