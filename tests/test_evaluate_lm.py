"""What `evaluate lm` counts: the loss that the run logged, and what can be worked out by hand."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from runs import log_lines
from world import make_world

from data.baselines import Baseline
from data.shards import TokenFolder
from model.checkpoint import load_stage
from scripts import evaluate
from scripts.lm_metrics import (
    Scores,
    by_position,
    calibration,
    counted,
    joined,
    model_figures,
    score_split,
    verdict,
)

STAGES = ("semantic", "coarse", "fine", "acoustic")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def delayed(tmp_path_factory):
    root = tmp_path_factory.mktemp("delayed")
    return make_world(root, "pattern=delay", "data.collapse_semantic=true")


def evaluated(run, tmp_path, *words):
    out = tmp_path / "lm.json"
    evaluate.main(["lm", str(run), "--out", str(out), *map(str, words)])
    return json.loads(out.read_text())


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_loss_is_the_one_that_the_run_logged(stage, batch_size, world, tmp_path):
    found = evaluated(world / stage, tmp_path, "--batch-size", batch_size)
    *_, logged = log_lines(world / stage, "valid")
    assert found["step"] == logged["step"]
    assert found["model"]["loss"] == pytest.approx(logged["loss"], rel=1e-5)
    assert found["model"]["nats"] == pytest.approx(logged["per_codebook"], rel=1e-5)
    assert found["model"]["bits_per_second"] == pytest.approx(logged["bits_per_second"], rel=1e-5)
    (start,) = log_lines(world / stage, "start")
    for level in ("uniform", "unigram"):
        assert found["levels"][level] == start[level]
    assert len(found["levels"]["bigram"]["nats"]) == len(found["codebooks"])


@pytest.mark.parametrize("stage", STAGES)
def test_so_it_is_with_delays_and_without_repeats(stage, delayed, tmp_path):
    found = evaluated(delayed / stage, tmp_path)
    *_, logged = log_lines(delayed / stage, "valid")
    assert found["model"]["loss"] == pytest.approx(logged["loss"], rel=1e-5)


@pytest.mark.parametrize("name", ["world", "delayed"])
def test_every_frame_is_scored_once_where_it_is(name, request):
    """Frames 0, 1, 2, ... of each window, in head 0 also EOS, as -1. Under `delay` a window that is
    not the last of its clip lacks the last frames of later codebooks."""
    root = request.getfixturevalue(name)
    stage, state = load_stage(root / "coarse")
    folder = TokenFolder(root / "tokens")
    parts = list(score_split(stage, folder, "train", 1.0, state["collapse_semantic"], 1))
    windows = [
        (min(50, clip.num_frames - start), start + 50 >= clip.num_frames)
        for clip in folder.clips("train")
        for start in range(0, clip.num_frames, 50)
    ]
    assert len({ends for _, ends in windows}) == 2
    for heads, (num_frames, ends) in zip(parts, windows, strict=True):
        for k, found in enumerate(heads):
            missing = k if name == "delayed" and not ends else 0
            expected = [-1] * (ends and k == 0) + list(range(num_frames - missing))
            assert sorted(found.frame.tolist()) == expected


def scores(nats, chance=None, hit=None, frame=None, clip=None):
    zeros = np.zeros(len(nats))
    columns = (nats, chance, hit, frame, clip)
    made = [zeros if column is None else np.array(column) for column in columns]
    return Scores(made[0], made[1], made[2].astype(bool), made[3], made[4].astype(int))


def test_figures_by_hand():
    first = scores([1.0, 3.0, 2.0], hit=[1, 0, 0], clip=[0, 0, 1])
    second = scores([4.0, 4.0], hit=[1, 1], clip=[0, 1])
    found = model_figures([first, second], [50.0, 25.0])
    assert found["nats"] == [2.0, 4.0]
    assert found["loss"] == 14 / 5
    assert found["bits_per_second"] == pytest.approx((2 * 50 + 4 * 25) / math.log(2))
    assert found["first_guess"] == [pytest.approx(1 / 3), 1.0]
    low, high = found["loss_interval"]
    assert 8 / 3 - 1e-9 <= low <= 14 / 5 <= high <= 3 + 1e-9  # clip 0 has 8 / 3, clip 1 has 3


def test_positions_by_hand():
    """Of 50 and 10 tokens a second: frame 30 is at 0.6 s of one and at 3 s of the other."""
    first = scores([1.0, 2.0, 3.0], frame=[0, 4, 30])
    second = scores([7.0, 5.0], frame=[0, 30])
    second.nats, second.frame = np.append(second.nats, 99), np.append(second.frame, -1)  # EOS
    rows = by_position([first, second], [50.0, 10.0], 4.0)
    expected = [(0, 0.1, (1 + 2 + 7) / 3, 3), (0.5, 1, 3.0, 1), (2, 4, 5.0, 1)]
    assert [tuple(row.values()) for row in rows] == [pytest.approx(row) for row in expected]
    last = by_position([first, second], [50.0, 10.0], 2.0)[-1]  # nothing is beyond the window
    assert (last["from"], last["to"], last["nats"]) == (1, 2, 5.0)


def test_calibration_by_hand():
    chance, hit = [0.05, 0.92, 0.94, 1.0], [1, 1, 0, 1]
    found = calibration([scores([0.0] * 4, chance=chance, hit=hit)])
    assert [b["num_tokens"] for b in found["bins"]] == [1, 3]
    assert found["bins"][1]["chance"] == pytest.approx(2.86 / 3)
    assert found["bins"][1]["right"] == pytest.approx(2 / 3)
    assert found["error"] == pytest.approx((0.95 + 0.86) / 4)
    assert found["over"] == pytest.approx((2.91 - 3) / 4)


def test_a_bigram_knows_a_cycle(tmp_path):
    class Folder:
        semantic, codec = {"num_tokens": 4, "frame_rate": 50}, {"frame_rate": 50}

        def clips(self, split):
            return ["a", "b"]

        def read(self, clip):
            return np.arange(4000) % 4, np.zeros((0, 0))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scripts.lm_metrics.baselines", lambda *_: {})
        found = counted(Folder(), "valid", ["semantic"], [50.0], False)
    assert found["bigram"].nats[0] < 0.02
    assert found["bigram"].bits_per_second < 0.02 * 50 / math.log(2)


LEVELS = {  # bits per second at one token a second of each of two codebooks
    "uniform": Baseline([4.0, 4.0], 8 / math.log(2)),
    "unigram": Baseline([4.0, 3.0], 7 / math.log(2)),
    "bigram": Baseline([2.0, 5.0], 7 / math.log(2)),  # counting is worth 2 + 3 nats
}


@pytest.mark.parametrize(
    ("nats", "curve", "words"),
    [
        (8.2, [], "broken"),
        (
            6.98,
            [(1, 3.0), (2, 2.0)],
            "how often tokens come and no more: train on, or look at optim.lr",
        ),
        (6, [], "counting tokens and pairs of them still tells as much: train on"),
        (4, [], "it works: 20% fewer bits than counting tokens and pairs takes"),
        (4, [(1, 3.0), (2, 2.0), (3, 2.5)], "best at step 2 of 3: stop earlier"),
        (4, [(60, 2.2), (70, 2.0), (80, 2.0), (100, 1.8)], "still took 10% off the loss: more"),
        (4, [(60, 2.2), (74, 1.81), (80, 1.8), (100, 1.8)], "took less than 1% off the loss"),
    ],
)
def test_a_sentence_says_what_the_numbers_do(nats, curve, words):
    said = verdict(nats / math.log(2), LEVELS, [1.0, 1.0], curve)
    assert words in said
    assert curve or ";" not in said


def test_the_split_that_is_asked_for_is_measured(collapsing, tmp_path):
    """Its clips, its counts, and, without repeats, its rate."""
    run = collapsing / "semantic"
    folder = TokenFolder(collapsing / "tokens")
    for name, clip in zip(("test", "valid"), folder.all_clips, strict=False):
        object.__setattr__(clip, "split", name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scripts.evaluate_lm.TokenFolder", lambda _: folder)
        found = {name: evaluated(run, tmp_path, "--split", name) for name in ("test", "valid")}
    for name, report in found.items():
        semantic = [folder.read(clip)[0] for clip in folder.clips(name)]
        kept = sum(1 + (np.diff(tokens.astype(int)) != 0).sum() for tokens in semantic)
        seconds = sum(map(len, semantic)) / folder.semantic["frame_rate"]
        assert report["tokens_per_second"] == [pytest.approx(kept / seconds)]
        assert report["num_clips"] == len(semantic)
    unigrams = [report["levels"]["unigram"]["nats"] for report in found.values()]
    assert unigrams[0] != unigrams[1]


@pytest.fixture(scope="module")
def collapsing(tmp_path_factory):
    root = tmp_path_factory.mktemp("collapsing")
    return make_world(root, "data.collapse_semantic=true", semantic_hop=160)


def test_a_log_that_was_cut_short_and_a_folder_as_file(world, tmp_path):
    moved = shutil.copytree(world / "coarse", tmp_path / "moved")
    with open(moved / "log.jsonl", "a") as log:
        log.write('{"kind": "valid", "st')
    assert evaluated(moved, tmp_path)["verdict"]
    with pytest.raises(ValueError, match=r"--out .*: a folder; name a file in it"):
        evaluate.main(["lm", str(moved), "--out", str(tmp_path)])


def test_what_is_printed(world, capsys):
    evaluate.main(["lm", str(world / "coarse")])
    said = capsys.readouterr().out
    assert all(
        word in said for word in ("uniform", "bigram", "this model", "seconds of the window")
    )
    assert "chances are off by" in said


def test_mistakes_are_named(world, tmp_path):
    with pytest.raises(ValueError, match="--batch-size 0: at least 1"):
        evaluate.main(["lm", str(world / "coarse"), "--batch-size", "0"])
    with pytest.raises(ValueError, match="no such run folder"):
        evaluate.main(["lm", str(tmp_path / "nowhere")])
    moved = shutil.copytree(world / "coarse", tmp_path / "moved")
    (moved / "config.yaml").unlink()
    with pytest.raises(ValueError, match="--tokens must say"):
        evaluate.main(["lm", str(moved)])
    other = shutil.copytree(world / "tokens", tmp_path / "tokens")
    header = json.loads((other / "header.json").read_text())
    header["codec"]["fingerprint"] = "another"
    (other / "header.json").write_text(json.dumps(header))
    with pytest.raises(ValueError, match=r"tokens of the codec tokenizer .* \(another\)"):
        evaluate.main(["lm", str(moved), "--tokens", str(other)])


def test_batches_are_joined_head_by_head():
    parts = [[scores([1.0]), scores([2.0])], [scores([3.0]), scores([4.0])]]
    assert [head.nats.tolist() for head in joined(parts)] == [[1.0, 3.0], [2.0, 4.0]]


def test_encodecs_own_model_is_a_level(world, tmp_path, monkeypatch):
    """Of codes that are said to be encodec's; its weights are drawn at random."""
    from encodec.model import LMModel

    torch.manual_seed(0)
    lm = LMModel(32, 1024, dim=200, num_layers=5, past_context=262)
    torch.save(lm.state_dict(), tmp_path / "lm.th")
    words = ("--encodec-lm", tmp_path / "lm.th")
    with pytest.raises(ValueError, match=r"it models codes of encodec_24khz, and .* tokens of"):
        evaluated(world / "coarse", tmp_path, *words)
    read = TokenFolder.__init__

    def renamed(folder, path):
        read(folder, path)
        folder.codec = {**folder.codec, "name": "encodec_24khz:file"}
        shapes = {clip.name: (4, clip.num_frames) for clip in folder.all_clips}
        draw = np.random.default_rng(0).integers
        drawn = {name: draw(16, size=shape) for name, shape in shapes.items()}
        stored = folder.read
        folder.read = lambda clip: (stored(clip)[0], drawn[clip.name])

    monkeypatch.setattr(TokenFolder, "__init__", renamed)
    nats = evaluated(world / "fine", tmp_path, *words)["levels"]["encodec's LM"]["nats"]
    folder, sums, num = TokenFolder(world / "tokens"), torch.zeros(4, dtype=torch.double), 0
    lm.eval()
    for clip in folder.clips("valid"):  # frame by frame
        codes = torch.from_numpy(folder.read(clip)[1].astype("int64"))  # [K,T]
        for window in codes.split(50, dim=1):
            before = torch.zeros(4, 0, dtype=torch.long)
            for t in range(window.shape[1]):
                before = torch.cat(
                    [before, window[:, t - 1 : t] + 1 if t else before.new_zeros(4, 1)], 1
                )
                with torch.no_grad():
                    chances = lm(before[None])[0][0, :, :, -1]  # [1024,K]
                sums -= chances.double().gather(0, window[None, :, t])[0].log()
                num += 1
    assert nats == pytest.approx((sums / num)[2:].tolist(), rel=1e-4)
    torch.save({"a": torch.zeros(1)}, tmp_path / "lm.th")
    with pytest.raises(ValueError, match="not the weights of encodec_lm"):
        evaluated(world / "fine", tmp_path, *words)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_finds_the_same(world, tmp_path):
    ours = evaluated(world / "coarse", tmp_path, "--device", "cuda")
    theirs = evaluated(world / "coarse", tmp_path, "--device", "cpu")
    assert ours["model"]["loss"] == pytest.approx(theirs["model"]["loss"], rel=1e-2)
