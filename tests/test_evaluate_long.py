"""`evaluate long`: figures that can be worked out by hand, with voices that are tones."""

import json
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from data.audio import save_audio
from scripts import evaluate, evaluate_long

RATE = 16_000


class Tones:
    """A voice is how much of a piece is at 200 Hz and how much at 300: 1 and 0 of two."""

    def embed(self, wav):
        if not wav.any():
            return None
        spectrum = np.abs(np.fft.rfft(wav, RATE))[[200, 300]]
        return spectrum / np.linalg.norm(spectrum)


def tone(hertz: float, seconds: float, size: float = 0.1) -> np.ndarray:
    return (size * np.sin(2 * np.pi * hertz * np.arange(round(RATE * seconds)) / RATE)).astype("f4")


@pytest.fixture
def found(tmp_path, monkeypatch, capsys):
    """Two clips, and what lies beside them: one keeps its voice for 3.6 s, one changes it after 1
    and ends after 2.4."""
    monkeypatch.setattr(evaluate_long, "not_measured", lambda figures: {})
    monkeypatch.setattr(evaluate_long, "SpeakerSimilarity", Tones)
    keeps = np.r_[tone(200, 1), tone(200, 1), np.zeros(RATE // 2, "f4"), tone(200, 1.1)]
    changes = np.r_[tone(200, 1), tone(300, 1), tone(300, 0.4)]
    for name, wav in (("keeps", keeps), ("changes", changes), ("keeps-original", changes)):
        save_audio(tmp_path / "made" / f"{name}.wav", torch.from_numpy(wav)[None], RATE)
    lines = []
    for n, (speaker, hertz) in enumerate((("a", 200), ("a", 200), ("b", 300), (None, 300))):
        wav = torch.from_numpy(tone(hertz, 0.8))[None]
        save_audio(tmp_path / f"real{n}.wav", wav, RATE)
        lines.append({"path": f"real{n}.wav", "speaker": speaker})
    (tmp_path / "real.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = ("--audio", tmp_path / "real.jsonl", "--piece-seconds", 1, "--out", tmp_path / "o.json")
    if find_spec("matplotlib"):
        words += ("--plot", tmp_path / "o.svg")
    evaluate.main([*map(str, ["long", tmp_path / "made", *words])])
    return json.loads((tmp_path / "o.json").read_text()), capsys.readouterr().out, tmp_path


def test_a_row_a_piece(found):
    report, said, folder = found
    rows = report["rows"]
    assert [row["num_clips"] for row in rows] == [2, 2, 1, 1]  # 0.4 s are less than half
    assert [row["voice"] for row in rows] == [
        None,
        *(pytest.approx(v, abs=1e-4) for v in (0.5, 1, 1)),
    ]
    assert [row["silent"] for row in rows] == pytest.approx([0, 0, 0.5, 0])
    loud = 10 * np.log10(0.1**2 / 2)
    assert [row["level_db"] for row in rows] == pytest.approx(
        [loud, loud, loud + 10 * np.log10(0.5), loud], abs=0.1
    )
    assert report["real"] == pytest.approx({"one speaker": 1, "two speakers": 0}, abs=1e-4)
    assert "1 to 2" in said
    assert "1 of 3 files are not made: left out" in said
    assert "real recordings of two speakers: 0.000" in said
    if find_spec("matplotlib"):
        assert (folder / "o.svg").read_text().count("<path") > 5


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(ValueError, match="nothing: no such folder of clips"):
        evaluate.main(["long", str(tmp_path / "nothing")])
    save_audio(tmp_path / "x.wav", torch.from_numpy(tone(200, 2))[None], RATE)
    with pytest.raises(ValueError, match="every clip is shorter than half of 10 s"):
        evaluate.main(["long", str(tmp_path)])
    for wrong in ("0", "nan", "inf"):
        with pytest.raises(ValueError, match=r"--piece-seconds .*: a number, at least 1"):
            evaluate.main(["long", str(tmp_path), "--piece-seconds", wrong])
    with pytest.raises(ValueError, match="--limit chooses among the real recordings: add --audio"):
        evaluate.main(["long", str(tmp_path), "--limit", "1"])


def test_silence_has_no_level():
    assert evaluate_long.level_db(np.zeros(10, "f4")) is None
