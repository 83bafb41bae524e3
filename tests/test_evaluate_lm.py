"""What `evaluate lm` counts: the loss that the run logged, and what can be worked out by hand."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from runs import log_lines
from world import make_world

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
    """Frames 0, 1, 2, ... of each window, in head 0 one more for EOS. Under `delay` a window that
    is not the last of its clip lacks the last frames of later codebooks."""
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
            expected = num_frames + (ends and k == 0) - missing
            assert sorted(found.frame.tolist()) == list(range(expected))


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
    rows = by_position([first, second], [50.0, 10.0])
    expected = [(0, 0.1, 3.0, 3), (0.5, 1, 3.0, 1), (2, 4, 5.0, 1)]
    expected[0] = (0, 0.1, (1 + 2 + 7) / 3, 3)
    assert [tuple(row.values()) for row in rows] == [pytest.approx(row) for row in expected]


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


LEVELS = {"uniform": 100.0, "unigram": 80.0, "bigram": 60.0}
FLAT = [{"from": s, "to": 2 * s, "nats": 2.0} for s in (0.25, 0.5, 1, 2)]
FALLING = [{**row, "nats": row["nats"] - row["from"] / 4} for row in FLAT]


@pytest.mark.parametrize(
    ("bits", "positions", "curve", "words"),
    [
        (102, FLAT, [], "broken"),
        (79.5, FALLING, [], "how often tokens come and no more"),
        (70, FALLING, [], "pairs of tokens still knows"),
        (45, FALLING, [], "works: 25% fewer"),
        (45, FALLING, [], "context helps (1.88 nats after 0.5 s of it, 1.50 after 2)"),
        (45, FLAT, [], "more context than 0.5 s does not help"),
        (45, FLAT, [(1, 3.0), (2, 2.0), (3, 2.5)], "best at step 2 of 3"),
        (45, FLAT, [(1, 3.0), (2, 2.0)], "still falling at step 2"),
        (45, FLAT, [(1, 2.005), (2, 2.0)], "settled by step 2"),
    ],
)
def test_a_sentence_says_what_the_numbers_do(bits, positions, curve, words):
    assert words in verdict(bits, LEVELS, positions, curve)


def test_what_is_printed(world, capsys):
    evaluate.main(["lm", str(world / "coarse")])
    said = capsys.readouterr().out
    assert all(word in said for word in ("uniform", "bigram", "this model", "seconds of context"))
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
