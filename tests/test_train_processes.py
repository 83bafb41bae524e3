"""Signals and several processes: all stop together, what is saved goes on as if nothing was."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from runs import assert_same_run, config, losses

from configs.load import save_config
from model.checkpoint import damage, find_checkpoint, list_checkpoints, read_state
from train import Training, dropout_seed, train

ROOT = Path(__file__).resolve().parent.parent
TERM, INT = signal.SIGTERM, signal.SIGINT

pytestmark = pytest.mark.usefixtures("one_thread")


def test_no_two_updates_drop_the_same_places():
    seeds = [dropout_seed(s, step, rank) for s in (0, 1) for step in range(50) for rank in range(8)]
    assert len(set(seeds)) == len(seeds)
    assert seeds[0] == dropout_seed(0, 0, 0)
    masks = [torch.manual_seed(seed) and torch.rand(64) < 0.5 for seed in seeds]
    assert len({tuple(mask.tolist()) for mask in masks}) == len(seeds)


@contextlib.contextmanager
def processes(settings, folder, *stops):
    """Two processes of tests/signalled_run.py; gives what each recorded, then ends them: their
    group, which three runs share, was left open."""
    save_config(settings, folder / "config.yaml")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    records = [folder / f"record-{rank}.json" for rank in range(2)]
    running = []
    for rank, record in enumerate(records):
        command = [sys.executable, "tests/signalled_run.py", folder / "config.yaml", record, *stops]
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with open(record.with_suffix(".txt"), "w") as output:
            running.append(
                subprocess.Popen(
                    [str(word) for word in command],
                    cwd=ROOT,
                    env={**os.environ, **world, **own},
                    stdout=output,
                    stderr=output,
                )
            )
    try:
        deadline = time.monotonic() + 120
        while not all(record.is_file() for record in records):
            said = "\n".join(r.with_suffix(".txt").read_text()[-2000:] for r in records)
            assert time.monotonic() < deadline, f"two processes did not stop together\n{said}"
            assert all(p.poll() in (None, 0) for p in running), f"a process failed\n{said}"
            time.sleep(0.2)
        yield [json.loads(record.read_text()) for record in records]
    finally:
        for process in running:
            process.kill()
            process.wait()


def test_all_processes_stop_at_the_step_of_one(tokens, tmp_path):
    """SIGTERM to one of two: before the sums of an update, after them, during a validation. Three
    times both save together; then one process alone goes on, to the losses of an uninterrupted run.
    """
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    changes = ("train.save_every=100", "data.num_workers=1", "train.log_every=1")
    train(config(tokens, whole, *changes))
    stops = ("before:2", "middle:3", "valid:6")
    with processes(config(tokens, parts, *changes), tmp_path, *stops) as (first, second):
        assert first["saved"] == second["saved"] == [3, 5, 6, 7]  # 6: the best until then
        assert first["codes"] == second["codes"] == [128 + TERM] * 3
        for rank, record in enumerate((first, second)):
            seeds = {str(step): dropout_seed(0, step, rank) for step in range(7)}
            assert record["seeds"] == seeds
    assert find_checkpoint(parts).name == "step-00000007"
    train(config(tokens, parts, *changes), resume=True)
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-4)


def patched_update(monkeypatch, step, act):
    """Call `act(run)` as the update that makes `step` begins."""
    update = Training.update

    def acted(run, batches):
        if run.step + 1 == step:
            act(run)
        return update(run, batches)

    monkeypatch.setattr(Training, "update", acted)


@pytest.mark.parametrize(("first", "second"), [(TERM, TERM), (INT, INT), (TERM, INT)])
def test_a_second_signal_does_not_wait(first, second, tokens, tmp_path, monkeypatch):
    """In a process of its own, which has to die of it there and then."""

    def signals(run):
        signal.raise_signal(first)
        run.signalled_at -= 10  # seconds
        signal.raise_signal(second)
        os._exit(99)

    patched_update(monkeypatch, 2, signals)
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            train(config(tokens, tmp_path / "run"))
        os._exit(98)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -second
    assert not list_checkpoints(tmp_path / "run")


def test_a_signal_that_a_launcher_passes_on_counts_once(tokens, tmp_path, monkeypatch):
    """Where a scheduler signals every process, each gets it a second time from its launcher."""

    def signals(_):
        signal.raise_signal(TERM)
        signal.raise_signal(TERM)

    killed = []
    monkeypatch.setattr(os, "kill", lambda *arguments: killed.append(arguments))
    patched_update(monkeypatch, 3, signals)
    with pytest.raises(SystemExit) as stopped:
        train(config(tokens, tmp_path / "run"))
    assert not killed
    assert stopped.value.code == 128 + TERM
    assert find_checkpoint(tmp_path / "run").name == "step-00000003"


@pytest.mark.parametrize("where", ["learning_rate", "Training.validate"])
def test_a_signal_that_comes_too_late_changes_nothing(where, tokens, tmp_path, monkeypatch):
    """In the last update, when all know that they go on, or later: the run is finished."""
    train(config(tokens, tmp_path / "whole"))
    before, came = signal.getsignal(TERM), []
    name = where.rpartition(".")[2]
    owner = Training if name != where else sys.modules["train"]
    original = getattr(owner, name)

    def signalled(first, *others):
        if (first if name == where else first.step - 1) == 11:
            signal.raise_signal(TERM)
            came.append(name)
        return original(first, *others)

    monkeypatch.setattr(owner, name, signalled)
    run = train(config(tokens, tmp_path / "late"))
    assert came
    assert run.signalled == TERM
    assert_same_run(tmp_path / "whole", tmp_path / "late")
    assert signal.getsignal(TERM) == before


def test_a_stop_saves_before_it_validates(tokens, tmp_path, monkeypatch):
    """A launcher that loses its patience during a long validation loses no step."""

    def killed(*_):
        raise RuntimeError("killed")

    patched_update(monkeypatch, 6, lambda _: signal.raise_signal(TERM))
    monkeypatch.setattr(Training, "validate", killed)
    with pytest.raises(RuntimeError, match="killed"):
        train(config(tokens, tmp_path / "run", "train.save_every=100"))
    assert find_checkpoint(tmp_path / "run").name == "step-00000006"


def test_a_second_save_of_a_step_never_leaves_none(tokens, tmp_path, monkeypatch):
    """The step is there and whole: only its state is written anew, atomically."""
    run = train(config(tokens, tmp_path / "run", "train.num_kept=1"))
    folder = find_checkpoint(tmp_path / "run")
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: pytest.fail("something was deleted"))
    run.best_step = 4
    run.save()
    assert read_state(folder)["best_step"] == 4
    assert damage(folder) is None
    assert before == {p.name: p.stat().st_mtime_ns for p in folder.glob("*.safetensors")}


@pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel for the signal")
def test_the_end_of_accelerates_launcher_ends_and_saves_the_run(tokens, tmp_path):
    """With one process, the launcher dies of SIGTERM and passes nothing on."""
    out = tmp_path / "run"
    save_config(config(tokens, out, "train.steps=1000000"), tmp_path / "config.yaml")
    command = ["-m", "accelerate.commands.launch", "--cpu", "train.py", "--config"]
    launcher = subprocess.Popen(
        [sys.executable, *command, str(tmp_path / "config.yaml")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in launcher.stdout:
        if line.startswith("step"):
            break
    else:
        pytest.fail("the run did not start")
    launcher.terminate()
    rest = launcher.stdout.read()  # to the end of the last process that writes to it
    assert "stopped and saved at step" in rest
    step = int(find_checkpoint(out).name.removeprefix("step-"))
    assert f"stopped and saved at step {step};" in rest
    launcher.wait()
