"""LibriSpeech's folders as a manifest that scripts.prepare takes; no network."""

from urllib.error import URLError

import pytest
from world import save_wav

from data.audio import find_recordings
from scripts import fetch_librispeech
from scripts.fetch_librispeech import main


def make_subset(root, name, speaker, chapter, num=2):
    folder = root / "LibriSpeech" / name / str(speaker) / str(chapter)
    lines = []
    for n in range(num):
        stem = f"{speaker}-{chapter}-{n:04d}"
        save_wav(folder / f"{stem}.flac", 0.2)
        lines.append(f"{stem} WORDS OF {n}")
    (folder / f"{speaker}-{chapter}.trans.txt").write_text("\n".join(lines) + "\n")


def test_speakers_texts_and_splits(tmp_path, capsys):
    make_subset(tmp_path, "train-clean-100", 103, 1240)
    make_subset(tmp_path, "dev-clean", 84, 121123, 1)
    main(["--out", str(tmp_path), "--subsets", "train-clean-100", "dev-clean"])
    assert "3 recordings" in capsys.readouterr().out
    found = find_recordings(tmp_path / "manifest.jsonl")
    assert [(r.speaker, r.split, r.text) for r in found] == [
        ("84", "valid", "WORDS OF 0"),
        ("103", "train", "WORDS OF 0"),
        ("103", "train", "WORDS OF 1"),
    ]
    assert all(r.path.is_file() for r in found)


def test_nothing_is_downloaded_unasked(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "torchaudio.datasets.librispeech._download_librispeech", lambda *_: pytest.fail("network")
    )
    with pytest.raises(ValueError, match=r"train-clean-100: not there; --download .*6\.3 GB"):
        main(["--out", str(tmp_path)])
    assert not (tmp_path / "manifest.jsonl").exists()


def test_without_a_network_the_remedy_is_named(tmp_path, monkeypatch):
    def offline(*_):
        raise URLError("no route")

    monkeypatch.setattr("torchaudio.datasets.librispeech._download_librispeech", offline)
    with pytest.raises(ValueError, match=r"dev-clean cannot be downloaded .*no route.*; put its"):
        main(["--out", str(tmp_path), "--subsets", "dev-clean", "--download"])


def test_an_empty_subset_is_an_error(tmp_path):
    (tmp_path / "LibriSpeech/dev-clean").mkdir(parents=True)
    with pytest.raises(ValueError, match="dev-clean: holds no recordings"):
        main(["--out", str(tmp_path), "--subsets", "dev-clean"])


def test_every_subset_is_one_of_torchaudios():
    from torchaudio.datasets.librispeech import _DATA_SUBSETS

    assert {*fetch_librispeech.GIGABYTES} == {*_DATA_SUBSETS}
