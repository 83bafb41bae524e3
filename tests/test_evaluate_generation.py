"""`evaluate generation`: figures that can be worked out by hand, and the command on toy stages."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from world import make_world, save_wav

from data.audio import read_audio, resample
from scripts import evaluate
from scripts import generation_metrics as metrics

THREE = ("semantic", "coarse", "fine")
TOKENS = st.lists(st.integers(0, 2), max_size=12)


def test_frechet_distance_of_known_normals():
    """|difference of means|^2 + (difference of deviations)^2, in each direction."""
    draw = np.random.default_rng(0).standard_normal
    a, b = draw((200_000, 2)), draw((200_000, 2)) * [3, 0.5] + [1, -2]
    expected = 1 + 4 + (3 - 1) ** 2 + (1 - 0.5) ** 2
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=0.01)
    turned = np.array([[0.6, -0.8], [0.8, 0.6]])
    assert metrics.frechet_distance(a @ turned, b @ turned) == pytest.approx(expected, rel=0.01)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert metrics.frechet_distance(a[:1], b) is None
    one = a[:, :1], b[:, :1]
    assert metrics.frechet_distance(*one) == pytest.approx(1 + 4, rel=0.02)


def test_directions_are_those_in_which_the_reference_differs_most():
    draw = np.random.default_rng(0).standard_normal
    features = draw((400, 30)) * np.r_[[50.0, 20.0], np.full(28, 0.1)] + 7
    mean, directions = metrics.main_directions(features)
    assert directions.shape == (30, metrics.NUM_DIRECTIONS)
    inside = (features - mean) @ directions
    assert inside.mean(axis=0) == pytest.approx(np.zeros(16), abs=1e-9)
    assert inside.std(axis=0) == pytest.approx(np.ones(16))
    assert abs(directions[0, 0]) == pytest.approx(1 / 50, rel=0.1)
    assert metrics.main_directions(features[:5])[1].shape == (30, 1)


@given(st.lists(TOKENS, min_size=1, max_size=4), TOKENS)
@settings(max_examples=150, deadline=None)
def test_the_longest_copied_run_is_that_of_looking_everywhere(train, clip):
    train = [np.array(part, dtype=np.int64) for part in train]
    runs = {
        tuple(part[a:b])
        for part in train
        for a in range(len(part))
        for b in range(a, len(part) + 1)
    }
    longest = max(
        (
            b - a
            for a in range(len(clip))
            for b in range(a, len(clip) + 1)
            if tuple(clip[a:b]) in runs
        ),
        default=0,
    )
    assert metrics.Copies(train).longest(np.array(clip, dtype=np.int64)) == longest


def test_silence_and_unlikeness():
    tone = np.sin(np.arange(16_000) / 5)
    assert metrics.silent_share(tone, 16_000) == 0
    assert metrics.silent_share(np.r_[tone, np.zeros(16_000)], 16_000) == 0.5
    assert metrics.silent_share(tone[:10], 16_000) == 1
    clips = [np.array(x) for x in ([1, 2, 3, 4], [1, 2, 3], [7, 8, 9, 10, 11], [])]
    assert metrics.unlikeness(clips) == [0.25, 1.0]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = make_world(tmp_path_factory.mktemp("world"))
    for n in range(5):
        save_wav(root / "long" / f"{n}.wav", 2 + n / 10)
    save_wav(root / "long" / "short.wav", 0.9)
    return root


def evaluated(world, tmp_path, *words, stages=THREE):
    out = tmp_path / "generation.json"
    flags = [word for stage in stages for word in (f"--{stage}", world / stage)]
    words = ("--audio", world / "long", "--prompt-seconds", 0.5, "--seconds", 1, *words)
    evaluate.main([*map(str, ["generation", *flags, *words, "--out", out])])
    return json.loads(out.read_text())


@pytest.mark.parametrize("stages", [THREE, ("semantic", "acoustic")], ids=["fine", "acoustic"])
def test_four_sets_side_by_side(stages, world, tmp_path, capsys):
    found = evaluated(world, tmp_path, "--wavs", tmp_path / "heard", stages=stages)
    rows = {row["set"]: row for row in found["rows"]}
    assert [*rows] == ["real", "reconstruction", "continued", "unprompted"]
    assert {row["num_clips"] for row in rows.values()} == {5}
    assert [skip["name"] for skip in found["skipped"]] == ["short.wav"]
    assert rows["real"]["seconds"] == rows["reconstruction"]["seconds"] == 1
    assert 0 < rows["continued"]["seconds"] <= 1
    for row in rows.values():
        assert 0 <= row["silent"] <= 1
        assert 0 <= row["distinct"] <= 1
    for name, row in rows.items():
        wavs = [*(tmp_path / "heard").glob(f"*-{name}.wav")]
        assert len(wavs) == 5
        lengths = [read_audio(wav)[0].shape[1] / 16_000 for wav in wavs if wav.stat().st_size > 44]
        assert sum(lengths) / 5 == pytest.approx(row["seconds"], abs=0.01)
    said = capsys.readouterr().out
    assert "copied: the longest run" in said
    assert "unprompted" in said


def test_the_same_seed_gives_the_same_figures_whatever_the_batch(world, tmp_path):
    first = evaluated(world, tmp_path, "--seed", 3, "--batch-size", 2)
    again = evaluated(world, tmp_path, "--seed", 3, "--batch-size", 5)
    for ours, theirs in zip(first["rows"], again["rows"], strict=True):
        for key in ("seconds", "copied", "unlike", "distinct"):
            assert ours[key] == pytest.approx(theirs[key]), (ours["set"], key)


def test_another_embedder(world, tmp_path):
    found = evaluated(world, tmp_path, "--embedder", "pretrained/semantic_mfcc")
    assert found["embedder"] == "pretrained/semantic_mfcc"
    distances = {row["set"]: row["frechet"] for row in found["rows"]}
    usual = {row["set"]: row["frechet"] for row in evaluated(world, tmp_path)["rows"]}
    assert distances["real"] > 0
    assert distances["real"] != usual["real"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--seconds", "0.2"), "--seconds 0.2: at least 1"),
        (("--prompt-seconds", "0.1"), "--prompt-seconds 0.1: at least 0.5"),
        (("--prompt-seconds", "9"), "no recording can be continued: .* shorter than 10 s"),
        (("--limit", "0"), "--limit 0: at least 1"),
    ],
)
def test_mistakes_are_named(words, said, world, tmp_path):
    with pytest.raises(ValueError, match=said):
        evaluated(world, tmp_path, *words)


def test_a_clip_that_ends_at_once_is_counted(world, monkeypatch, tmp_path):
    """Also where the codec has another rate, at which nothing cannot be resampled."""
    from scripts.evaluate_generation import Generator

    monkeypatch.setattr(
        Generator, "continued", lambda self, part: [torch.empty(1, 0) for _ in part]
    )
    rows = {row["set"]: row for row in evaluated(world, tmp_path)["rows"]}
    assert (rows["continued"]["seconds"], rows["continued"]["silent"]) == (0, 1)
    assert rows["continued"]["frechet"] is None
    assert resample(torch.empty(1, 0), 24_000, 16_000).shape == (1, 0)


def test_features_of_seconds(world):
    from model.semantic import load_semantic

    tokenizer = load_semantic(str(world / "mfcc"))
    wav = torch.rand(1, 40_000)  # 2.5 s at 16 kHz: the half second counts
    found = metrics.second_features(wav, tokenizer)
    assert found.shape == (3, tokenizer.num_features)
    whole = ((tokenizer.features(wav[None])[0] - tokenizer.mean) / tokenizer.std)[:50].mean(dim=0)
    np.testing.assert_allclose(found[0], whole.numpy(), rtol=1e-4, atol=1e-5)
    assert metrics.second_features(wav[:, :1000], tokenizer).shape == (0, tokenizer.num_features)
