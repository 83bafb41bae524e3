"""scripts/evaluate.py resynthesis: from tiny trained stages to the table, the JSON and the wavs."""

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from world import RATE, make_world, save_wav

from data.audio import Recording, save_audio
from model.checkpoint import list_checkpoints
from model.semantic import MfccKMeans
from scripts import evaluate, speech_metrics
from scripts import evaluate_resynthesis as module
from scripts.evaluate_resynthesis import Listener, version_row, voices_of_originals
from scripts.resynthesis import VERSIONS, check_wavs, clip_seed, wav_file
from scripts.sample import sample
from scripts.sample_options import sample_parser
from scripts.speech_metrics import PACKAGES

TEXT = "Mr. Brown saw it."
THREE, TWO = ("coarse", "fine"), ("acoustic",)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Runs of every stage, and in the split "test" clips of 0.3 to 1.4 s (a context is 1 s), one
    that is broken, one shorter than a frame, and one without a text."""
    root = make_world(tmp_path_factory.mktemp("world"))
    lines = []
    for n, seconds in enumerate((0.5, 1.4, 0.3, 0.01, 0.7)):
        save_wav(root / "test" / "a" / f"{n}.wav", seconds)
        text = None if n == 4 else TEXT
        lines.append({"path": f"a/{n}.wav", "split": "test", "text": text, "speaker": "ab"[n % 2]})
    (root / "test" / "a" / "broken.wav").write_bytes(b"RIFF")
    save_audio(root / "test" / "a" / "none.wav", torch.zeros(1, 0), RATE)
    lines.append({"path": "a/none.wav", "split": "test", "text": TEXT})
    lines.append({"path": "a/broken.wav", "split": "test", "text": TEXT})
    lines.append({"path": "a/4.wav", "split": "valid"})
    (root / "test" / "m.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return root


@pytest.fixture
def no_packages(monkeypatch):
    for _, modules, _ in PACKAGES.values():
        for name in modules:
            monkeypatch.setitem(sys.modules, name, None)


def report_of(world, out, *words, stages=TWO):
    flags = [str(word) for name in stages for word in (f"--{name}", world / name)]
    flags += ["--audio", str(world / "test" / "m.jsonl"), "--workers", "1", "--device", "cpu"]
    evaluate.main(["resynthesis", *flags, "--out", str(out), *map(str, words)])
    return json.loads(out.read_text())


def test_report_without_packages(world, tmp_path, capsys, no_packages):
    for stages in (TWO, THREE):
        report = report_of(world, tmp_path / "x.json", "--asr", "whisper", stages=stages)
        printed = capsys.readouterr().out
        assert [row["version"] for row in report["rows"]] == list(VERSIONS)
        assert [clip["name"] for clip in report["clips"]] == ["a/0.wav", "a/1.wav", "a/2.wav"]
        assert {s["name"] for s in report["skipped"]} == {"a/3.wav", "a/broken.wav", "a/none.wav"}
        original, reconstruction, resynthesis = report["rows"]
        assert original["minutes"] == pytest.approx(2.2 / 60)
        assert reconstruction["minutes"] == pytest.approx(2.2 / 60)
        assert (2.2 - 3 * 0.04) / 60 <= resynthesis["minutes"] <= 2.2 / 60 + 1e-9
        assert all(row["wer"] is row["speaker_similarity"] is None for row in report["rows"])
        assert set(report["not_measured"]) == {"wer", "speaker_similarity"}
        assert all(PACKAGES[key][2] in printed for key in report["not_measured"])
        assert set(report["checkpoints"]) == set(report["sampling"]) == set(stages)
        (line,) = (line for line in printed.splitlines() if line.startswith("resynthesis"))
        assert line.split() == ["resynthesis", "-", "-", "-", "3", "0.04"]
        assert report["seconds_per_second"] > 0


def test_wavs_repeat_in_any_batch_and_are_those_of_sample(world, tmp_path, no_packages):
    """One clip at a time, all at once, fewer of them: the same sound; another seed: another."""
    made = {}
    for case, words in {
        "all": (),
        "one by one": ("--batch-seconds", 0.1),
        "fewer": ("--match", "a/1"),
        "other seed": ("--seed", 5),
    }.items():
        folder = tmp_path / case
        report = report_of(world, tmp_path / "x.json", "--wavs", folder, *words)
        made[case] = {clip["name"]: clip["seed"] for clip in report["clips"]}
        for clip in report["clips"]:
            for version, seconds in clip["seconds"].items():
                info = soundfile.info(wav_file(folder, clip["name"], version))
                assert info.frames == round(seconds * RATE)

    def read(case, number, version="resynthesis"):
        return wav_file(tmp_path / case, f"a/{number}.wav", version).read_bytes()

    assert read("all", 1) == read("one by one", 1) == read("fewer", 1) != read("other seed", 1)
    assert read("all", 4) == read("one by one", 4)
    assert read("all", 1, "reconstruction") == read("other seed", 1, "reconstruction")
    assert list(made["fewer"]) == ["a/1.wav"]
    words = ["--resynthesize", world / "test" / "a" / "1.wav", "--seed", made["all"]["a/1.wav"]]
    words += ["--acoustic", world / "acoustic", "--out", tmp_path / "y.wav", "--device", "cpu"]
    sample(sample_parser().parse_args(list(map(str, words))))
    assert (tmp_path / "y.wav").read_bytes() == read("all", 1)
    assert (tmp_path / "y-original.wav").read_bytes() == read("all", 1, "original")


def test_words_and_voices(world, tmp_path, capsys, monkeypatch):
    pytest.importorskip("jiwer")
    pytest.importorskip("whisper_normalizer")
    heard = iter(["mister brown saw it", "Mr Brown saw", "Brown"] * 3)

    class WhisperModel:
        def __init__(self, *_, **__):
            pass

        def transcribe(self, wav: np.ndarray, **_):
            assert wav.dtype == np.float32
            return [types.SimpleNamespace(text=next(heard))], None

    class VoiceEncoder:
        """Each length of wav has a voice of its own."""

        def __init__(self, *_, **__):
            pass

        def embed_utterance(self, wav: np.ndarray):
            angle = len(wav) / RATE
            return np.array([np.cos(angle), np.sin(angle)])

    whisper = types.SimpleNamespace(WhisperModel=WhisperModel)
    voice = types.SimpleNamespace(VoiceEncoder=VoiceEncoder, preprocess_wav=lambda wav: wav)
    monkeypatch.setitem(sys.modules, "faster_whisper", whisper)
    monkeypatch.setitem(sys.modules, "resemblyzer", voice)
    report = report_of(world, tmp_path / "x.json", "--asr", "whisper")
    rows = {row["version"]: row for row in report["rows"]}
    assert [rows[version]["wer"] for version in VERSIONS] == [0, 0.25, 0.75]
    assert rows["resynthesis"]["num_words"] == 12
    assert rows["resynthesis"]["wer_interval"] == [0.75, 0.75]
    assert 0 < rows["reconstruction"]["cer"] < rows["resynthesis"]["cer"] < 1
    assert rows["original"]["speaker_similarity"] is None
    assert rows["reconstruction"]["speaker_similarity"] == pytest.approx(1)
    assert 0.99 < rows["resynthesis"]["speaker_similarity"] <= 1
    figures = report["clips"][0]["figures"]
    assert [figures[v]["transcript"] for v in VERSIONS] == [
        "mister brown saw it",
        "Mr Brown saw",
        "Brown",
    ]
    voices = report["voices"]  # of 0.5 s and 0.3 s one speaker, of 1.4 s another
    assert voices["same_speaker"] == pytest.approx(np.cos(0.2))
    assert voices["other_speaker"] == pytest.approx((np.cos(0.9) + np.cos(1.1)) / 2)
    assert (voices["same_speaker_pairs"], voices["other_speaker_pairs"]) == (1, 2)
    printed = capsys.readouterr().out
    assert "75.0% ±0.0%" in printed
    assert "two originals of one speaker: 0.980 (1 pairs)" in printed


def test_voices_of_clips_without_a_speaker_or_a_voice():
    one, two = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    assert voices_of_originals(["a", None, "b"], [one, one, None]) == {}
    found = voices_of_originals(["a", "b", None], [one, two, one])
    assert found["other_speaker"] == 0
    assert found["same_speaker"] is None
    assert found["same_speaker_pairs"] == 0


def test_clips_are_weighed_by_their_words():
    def clip(errors, words):
        figures = {"word_errors": errors, "num_words": words, "speaker_similarity": None}
        return {"figures": {"original": figures}, "seconds": {"original": 30}}

    silent = {"figures": {"original": {"speaker_similarity": 1}}, "seconds": {"original": 60}}
    row = version_row("original", [clip(1, 1), clip(0, 9), silent])
    assert (row["wer"], row["minutes"], row["speaker_similarity"]) == (0.1, 2, 1)
    assert row["wer_interval"][0] <= 0.1 <= row["wer_interval"][1]
    assert row["cer"] is row["cer_interval"] is None


def test_a_resynthesis_without_a_voice_counts(monkeypatch):
    class Similarity:
        embed = staticmethod(lambda wav: np.ones(1) if wav.any() else None)
        __call__ = speech_metrics.SpeakerSimilarity.__call__

    monkeypatch.setattr(module, "SpeakerSimilarity", Similarity)
    listener = Listener(frozenset({"speaker_similarity"}), None)
    wavs = dict(zip(VERSIONS, (np.ones(9), np.ones(9), np.zeros(9)), strict=True))
    figures = listener(wavs, None)["figures"]
    assert [figures[v]["speaker_similarity"] for v in VERSIONS] == [None, 1, 0]


def test_wavs_stay_in_their_folder_and_replace_nothing(tmp_path):
    assert wav_file("out", "a/b.flac", "original") == Path("out/a/b-original.wav")
    assert wav_file("out", "../../b.c.flac", "x") == Path("out/b.c-x.wav")
    assert wav_file("out", "/etc/b.flac", "x") == Path("out/etc/b-x.wav")
    recordings = [Recording(n, tmp_path / n) for n in ("b.wav", "b-original.wav")]
    check_wavs(str(tmp_path / "out"), recordings)
    with pytest.raises(ValueError, match="would replace a recording"):
        check_wavs(str(tmp_path), recordings)
    recordings = [Recording(n, tmp_path / n) for n in ("b.wav", "b.flac")]
    with pytest.raises(ValueError, match="two clips share a name"):
        check_wavs(str(tmp_path / "out"), recordings)


def test_a_seed_for_each_clip():
    seeds = {clip_seed(seed, name) for seed in range(3) for name in ("a", "b")}
    assert len(seeds) == 6
    assert clip_seed(0, "a") == clip_seed(0, "a") >= 0


@pytest.mark.parametrize(
    ("words", "stages", "message"),
    [
        ((), (*TWO, *THREE), "--coarse has no part in this request"),
        ((), ("coarse",), "needs the fine stage: add --fine RUN"),
        (("--asr", "x", "--match", "a/4"), TWO, "--asr needs texts to compare with"),
        (("--batch-seconds", "-1"), TWO, "--batch-seconds -1: expected more than 0"),
        (("--match", "a/3"), TWO, "none of 1 clips can be used: .*shorter than one frame"),
        (("--match", "nobody"), TWO, "--match nobody: in no name"),
        (("--temperature", "x"), TWO, "not a number"),
        (("--semantic-tokenizer", "other"), TWO, "is not the semantic tokenizer of these runs"),
    ],
)
def test_mistakes(world, tmp_path, words, stages, message, no_packages):
    if "other" in words:
        tokenizer = MfccKMeans()
        F = tokenizer.num_features
        tokenizer.set_codebook(torch.zeros(F), torch.ones(F), torch.ones(3, F))
        tokenizer.save(tmp_path / "other")
        words = ("--semantic-tokenizer", tmp_path / "other")
    with pytest.raises(ValueError, match=message):
        report_of(world, tmp_path / "x.json", *words, stages=stages)
    assert not (tmp_path / "x.json").exists()


def test_runs_of_other_tokenizers_are_refused(world, tmp_path, no_packages):
    state_file = list_checkpoints(world / "fine")[-1] / "state.json"
    before = state_file.read_text()
    state = json.loads(before)
    state["tokenizers"]["semantic"]["fingerprint"] = "another"
    try:
        state_file.write_text(json.dumps(state))
        with pytest.raises(ValueError, match=r"coarse and .*fine do not belong together"):
            report_of(world, tmp_path / "x.json", stages=THREE)
    finally:
        state_file.write_text(before)


def test_clips_beyond_the_context_are_skipped_without_timing(tmp_path, no_packages):
    world = make_world(tmp_path / "world", "data.collapse_semantic=true")
    for seconds in (0.8, 1.2):
        save_wav(world / "test" / f"{seconds}.wav", seconds)
    lines = [json.dumps({"path": f"{seconds}.wav", "split": "test"}) for seconds in (0.8, 1.2)]
    (world / "test" / "m.jsonl").write_text("\n".join(lines))
    report = report_of(world, tmp_path / "x.json")
    assert [clip["name"] for clip in report["clips"]] == ["0.8.wav"]
    (skipped,) = report["skipped"]
    assert skipped["name"] == "1.2.wav"
    assert "more than the 1 s of these runs' context" in skipped["reason"]
