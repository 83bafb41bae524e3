"""What goes wrong in long runs: kills, full disks, cut files, losses that explode, dying ranks."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kill_tries import tries
from runs import assert_same_run, config, log_lines, train_until, weights
from safetensors.torch import load_file

from configs.load import save_config
from model.checkpoint import damage, find_checkpoint, list_checkpoints, rotate_checkpoints
from model.guard import WARM_UP, Guard
from model.stages import Stage
from train import Training, train

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_time_equals_untouched(tmp_path):
    """tests/kill_tries.py has more of it."""
    ends = tries(tmp_path, count=3, seed=1)
    assert ends["end"] == 3
    assert ends.total() > 3


def test_a_checkpoint_cut_short_is_passed_over(tokens, tmp_path, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(config(tokens, whole))
    train_until(9, config(tokens, cut))
    newest = list_checkpoints(cut)[-1]
    file = newest / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    train(config(tokens, cut), resume=True)
    said = f"{newest}: damaged, optimizer.safetensors has "
    assert said in (err := capsys.readouterr().err)
    assert "going back to step-00000008" in err
    assert_same_run(whole, cut)
    assert all(damage(folder) is None for folder in list_checkpoints(cut))


def test_rotation_counts_whole_checkpoints_alone(tokens, tmp_path):
    out = tmp_path / "run"
    train(config(tokens, out, "train.steps=6", "train.save_every=1", "train.num_kept=6"))
    (list_checkpoints(out)[-1] / "model.safetensors").unlink()
    rotate_checkpoints(out, num_kept=2, best_step=None)
    assert [folder.name[-1] for folder in list_checkpoints(out)] == ["4", "5"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_full_disk_leaves_the_old_checkpoint(tokens, tmp_path):
    """A limit on the size of files stands in for it: the system call fails alike."""
    whole, full = tmp_path / "whole", tmp_path / "full"
    train(config(tokens, whole))
    train_until(5, config(tokens, full))
    before = sorted(folder.name for folder in (full / "checkpoints").iterdir())
    size = (find_checkpoint(full) / "optimizer.safetensors").stat().st_size
    child, message = os.fork(), tmp_path / "message"
    if child == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1000, size - 1000))
        try:
            train(config(tokens, full), resume=True)
        except OSError as error:
            message.write_text(str(error))
        os._exit(0)
    os.waitpid(child, 0)
    assert "step-00000006: not saved" in message.read_text()
    assert sorted(folder.name for folder in (full / "checkpoints").iterdir()) == before
    assert damage(find_checkpoint(full)) is None
    train(config(tokens, full), resume=True)
    assert_same_run(whole, full)


def test_a_guard_skips_what_is_not_finite_or_far_above_the_usual():
    guard = Guard(factor=4.0, device=torch.device("cpu"))
    norm = torch.tensor(2.0)
    assert guard.judge(torch.tensor(1e9), 0) == 0  # nothing is usual yet
    guard = Guard(factor=4.0, device=torch.device("cpu"))
    skips = [float(guard.judge(norm, step)) for step in range(WARM_UP)]
    assert skips == [0.0] * WARM_UP
    bad = (float("nan"), float("inf"), 8.1)
    assert [float(guard.judge(torch.tensor(x), WARM_UP + n)) for n, x in enumerate(bad)] == [
        1.0
    ] * 3
    facts = guard.read()
    assert facts["mean"] == 2.0
    assert (facts["num_skipped"], facts["in_a_row"], facts["row_began"]) == (3, 3, WARM_UP)
    again = Guard(factor=4.0, device=torch.device("cpu"))
    again.load(facts)
    assert again.judge(torch.tensor(7.9), 60) == 0
    assert again.read() == {**facts, "num_accepted": WARM_UP + 1, "in_a_row": 0} | {
        "mean": pytest.approx(2.0 + 0.02 * 5.9, abs=1e-3)
    }


def spoil(monkeypatch, first, last):
    """The loss of the steps first..last is not a number."""
    update, forward = Training.update, Stage.forward
    current = []

    def remembering(run, batches):
        current[:] = [run.step]
        return update(run, batches)

    def spoiled(stage, batch):
        bad = stage.training and first <= current[0] <= last
        return forward(stage, batch) * (float("nan") if bad else 1.0)

    monkeypatch.setattr(Training, "update", remembering)
    monkeypatch.setattr(Stage, "forward", spoiled)


def test_a_step_without_a_loss_is_skipped_and_counted(tokens, tmp_path, monkeypatch):
    spoil(monkeypatch, 6, 6)
    train(config(tokens, tmp_path / "whole", "train.save_every=1", "train.num_kept=12"))
    before, after = (
        {stem: weights(folder, stem) for stem in ("model", "optimizer")}
        for folder in list_checkpoints(tmp_path / "whole")[5:7]
    )
    for stem, tensors in before.items():
        assert all(torch.equal(t, after[stem][name]) for name, t in tensors.items())
    lines = log_lines(tmp_path / "whole", "train")
    assert [line["skipped"] for line in lines] == [0, 0, 0, 1, 1, 1]
    assert all(line["loss"] == line["loss"] for line in lines)
    for at in (7, 10):  # the count, and what is usual, outlive a resume
        train_until(at, config(tokens, tmp_path / "parts"), resume=True)
    train(config(tokens, tmp_path / "parts"), resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert log_lines(tmp_path / "parts", "train")[-1]["skipped"] == 1


def test_a_run_that_only_skips_stops_and_keeps_the_batch(tokens, tmp_path, monkeypatch):
    spoil(monkeypatch, 5, 99)
    out = tmp_path / "run"
    with pytest.raises(ValueError, match="3 steps in a row, from step 5 on") as stopped:
        train(config(tokens, out, "optim.max_skipped=3", "train.save_every=2"))
    listed = out / "bad_batch-step-00000005.json"
    assert str(listed) in str(stopped.value)
    clips = json.loads(listed.read_text())["clips"]
    batch = load_file(listed.with_suffix(".safetensors"))
    run = Training(config(tokens, tmp_path / "again"), train_accelerator(), resume=False)
    found = {clip.name: clip for clip in run.folder.clips("train")}
    for n, clip in enumerate(clips):
        a, b = clip["frames"]
        codes = run.folder.read(found[clip["clip"]])[1][:, a:b]
        assert batch["codes"][n, :, : b - a].tolist() == codes.tolist()
    assert len(clips) == 8
    assert all(torch.isfinite(t).all() for t in weights(out).values())


def train_accelerator():
    from accelerate import Accelerator

    return Accelerator(cpu=True)


def test_a_row_of_skipped_steps_counts_though_it_has_ended(tokens, tmp_path, monkeypatch):
    spoil(monkeypatch, 5, 8)
    changes = ("train.log_every=12", "train.save_every=2", "train.valid_every=12")
    with pytest.raises(ValueError, match="4 steps in a row, from step 5 on"):
        train(config(tokens, tmp_path / "run", "optim.max_skipped=4", *changes))
    train(config(tokens, tmp_path / "patient", "optim.max_skipped=5", *changes))


def test_a_step_that_is_skipped_has_no_loss(tokens, tmp_path, monkeypatch):
    spoil(monkeypatch, 6, 6)
    train(config(tokens, tmp_path / "run", "train.log_every=1"))
    lines = log_lines(tmp_path / "run", "train", "skipped")
    assert [(x["kind"], x["skipped"]) for x in lines if x["step"] in (6, 7, 8)] == [
        ("train", 0),
        ("skipped", 1),
        ("train", 1),
    ]
    assert all(line["loss"] > 0.5 for line in lines if line["kind"] == "train")


def test_lost_weights_are_not_saved(tokens, tmp_path, monkeypatch):
    update = Training.update

    def poisoned(run, batches):
        if run.step == 5:
            next(run.stage.parameters()).data.fill_(float("nan"))
        return update(run, batches)

    monkeypatch.setattr(Training, "update", poisoned)
    with pytest.raises(ValueError, match="weights are not finite at step 6"):
        train(config(tokens, tmp_path / "run", "train.log_every=12", "train.save_every=2"))
    assert find_checkpoint(tmp_path / "run").name == "step-00000004"
    assert all(torch.isfinite(t).all() for t in weights(tmp_path / "run").values())


def test_a_rank_that_raises_ends_all_with_its_message(tokens, tmp_path):
    save_config(config(tokens, tmp_path / "run"), tmp_path / "config.yaml")
    script = tmp_path / "run.py"
    script.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import train\n"
        "update = train.Training.update\n"
        "def failing(run, batches):\n"
        "    if run.step == 3 and os.environ['RANK'] == '1':\n"
        "        raise RuntimeError('this rank ran out of luck')\n"
        "    return update(run, batches)\n"
        "train.Training.update = failing\n"
        "train.main()\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, str(script), "--config", str(tmp_path / "config.yaml")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=100,  # gloo would wait half an hour
        check=False,
    )
    assert done.returncode != 0
    assert "this rank ran out of luck" in done.stderr
