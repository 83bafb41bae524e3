"""`evaluate pairs`: what pairs are made of, how they are scored, which lists are read."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from world import RATE, make_world, save_wav

from data.shards import TokenFolder
from model.checkpoint import load_stage
from scripts import evaluate
from scripts.pairs import (
    Pair,
    PairMaker,
    Sample,
    judge,
    nats_of,
    proportion_interval,
    read_pairs,
    scored_from,
)

STAGES = ("semantic", "coarse", "fine", "acoustic")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def collapsed(tmp_path_factory):
    root = tmp_path_factory.mktemp("collapsed")
    return make_world(root, "data.collapse_semantic=true", semantic_hop=160)


@pytest.fixture
def voiced(world, monkeypatch):
    """The world's clips with two speakers, and tokens drawn at random."""
    folder, tokens = TokenFolder(world / "tokens"), {}
    for n, clip in enumerate(folder.all_clips):
        object.__setattr__(clip, "speaker", "ab"[n % 2])
        draw = np.random.default_rng(n).integers
        shape = 4, clip.num_frames
        tokens[clip.name] = draw(12, size=shape[1]), draw(16, size=shape).astype(np.uint16)
    monkeypatch.setattr(folder, "read", lambda clip: tokens[clip.name])
    return folder


def evaluated(tmp_path, *words):
    out = tmp_path / "pairs.json"
    evaluate.main(["pairs", *map(str, words), "--out", str(out)])
    return json.loads(out.read_text())


def test_pairs_differ_in_what_their_kind_says(voiced):
    maker = PairMaker(voiced, "train", 1.0, seed=0)
    made = list(maker.pairs(None))
    assert {pair.kind for pair in made} == {"order", "beginning", "speaker"}
    clips, H = {clip.name: clip for clip in maker.clips}, maker.half
    voice_of = {voiced.read(c)[1][:, :H].tobytes(): c.speaker for c in maker.clips}
    for pair in made:
        (good,), (bad,), clip = pair.good, pair.bad, clips[pair.item]
        assert good.codes.shape == bad.codes.shape == (4, 2 * H)
        assert good.semantic.shape == bad.semantic.shape
        assert not torch.equal(good.codes, bad.codes)
        own = torch.from_numpy(voiced.read(clip)[1].astype(np.int64))
        if pair.kind == "order":
            assert torch.equal(good.codes, own[:, : 2 * H])
            for k in range(4):  # the same pieces
                assert torch.equal(good.codes[k].sort().values, bad.codes[k].sort().values)
            continue
        assert good.first == bad.first == H + min(20, H // 2)
        for side in (good, bad):
            assert torch.equal(side.codes[:, H:], own[:, H : 2 * H])
        assert torch.equal(good.semantic[H:], bad.semantic[H:])
        if pair.kind == "beginning":
            assert torch.equal(good.codes[:, :H], own[:, :H])
            other = bad.codes[:, :H].numpy().astype(np.uint16).tobytes()
            assert voice_of[other] == clip.speaker  # what differs is not the voice
        else:
            voices = [
                voice_of[s.codes[:, :H].numpy().astype(np.uint16).tobytes()] for s in (good, bad)
            ]
            assert voices[0] == clip.speaker != voices[1]
            assert not torch.equal(good.codes[:, :H], own[:, :H])


@pytest.mark.parametrize("name", ["world", "collapsed"])
@pytest.mark.parametrize("stage_name", STAGES)
def test_the_sums_are_those_of_each_sample_alone(name, stage_name, request):
    """And what is left out before `first` is the difference to the whole; for two samples that
    share their second half the same number of tokens is scored."""
    root = request.getfixturevalue(name)
    stage, state = load_stage(root / stage_name)
    collapse, maker = (
        state["collapse_semantic"],
        PairMaker(TokenFolder(root / "tokens"), "train", 1.0, 0),
    )
    pairs = [pair for pair in maker.pairs(3) if pair.kind == "beginning"]
    samples = [side for pair in pairs for side in (*pair.good, *pair.bad)]
    together = nats_of(stage, samples, collapse, 4)
    alone = np.concatenate([nats_of(stage, [sample], collapse, 1) for sample in samples])
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    assert (together[::2, 1] == together[1::2, 1]).all()
    whole = nats_of(stage, [Sample(s.semantic, s.codes) for s in samples], collapse, 4)
    assert (whole > together).all()
    no, yes = torch.zeros(1).bool(), torch.ones(1).bool()
    for sample, (nats, num) in zip(samples, whole, strict=True):
        batch = stage.spec.sequences(sample.semantic[None], sample.codes[None], yes, no, collapse)
        assert nats == pytest.approx(float(stage(batch).sum().detach()), rel=1e-5)
        assert num == sum(len(t) for t in batch.targets)


@pytest.mark.parametrize(
    ("first_half", "scored"),
    # what follows is 7 7 8 8 9 9: of 7 8 9 the first is not scored, for it may go on over the seam
    [([1, 1, 2, 2, 3, 3], [8, 9]), ([1, 1, 2, 2, 7, 7], [8, 9])],
)
def test_without_repeats_the_token_at_the_seam_is_left_out(first_half, scored):
    semantic = torch.tensor([*first_half, 7, 7, 8, 8, 9, 9])
    sample = Sample(semantic, torch.zeros(4, 12), first=6)
    stage = SimpleNamespace(spec=SimpleNamespace(name="semantic"))
    once = torch.unique_consecutive(semantic)
    assert once[scored_from(stage, sample, True) :].tolist() == scored
    assert semantic[scored_from(stage, sample, False) :].tolist() == [7, 7, 8, 8, 9, 9]


def test_who_wins(monkeypatch):
    """0.5 for a tie; the pairs of an item count as one; windows are added before the mean."""
    one = Sample(torch.zeros(2), torch.zeros(1, 2))
    pairs = [
        Pair("a", "x", [one], [one]),
        Pair("a", "x", [one], [one]),
        Pair("a", "y", [one], [one]),
        Pair("b", "z", [one, one], [one]),
    ]
    sums = [(1, 1), (2, 1), (2, 1), (2, 1), (3, 1), (1, 1), (1, 1), (9, 9), (2, 2), (11, 10)]
    monkeypatch.setattr("scripts.pairs.nats_of", lambda *_: np.array(sums, dtype=float)[:9])
    rows = judge(None, pairs, False, 1)
    assert rows["a"]["right"] == (0.75 + 0) / 2
    assert (rows["a"]["num_items"], rows["a"]["num_pairs"]) == (2, 3)
    assert rows["b"]["right"] == 0.5  # 10 / 10 and 2 / 2


def test_an_interval_of_a_proportion():
    assert proportion_interval(5, 10) == pytest.approx([0.2366, 0.7634], abs=1e-4)
    low, high = proportion_interval(8, 8)
    assert low == pytest.approx(0.6756, abs=1e-4)
    assert high == pytest.approx(1)


@pytest.mark.parametrize("stage", STAGES)
def test_pairs_of_a_runs_own_tokens(stage, world, tmp_path, capsys):
    words = (world / stage, "--split", "train", "--seed", 3)
    found = evaluated(tmp_path, *words)
    assert found["rows"].keys() == {"order", "beginning"}
    assert all(0 <= row["right"] <= 1 for row in found["rows"].values())
    assert "they take two speakers" in capsys.readouterr().out
    assert evaluated(tmp_path, *words)["rows"] == found["rows"]
    assert evaluated(tmp_path, *words, "--limit", 1)["rows"]["order"]["num_items"] == 1


def test_a_model_that_has_learnt_an_order_prefers_it(world, monkeypatch):
    """Nats are few where a token follows the one before by one step."""

    def knowing(stage, samples, collapse, batch):
        steps = [(s.semantic.diff() % 7 != 1).sum().item() for s in samples]
        return np.array([(n, len(s.semantic)) for n, s in zip(steps, samples, strict=True)], float)

    monkeypatch.setattr("scripts.pairs.nats_of", knowing)
    maker = PairMaker(TokenFolder(world / "tokens"), "train", 1.0, 0)
    maker.folder.read = lambda clip: (np.arange(90) % 7, np.zeros((4, 90)))
    pairs = [pair for pair in maker.pairs(None) if pair.kind == "order"]
    assert judge(None, pairs, False, 1)["order"]["right"] == 1


@pytest.fixture
def sounds(tmp_path):
    folder = tmp_path / "sounds"
    for n, name in enumerate(("a_correct", "a_incorrect", "b_correct", "b_incorrect")):
        save_wav(folder / f"{name}.wav", 1.3 + n / 10)
    return folder


def test_three_kinds_of_lists(sounds, world, tmp_path):
    lines = sounds / "mine.jsonl"
    lines.write_text('{"good": "a_correct.wav", "bad": "a_incorrect.wav", "kind": "k"}\n')
    rows = ["id,filename,voice,type,correct"]
    rows += ["1,a_correct,x,agreement,1", "1,a_incorrect,x,agreement,0"]
    rows += ["1,b_correct,y,agreement,1", "1,b_incorrect.wav,y,agreement,0", "2,b_correct,x,t,1"]
    (sounds / "gold.csv").write_text("\n".join(rows) + "\n")
    listed = read_pairs(sounds / "gold.csv")
    assert [(kind, item) for kind, item, *_ in listed] == [("agreement", "1")] * 2
    for source, kind, num in ((lines, "k", 1), (sounds / "gold.csv", "agreement", 1)):
        found = evaluated(tmp_path, world / "semantic", source)
        assert found["rows"][kind]["num_items"] == num
    found = evaluated(tmp_path, world / "semantic", sounds)
    assert found["rows"]["sounds"]["num_items"] == 2


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("x.jsonl", '{"good": "a.wav"}', "line 1: expected"),
        ("x.jsonl", '{"good": "a_correct.wav", "bad": "no.wav"}', "names .*no.wav"),
        ("x.jsonl", "\n", "holds no pair"),
        ("x.csv", "id,filename\n1,a\n", "line 2: no id, filename or correct"),
        ("x.csv", "id,filename,correct\n1,a,yes\n", "correct is 'yes'"),
        ("nowhere.csv", None, "no such file"),
    ],
)
def test_bad_lists(name, text, words, sounds):
    if text is not None:
        (sounds / name).write_text(text)
    with pytest.raises(ValueError, match=words):
        read_pairs(sounds / name)


def test_a_recording_is_no_list(sounds):
    with pytest.raises(ValueError, match=r"a_correct\.wav: not text; expected lines"):
        read_pairs(sounds / "a_correct.wav")


def test_mistakes_are_named(sounds, world, tmp_path):
    with pytest.raises(ValueError, match="holds a coarse stage; pairs of recordings are for"):
        evaluated(tmp_path, world / "coarse", sounds)
    with pytest.raises(ValueError, match="--limit 0: at least 1"):
        evaluated(tmp_path, world / "coarse", "--limit", 0)
    other = make_tokenizer(tmp_path / "other")
    with pytest.raises(ValueError, match="is not the tokenizer of"):
        evaluated(tmp_path, world / "semantic", sounds, "--semantic-tokenizer", other)
    short = shutil.copytree(world / "tokens", tmp_path / "tokens")
    with pytest.raises(ValueError, match="too few clips"):
        PairMaker(TokenFolder(short), "train", 0.04, 0)


def make_tokenizer(folder):
    from model.semantic import MfccConfig, MfccKMeans

    tokenizer = MfccKMeans(MfccConfig(hop_length=RATE // 50))
    F = tokenizer.num_features
    tokenizer.set_codebook(torch.zeros(F), torch.ones(F), torch.randn(12, F))
    tokenizer.save(folder)
    return folder
