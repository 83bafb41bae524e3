"""scripts/evaluate_semantic.py: figures of sequences with known answers, then the command."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.audio import load_audio, save_audio
from scripts import evaluate
from scripts import semantic_metrics as metrics
from scripts.evaluate_semantic import read_alignments
from scripts.semantic_metrics import PERTURBATIONS, SAMPLE_RATE

ROOT = Path(__file__).resolve().parent.parent
DEMO, MFCC = ROOT / "data" / "demo", str(ROOT / "pretrained" / "semantic_mfcc")
TOKENS = st.lists(st.integers(0, 3), max_size=7)


def uniform(num_tokens: int, size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, num_tokens, size)


def by_definition(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Levenshtein's recursion."""

    @cache
    def distance(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        replaced = distance(i - 1, j - 1) + (a[i - 1] != b[j - 1])
        return min(replaced, distance(i - 1, j) + 1, distance(i, j - 1) + 1)

    return distance(len(a), len(b))


def test_collapse():
    assert metrics.collapse(np.array([0, 0, 3, 3, 3, 0, 1])).tolist() == [0, 3, 0, 1]
    assert metrics.collapse(np.array([], dtype=int)).tolist() == []


def test_bits_of_a_uniform_source():
    unigram, bigram = metrics.cross_entropies([uniform(8, 20_000, 0)], [uniform(8, 5000, 1)], 8)
    assert unigram == pytest.approx(3, abs=0.01)
    assert bigram == pytest.approx(3, abs=0.02)


def test_bits_of_a_cycle_are_in_the_unigram_alone():
    cycle = np.arange(4000) % 8
    unigram, bigram = metrics.cross_entropies([cycle], [cycle[:800]], 8)
    assert unigram == pytest.approx(3, abs=0.01)
    assert bigram < 0.03


def test_bits_of_a_pair_by_hand():
    """Counts 0: 2, 1: 1 of 3 (each + 1/2); after 0 came 0 and 1, once each; after 1 nothing."""
    train, p = [np.array([0, 0, 1])], np.array([2.5, 1.5, 0.5]) / 4.5
    unigram, bigram = metrics.cross_entropies(train, [np.array([0, 2]), np.array([1, 2])], 3)
    assert unigram == pytest.approx(-np.log2(p[[0, 2, 1, 2]]).mean())
    after_0, after_1 = (0 + 2 * p[2]) / (2 + 2), p[2]
    assert bigram == pytest.approx(-np.log2([p[0], after_0, p[1], after_1]).mean())


def test_chances_of_all_that_may_follow_sum_to_one():
    train = [uniform(5, 30, seed) for seed in range(3)]
    for before in range(5):
        chances = []
        for after in range(5):
            _, both = metrics.cross_entropies(train, [np.array([before, after])], 5)
            first, _ = metrics.cross_entropies(train, [np.array([before])], 5)
            chances.append(2 ** (first - 2 * both))
        assert sum(chances) == pytest.approx(1)


def test_rates():
    clip = np.repeat(uniform(4, 2500, 0) * 2 + np.arange(2500) % 2, 2)  # no token follows itself
    row = metrics.rate_figures([clip], [clip], 16, seconds=100.0)
    assert row["tokens_per_second"] == 50
    assert row["collapsed_tokens_per_second"] == 25
    assert row["run_length"] == 2
    assert row["tokens_used"] == 0.5
    assert row["bits_unigram"] == pytest.approx(50 * 3, rel=0.01)
    assert row["bits_bigram"] == pytest.approx(
        50 * (1 + 2 / 2), rel=0.02
    )  # go on half the time: where
    assert row["collapsed_bits_bigram"] == pytest.approx(25 * 2, rel=0.02)
    assert row["collapsed_perplexity_bigram"] == pytest.approx(4, rel=0.05)


@settings(max_examples=60, deadline=None)
@given(TOKENS, st.lists(TOKENS, min_size=1, max_size=4))
def test_edit_distances_are_by_definition(query, others):
    found = metrics.edit_distances(
        np.array(query, dtype=int), [np.array(other, dtype=int) for other in others]
    )
    for distance, other in zip(found, others, strict=True):
        longer = max(len(query), len(other), 1)
        assert distance == pytest.approx(by_definition(tuple(query), tuple(other)) / longer)


def test_histograms_that_give_away_the_speaker():
    speakers = [name for name in "abc" for _ in range(6)]
    voices = [uniform(4, 200, i) + 4 * (i // 6) for i in range(18)]
    assert metrics.speakers_given_away(voices, speakers, 12) == [1.0] * 18
    words = [uniform(12, 200, i) for i in range(18)]
    assert sum(metrics.speakers_given_away(words, speakers, 12)) < 12  # chance is 6
    assert metrics.speakers_given_away([], [], 12) == []


def test_pieces_that_give_away_the_speaker():
    """a says 0, b says 1; the first clip of a begins like b."""
    clips = [np.repeat(tokens, 5) for tokens in ([1, 0, 0, 0], [0, 0, 0], [1, 1, 1], [1, 1])]
    shares = metrics.speakers_given_away(clips, ["a", "a", "b", "b"], 2, piece=5)
    assert shares == [0.75, 1, 1, 1]
    shares = metrics.speakers_given_away(clips, ["a", "a", "b", "b"], 2, piece=8)  # 8, 8 and 4
    assert shares[0] == pytest.approx(2 / 3)


def test_a_speaker_is_not_known_by_the_clip_itself():
    alone = [np.full(9, token) for token in (0, 1, 1, 0)]
    assert metrics.speakers_given_away(alone, ["a", "a", "b", "b"], 2) == [0.0] * 4


def test_as_many_clips_of_each_speaker():
    speakers = ["a"] * 9 + [None] * 7 + ["b"] * 4 + ["c"] * 3
    chosen = metrics.choose_speakers(speakers)
    assert [speakers[i] for i in chosen] == ["a"] * 4 + ["b"] * 4
    assert len(set(chosen)) == 8
    assert metrics.choose_speakers(speakers[:16]) == []


def test_takes_of_a_phrase():
    """Two takes by one voice are alike, the one by another voice is not; None is no phrase."""
    clips = [np.array(tokens) for tokens in ([1, 2, 3, 4], [1, 2, 3, 5], [6, 7, 8, 9], [1, 2], [1])]
    texts = ["Yes, you!", "yes YOU", "yes -- you", "no", None]
    row = metrics.phrase_figures(clips, clips, texts, ["a", "a", "b", "b", None], [1.0] * 5)
    assert row["num_takes"] == 3
    other = (0.5 + 0.5 + 1) / 3
    assert row["phrase_ratio"] == pytest.approx((2 * 0.25 + 4 * 1) / 6 / other)
    assert row["phrase_ratio_across_speakers"] == pytest.approx(1 / other)
    assert row["phrase_retrieval"] == pytest.approx(2 / 3)
    changed = metrics.phrase_figures([clips[3]] * 5, clips, texts, ["a"] * 5, [1.0] * 5)
    assert (changed["phrase_retrieval"], changed["phrase_ratio_across_speakers"]) == (0, None)
    lone = metrics.phrase_figures(clips[:1], clips[:1], texts[:1], ["a"], [1.0])
    assert (lone["phrase_ratio"], lone["phrase_retrieval"], lone["num_takes"]) == (None, None, 0)


def test_agreement_with_phones():
    """Frames of 0.1 s. Phones x, y halve the clip; z lies beyond its end."""
    phones = [[(0.0, 0.4, "x"), (0.4, 0.8, "y"), (2.0, 3.0, "z")]]

    def figures(tokens: list[int]) -> list[float | None]:
        return list(metrics.phone_figures([np.array(tokens)], phones, 10.0).values())

    assert figures([0, 1, 0, 1, 2, 2, 2, 2, 9, 9]) == pytest.approx([1, 1])  # 9: in no phone
    assert figures([5, 6, 5, 6, 5, 6, 5, 6]) == pytest.approx([0, 0.5])
    # y, y, y of four in one token, x x x x y in the other: I = H(phone) - 5/8 h(1/5)
    h = -(0.8 * np.log2(0.8) + 0.2 * np.log2(0.2))
    assert figures([0, 0, 0, 0, 0, 1, 1, 1]) == pytest.approx([1 - 5 / 8 * h, 7 / 8])
    assert list(metrics.phone_figures([np.zeros(4)], [[]], 10.0).values()) == [None, None]


def test_perturbations_keep_the_length_and_do_what_they_say():
    time = torch.arange(8001) / SAMPLE_RATE
    wav = 0.5 * torch.sin(2 * torch.pi * 160 * time)[None]  # [1, L]
    high = wav + 0.5 * torch.sin(2 * torch.pi * 1600 * time)

    def peak(wav: torch.Tensor) -> float:
        return torch.fft.rfft(wav[0]).abs().argmax().item() * SAMPLE_RATE / wav.shape[1]

    changed = metrics.perturb(wav, seed=1)
    assert set(changed) == set(PERTURBATIONS)
    assert {version.shape for version in changed.values()} == {wav.shape}
    assert peak(changed["pitch"]) == pytest.approx(180, abs=4)
    assert peak(metrics.perturb(wav, seed=2)["pitch"]) == pytest.approx(160 * 8 / 9, abs=4)
    for name, db in (("noise_20db", 20), ("noise_10db", 10)):
        ratio = wav.square().sum() / (changed[name] - wav).square().sum()
        assert 10 * ratio.log10() == pytest.approx(db, abs=0.2)
    assert changed["gain"].square().sum() / wav.square().sum() == pytest.approx(0.1)
    assert peak(metrics.perturb(high, seed=1)["band"]) == pytest.approx(1600, abs=2)
    assert changed["band"].abs().mean() < 0.05 * wav.abs().mean()
    assert metrics.perturb(wav[:, :100], seed=1)["pitch"].shape == (1, 100)


# ---- the command ---------------------------------------------------------------------------------


def test_command(tmp_path, capsys):
    test = [json.loads(line) for line in (DEMO / "manifest.jsonl").read_text().splitlines()]
    name = next(clip["path"] for clip in test if clip["split"] == "test")
    alignments, out = tmp_path / "phones.jsonl", tmp_path / "out.json"
    phones = [[0.0, 1.0, "a"], [1.0, 2.5, "b"]]
    alignments.write_text(json.dumps({"name": name, "phones": phones}) + "\n")
    options = ["--tokenizers", MFCC, MFCC, "--audio", str(DEMO / "manifest.jsonl")]
    options += ["--limit", "3", "--train-limit", "8", "--alignments", str(alignments)]
    evaluate.main(["semantic", *options, "--out", str(out)])

    report = json.loads(out.read_text())
    first, second = report["rows"]
    assert first == second
    assert report["num_clips"] == 3
    assert first["tokens_per_second"] == pytest.approx(50, rel=0.02)
    assert first["collapsed_tokens_per_second"] < first["tokens_per_second"]
    assert first["bits_bigram"] < first["bits_unigram"] < 50 * 9.5
    assert all(0 < first[f"distance_{name}"] <= 1 for name in PERTURBATIONS)
    assert first["distance_noise_20db"] < first["distance_noise_10db"]
    assert first["distance_gain"] < first["distance_other_clip"]
    assert first["speaker_accuracy"] is None  # one speaker
    assert 0 < first["pnmi"] <= 1
    printed = capsys.readouterr().out
    assert printed.count(MFCC) == 4, "a row of each tokenizer in either table"
    assert "speaker: not measured" in printed
    assert "phrase ratio  " not in printed, "a column without figures is left out"


def test_command_with_speakers_and_takes(tmp_path, capsys):
    wav = load_audio(DEMO / "audio" / "vm-newuser.opus", SAMPLE_RATE)
    lines = [{"path": "broken.wav", "split": "test"}, {"path": "a0.wav", "split": "train"}]
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    for i in range(4):
        for speaker, level in (("a", 1.0), ("b", 0.05)):
            clip = f"{speaker}{i}.wav"
            crop = wav[:, 8000 * i :][:, :8000]
            save_audio(tmp_path / clip, level * crop, SAMPLE_RATE)
            line = {"path": clip, "speaker": speaker, "text": f"part {i}", "split": "test"}
            lines.append(line)
    manifest, out = tmp_path / "manifest.jsonl", tmp_path / "out.json"
    manifest.write_text("\n".join(map(json.dumps, lines)))
    options = ["--tokenizers", MFCC, "--audio", str(manifest), "--out", str(out)]
    evaluate.main(["semantic", *options])
    report = json.loads(out.read_text())
    row = report["rows"][0]
    assert report["speakers"] == {"names": ["a", "b"], "num_clips": 8}
    assert [clip["name"] for clip in report["skipped"]] == ["broken.wav"]
    assert row["speaker_accuracy"] == 0  # the nearest histogram: the same words by the other one
    assert row["num_takes"] == 8
    assert row["phrase_ratio"] < row["pitch_phrase_ratio"] < 1
    assert row["phrase_ratio"] == row["phrase_ratio_across_speakers"] < 0.9
    assert "8 clips of 2 speakers, chance 50.0%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--limit", "0"], "--limit 0: at least 1"),
        (["--train-limit", "0"], "--train-limit 0: at least 1"),
        (["--split", "valid", "--audio", "nowhere"], "nowhere: no such folder"),
        (["--tokenizers", "nothing"], "nothing: not a semantic tokenizer"),
        (["--alignments", "phones.jsonl"], "no name of it is among the clips"),
    ],
)
def test_mistakes_are_named(extra, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("phones.jsonl").write_text('{"name": "other.wav", "phones": []}\n')
    options = ["--tokenizers", MFCC, "--audio", str(DEMO / "manifest.jsonl"), "--limit", "1"]
    with pytest.raises(ValueError, match=message):
        evaluate.main(["semantic", *options, *extra])


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"name": "a"}', '{"name": "a", "phones": [[0, "b"]]}']
)
def test_malformed_alignments_are_named(line, tmp_path):
    file = tmp_path / "phones.jsonl"
    file.write_text('{"name": "a.wav", "phones": [[0, 0.5, "AH"]]}\n' + line)
    with pytest.raises(ValueError, match=r"phones\.jsonl, line 2: expected"):
        read_alignments(str(file))
