"""scripts/align_phones.py on the bundled speech: what comes out, and what is left out and said."""

import json
import sys
from pathlib import Path

import pytest
import torch

from data.audio import Recording, find_recordings, load_audio
from scripts import align_phones
from scripts.align_phones import align, align_all, load_decoder, split_words
from scripts.evaluate_semantic import read_alignments

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "data" / "demo" / "manifest.jsonl"


@pytest.fixture(scope="module")
def decoder():
    pytest.importorskip("pocketsphinx")
    return load_decoder()


def demo(*names: str) -> list[Recording]:
    return [r for r in find_recordings(DEMO) if Path(r.name).stem in names]


def pronunciations(decoder, word: str) -> list[list[str]]:
    """Those of the dictionary: of word, word(2), word(3), ..."""
    found = []
    while phones := decoder.lookup_word(f"{word}({len(found) + 1})" if found else word):
        found.append(phones.split())
    return found


def says(phones: list[str], words: list[list[list[str]]]) -> bool:
    """Whether `phones` are one pronunciation of each of the words, in order."""
    if not words:
        return not phones
    starts = (p for p in words[0] if phones[: len(p)] == p)
    return any(says(phones[len(p) :], words[1:]) for p in starts)


def write_manifest(path: Path, **texts: str | None) -> Path:
    """A manifest of the same recording under as many names, each with its text."""
    audio = path.parent / "audio"
    audio.mkdir()
    for name in texts:
        (audio / f"{name}.opus").symlink_to(DEMO.parent / "audio" / "vm-then-pound.opus")
    lines = [
        {"path": f"audio/{name}.opus", "text": text, "split": "test"}
        for name, text in texts.items()
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def command(monkeypatch, *args: object) -> None:
    monkeypatch.setattr(sys, "argv", ["align_phones", *map(str, args)])
    align_phones.run_cli(align_phones.main)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't STOP -- it\u2019s the dogs' 're-record'!", "don't stop it's the dogs re record"),
        ("Press 1, pay $5 & go_home.", "press 1 pay $ 5 & go home"),
        ("... _ !", ""),
    ],
)
def test_words(text: str, words: str):
    assert split_words(text) == words.split()


@pytest.mark.parametrize("name", ["vm-newuser", "vm-invalid-password", "queue-thankyou"])
def test_phones_are_those_of_the_words_end_to_end(decoder, name: str):
    (recording,) = demo(name)
    wav, words = load_audio(recording.path, 16_000), split_words(recording.text)
    starts, ends, phones = zip(*align(decoder, wav, words), strict=True)
    assert starts == (0, *ends[:-1])
    assert all(end - start > 0.02 for start, end in zip(starts, ends, strict=True))
    assert 0 <= wav.shape[1] / 16_000 - ends[-1] < 0.02
    spoken = [phone for phone in phones if phone != "SIL"]
    assert says(spoken, [pronunciations(decoder, word) for word in words])
    assert not says(spoken[1:], [pronunciations(decoder, word) for word in words])


def test_silence_is_found_where_it_was_put(decoder):
    (recording,) = demo("vm-then-pound")
    wav, words = load_audio(recording.path, 16_000), split_words(recording.text)
    hush = 1e-3 * torch.randn(1, 16_000, generator=torch.Generator().manual_seed(0))
    alone = align(decoder, wav, words)
    (start, end, phone), (_, _, second), *_ = align(decoder, torch.cat([hush, wav], 1), words)
    assert (start, phone, second) == (0, "SIL", "DH")
    assert end == pytest.approx(1, abs=0.25)
    assert align(decoder, wav, words) == alone  # whatever came before


def test_what_cannot_be_aligned_is_left_out_and_does_no_harm(decoder, tmp_path: Path):
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"RIFF")
    good, long = demo("vm-then-pound", "vm-newuser")
    assert (good.name, long.name) == ("audio/vm-newuser.opus", "audio/vm-then-pound.opus")
    recordings = [
        Recording("words", good.path, "Welcome to Xyzzy, plugh, xyzzy."),
        Recording("misfit", long.path, " ".join([good.text] * 3)),
        Recording("mute", good.path),
        Recording("dots", good.path, "..."),
        Recording("broken", broken, "Welcome."),
        good,
    ]
    aligned, left_out = align_all(recordings)
    assert aligned.keys() == {good.name}
    assert aligned == align_all([good])[0]
    assert left_out.pop("not in the dictionary: xyzzy plugh") == ["words"]
    assert left_out.pop("the text does not fit the audio") == ["misfit"]
    assert left_out.pop("no text") == ["mute", "dots"]
    ((reason, names),) = left_out.items()
    assert "broken.wav" in reason
    assert names == ["broken"]


def test_summary_of_what_was_left_out_stays_short(capsys):
    align_phones.print_left_out({f"reason {n}": ["a"] for n in range(50)} | {"often": ["b"] * 9})
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "left out 9, often (b, b, b, ...)"
    assert lines[1] == "left out 1, reason 0 (a)"
    assert len(lines) == align_phones.MAX_REASONS + 1
    assert lines[-1].startswith(f"left out {51 - align_phones.MAX_REASONS} for other")


def test_command_writes_what_evaluate_reads(decoder, tmp_path: Path, monkeypatch, capsys):
    texts = {"pound": "Then press pound.", "xyzzy": "Then press xyzzy", "mute": None}
    manifest, out = write_manifest(tmp_path / "some.jsonl", **texts), tmp_path / "out.jsonl"
    command(monkeypatch, "--audio", manifest, "--out", out)
    said = capsys.readouterr()
    assert "1 of 3" in said.out
    assert "not in the dictionary: xyzzy (audio/xyzzy.opus)" in said.err
    assert "no text (audio/mute.opus)" in said.err
    found = read_alignments(str(out))
    found.pop("", None)  # of the empty last line
    assert found.keys() == {"audio/pound.opus"}
    phones = [phone for _, _, phone in found["audio/pound.opus"] if phone != "SIL"]
    assert phones == ["DH", "EH", "N", "P", "R", "EH", "S", "P", "AW", "N", "D"]

    before = out.read_bytes()
    out.write_text("mine")
    with pytest.raises(SystemExit) as exit:
        command(monkeypatch, "--audio", manifest, "--out", out)
    assert exit.value.code == 2
    assert "--force" in capsys.readouterr().err
    assert out.read_text() == "mine"
    command(monkeypatch, "--audio", manifest, "--out", out, "--force")
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ({"mute": None, "empty": ""}, (), 'no recording has a "text"'),
        ({"xyzzy": "xyzzy"}, (), "none of 1 recordings"),
        ({"pound": "pound"}, ("--split", "train"), 'no recordings in split "train"'),
        ({"pound": "pound"}, ("--out", "."), "name a file in it"),
    ],
)
def test_mistakes_exit_2_and_write_nothing(
    decoder, tmp_path: Path, monkeypatch, capsys, texts, options, message
):
    manifest, out = write_manifest(tmp_path / "some.jsonl", **texts), tmp_path / "out.jsonl"
    with pytest.raises(SystemExit) as exit:
        command(monkeypatch, "--audio", manifest, "--out", out, *options)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not out.exists()


def test_without_the_package_one_line_says_how_to_get_it(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pocketsphinx", None)  # as if it were not installed
    with pytest.raises(SystemExit) as exit:
        command(monkeypatch, "--audio", DEMO, "--out", tmp_path / "out.jsonl")
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "pip install pocketsphinx==5.0.4" in error
    assert "pocketsphinx==5.0.4" in (ROOT / "pyproject.toml").read_text()
