"""The listening page: one self-contained file, whose players hold sound and whose numbers are those
of the checkpoint that is sampled."""

import base64
import io
import json
import math
import re
import struct
import sys
import wave
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from data.audio import save_audio
from scripts import report
from scripts.figures import grey_png, loss_svg, spectrogram

VOID = {"meta", "img", "br", "path", "link", "input"}


class Page(HTMLParser):
    """Collects tags with their attributes and the open ones, to see that every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1:] == [tag], f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def all(self, tag: str) -> list[dict]:
        return [attrs for name, attrs in self.tags if name == tag]


def start_line(stage: str, codebooks: list[str], time: float) -> dict:
    nats = {"nats": [math.log(1024)] * len(codebooks), "bits_per_second": 1500.0}
    unigram = {"nats": [5.5] * len(codebooks), "bits_per_second": 1190.0}
    return {
        "kind": "start",
        "stage": stage,
        "num_parameters": 1_234_567,
        "codebooks": codebooks,
        "uniform": nats,
        "unigram": unigram,
        "device": "cpu <2 threads>",
        "attention": "math",
        "versions": {"torch": "2.11.0"},
        "commit": "0123abc",
        "time": time,
    }


def step_line(kind: str, step: int, loss: float, codebooks: int, time: float) -> dict:
    line = {"kind": kind, "step": step, "loss": loss, "per_codebook": [loss] * codebooks}
    line |= {"bits_per_second": loss * 200, "time": time}
    if kind == "train":
        line |= {"tokens_per_second": 1000.0 + step, "mfu": None, "peak_memory_gib": None}
    return line


def write_run(folder: Path, stage: str = "coarse", codebooks: tuple = ("c0", "c1", "c2")) -> Path:
    """A run that crashed after step 30 and went on from its checkpoint of step 20."""
    k = len(codebooks)
    lines = [start_line(stage, list(codebooks), 1000.0)]
    lines += [step_line("train", s, 7.0 - s / 10, k, 1000.0 + s) for s in (10, 20, 30)]
    lines += [start_line(stage, list(codebooks), 5000.0)]
    lines += [step_line("train", s, 6.0 - s / 10, k, 4980.0 + s) for s in (30, 40)]
    lines += [step_line("valid", 20, 2.25, k, 5018.0), step_line("valid", 40, 4.5, k, 5020.0)]
    lines += [{"kind": "end", "step": 40, "time": 5020.0}]
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text("model:\n  name: <b>tiny</b>\n")
    return folder


def write_samples(folder: Path) -> Path:
    tone = torch.sin(torch.arange(16_000) / 16_000 * 2 * math.pi * 440)[None] / 2
    for name in ("unprompted-0", "continuation-0", "continuation-1", "original", "codec"):
        save_audio(folder / f"{name}.wav", tone, 16_000)
    common = {
        "sampling": {"semantic": {"temperature": 0.9, "top_k": 0, "top_p": 1.0}},
        "command": "a <b> & c",
    }
    unprompted = {"mode": "unprompted", "files": ["unprompted-0.wav"], "seconds": [1.0]}
    unprompted |= {"seeds": [7], "prompt": None, "original": None, "reconstruction": None}
    continuation = {
        "mode": "continuation",
        "files": ["continuation-0.wav", "continuation-1.wav"],
        "seconds": [1.0, 1.0],
        "seeds": [3, 4],
        "prompt": {"path": "<x> & y.wav", "seconds": 0.25},
        "original": "original.wav",
        "reconstruction": "codec.wav",
    }
    (folder / "unprompted.json").write_text(json.dumps(unprompted | common))
    (folder / "continuation.json").write_text(json.dumps(continuation | common))
    return folder


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", "semantic", ("semantic",))]
    samples = write_samples(tmp_path / "samples")
    out = tmp_path / "index.html"
    arguments = [*map(str, runs), "--samples", str(samples), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["report", *arguments])
    report.main()
    return out.read_text(encoding="utf-8")


def test_page_is_whole_and_needs_no_network(page: str):
    parsed = Page(page)
    assert parsed.open == [], "unclosed tags"
    assert "<!--" not in page, "a placeholder was left unfilled"
    sources = [a[k] for _, a in parsed.tags for k in ("src", "href", "srcset", "poster") if k in a]
    assert sources
    assert all(source.startswith("data:") for source in sources)
    assert not re.search(r"https?://|@import|url\(", page)


def test_settings_that_differ_are_side_by_side(tmp_path):
    runs = [report.Run(tmp_path / name) for name in "abc"]
    texts = [
        "out: a\nmodel: {dim: 64, heads: 2}\n",
        "out: b\nmodel: {dim: 32, heads: 2}\n",
        "not: [yaml",
    ]
    for run, text in zip(runs, texts, strict=True):
        run.folder.mkdir()
        (run.folder / "config.yaml").write_text(text)
    assert report.differences(runs[:2]) == {"model.dim": ["64", "32"]}
    assert report.differences(runs[:1]) == {}
    assert report.differences(runs)["model.heads"] == ["2", "2", "-"]


def test_every_player_holds_sound_and_is_labelled(page: str):
    players = Page(page).all("audio")
    assert len(players) == 5
    for player in players:
        kind, _, content = player["src"].partition(",")
        assert kind == "data:audio/wav;base64"
        with wave.open(io.BytesIO(base64.b64decode(content))) as sound:
            assert sound.getnframes() / sound.getframerate() == pytest.approx(1.0)
        assert "controls" in player
        assert "seconds" in player["aria-label"]
    assert all(image["alt"] and image["src"] for image in Page(page).all("img"))


def test_a_prompt_that_was_cut_is_said_to_be_the_last_part(tmp_path, monkeypatch):
    run, samples = write_run(tmp_path / "a"), write_samples(tmp_path / "samples")
    record = json.loads((samples / "continuation.json").read_text())
    record["prompt"]["first_second"] = 0.75
    (samples / "continuation.json").write_text(json.dumps(record))
    out = tmp_path / "index.html"
    arguments = ["report", str(run), "--samples", str(samples), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    report.main()
    assert "Given: the last 0.2 s of &lt;x&gt;" in out.read_text(encoding="utf-8")


def test_page_says_what_was_asked_and_marks_the_prompt(page: str):
    assert page.count("<h2>Listen</h2>") == 1
    assert page.index("Unprompted") < page.index("Continuation")
    assert "temperature 0.9" in page
    assert "Given: the first 0.2 s of &lt;x&gt; &amp; y.wav" in page
    assert "top-" not in page, "knobs that change nothing are not listed"
    assert page.count('class="prompt" style="width:25.00%"') == 2
    assert "seed 7" in page
    assert "&lt;b&gt;tiny&lt;/b&gt;" in page
    assert "cpu &lt;2 threads&gt;" in page


def test_run_keeps_the_last_line_of_a_step_and_sums_starts(tmp_path: Path):
    run = report.read_run(write_run(tmp_path / "run"))
    assert {step: event["loss"] for step, event in run.train.items()} == {
        10: 6.0,
        20: 5.0,
        30: 3.0,
        40: 2.0,
    }
    assert run.seconds == pytest.approx(30 + 20)  # not the hour between crash and restart
    assert len(report.codebooks(run)) == 3


def test_the_best_validation_is_shown_for_it_is_what_is_sampled(tmp_path: Path):
    run = report.read_run(write_run(tmp_path / "run"))
    assert run.valid[40]["loss"] > run.valid[20]["loss"]
    page = report.render_page([run], [])
    assert "<span>best 2.25 at step 20 of 40</span>" in page
    assert "nats per token</th><td>2.250</td>" in page
    assert "… at step</th><td>20</td>" in page
    assert page.count("<td>2.25</td>") == 3  # a row for each codebook
    assert not re.search("<td>4.50?<", page)
    run.valid[10] = run.valid[40] | {"loss": math.nan}
    assert run.best["step"] == 20


def test_run_without_validation_or_with_a_cut_last_line_is_shown(tmp_path: Path):
    folder = tmp_path / "run"
    folder.mkdir()
    lines = [start_line("coarse", ["c0"], 0.0), step_line("train", 1, 6.5, 1, 1.0)]
    log = "".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "tra'
    (folder / "log.jsonl").write_text(log)
    page = report.render_page([report.read_run(folder)], [])
    assert "not validated yet" in page
    assert "No samples given." in page
    assert "<audio" not in page
    assert Page(page).open == []


@pytest.mark.parametrize(
    ("log", "message"),
    [
        (None, "no such file"),
        ("", "no training step logged yet"),
        (json.dumps(start_line("coarse", ["c0"], 0.0)), "no training step logged yet"),
        ('nonsense\n{"kind": "end", "step": 1, "time": 1}\n', "line 1: not a line"),
    ],
)
def test_bad_logs_are_named(tmp_path: Path, log: str | None, message: str):
    if log is not None:
        (tmp_path / "log.jsonl").write_text(log)
    with pytest.raises(ValueError, match=message):
        report.read_run(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"files": ["gone.wav"]}, r"continuation.json: lists gone.wav, which is not beside it"),
        ({"mode": "karaoke"}, r"continuation.json: not one of scripts.sample's files .*karaoke"),
        ({"prompt": None}, r"continuation.json: not one of scripts.sample's files"),
    ],
)
def test_bad_samples_are_named(tmp_path: Path, change: dict, message: str):
    path = write_samples(tmp_path / "samples") / "continuation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        report.read_samples(path.parent)


def test_missing_or_empty_samples_folder_is_named(tmp_path: Path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match=f"{folder.name}: no samples in it"):
            report.read_samples(folder)


def test_png_decodes_to_the_pixels_given():
    pixels = torch.arange(12, dtype=torch.uint8).view(3, 4) * 20  # [H, W]
    png = grey_png(pixels)
    assert struct.unpack(">II", png[16:24]) == (4, 3)
    start = png.index(b"IDAT") + 4
    rows = zlib.decompress(png[start : png.index(b"IEND")])
    assert [list(rows[i * 5 + 1 : i * 5 + 5]) for i in range(3)] == pixels.tolist()


def test_spectrogram_is_dark_where_the_tone_is():
    seconds = torch.arange(16_000) / 16_000
    tone = torch.sin(2 * math.pi * 500 * seconds)[None]
    png = grey_png(spectrogram(tone, 16_000, num_mels=64))
    width, height = struct.unpack(">II", png[16:24])
    assert (width, height) == (126, 64)
    rows = zlib.decompress(png[png.index(b"IDAT") + 4 : png.index(b"IEND")])
    column = [rows[y * (width + 1) + 1 + width // 2] for y in range(height)]
    mel = 64 * math.log1p(500 / 700) / math.log1p(8000 / 700)  # HTK scale, from the bottom
    assert column.index(min(column)) == pytest.approx(63 - mel, abs=1.5)


def test_curves_leave_out_losses_that_are_not_finite():
    curves = {"train": [(0, 7.0), (1, math.nan), (2, 5.0)], "valid": []}
    svg = loss_svg(curves, {"uniform": 6.9}, "a 'label'")
    assert "nan" not in svg
    points = re.search(r"class='train' points='([^']*)'", svg)[1].split()
    assert len(points) == 2
    assert float(points[0].split(",")[1]) < float(points[1].split(",")[1]), "a lower loss is lower"
