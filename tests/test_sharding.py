"""Weights sharded over processes (FSDP2): the same run, the same files, as with whole ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from runs import config, log_lines, losses, train_until, weights
from safetensors.torch import load_file

from configs.load import load_config, save_config
from configs.schema import RunConfig
from data.dataset import ValidBatches
from data.shards import TokenFolder
from train import make_accelerator, shard_policy, train

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parent.parent
# clips of a batch come alone, and are an odd number in validation: ranks differ in their number
CHANGES = ("train.batch_size=2", "data.crop_seconds=0.24", "train.save_every=3")


def launch(settings, *options):
    """Two processes of tests/sharded_run.py; what each holds at the end, and the exit code."""
    folder = Path(settings.out).parent
    save_config(settings, folder / "config.yaml")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, *command, "tests/sharded_run.py", str(folder / "config.yaml"), *options],
        cwd=ROOT,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    stops = any(option.startswith("--stop") for option in options)
    assert (done.returncode == 0) != stops, done.stderr
    return [load_file(folder / f"rank-{rank}.safetensors") for rank in range(2)]


def assert_alike(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=2e-5, rtol=1e-3)


@pytest.fixture(scope="module", params=["adamw", "muon"])
def changes(request):
    muon = ("model={dim: 32, num_layers: 2, num_heads: 2, head_dim: 16}", "optim.muon_lr=0.02")
    return CHANGES + muon * (request.param == "muon")


@pytest.fixture(scope="module")
def whole(changes, tokens, tmp_path_factory):
    """The run of one process."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(config(tokens, folder, *changes))
    return folder


@pytest.mark.parametrize("strategy", ["sharded", "--only-ddp"])
def test_two_processes_are_identical_and_equal_one(strategy, changes, whole, tokens, tmp_path):
    options = () if strategy == "sharded" else (strategy,)
    valid = ValidBatches(TokenFolder(tokens), crop_seconds=0.24, batch_size=1, rank=1, world=2)
    assert valid.num_short == 1
    first, second = launch(config(tokens, tmp_path / "run", *changes), *options)
    saved = weights(tmp_path / "run")
    assert first.keys() == second.keys() == saved.keys()
    for name, tensor in saved.items():
        assert torch.equal(tensor, first[name])
        assert torch.equal(tensor, second[name])
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), abs=1e-4)
    for stem in ("model", "ema", "optimizer"):
        assert_alike(weights(tmp_path / "run", stem), weights(whole, stem))
    assert [line["step"] for line in log_lines(tmp_path / "run", "valid")] == [6, 12]


def test_a_run_changes_its_strategy_and_processes_at_a_resume(changes, whole, tokens, tmp_path):
    """One process, then two with shards, then one again."""
    settings = config(tokens, tmp_path / "run", *changes)
    train_until(4, settings)
    launch(settings, "--resume", "--stop=8")
    train(settings, resume=True)
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), abs=1e-4)
    for stem in ("model", "ema", "optimizer"):
        assert_alike(weights(tmp_path / "run", stem), weights(whole, stem))


def test_shards_learn_in_bf16_what_whole_weights_do(tokens, tmp_path):
    bf16 = (*CHANGES, "train.precision=bf16", "train.num_micro_batches=1")
    runs = {}
    for options in ((), ("--only-ddp",)):
        folder = tmp_path / f"{len(options)}"
        folder.mkdir()
        launch(config(tokens, folder / "run", *bf16), *options)
        runs[options] = losses(folder / "run")
    sharded, whole = runs.values()
    assert sharded == pytest.approx(whole, rel=0.02)
    assert sharded["valid", 12] < 0.8 * sharded["train", 2]


def test_samples_are_written_by_sharded_runs(tokens, tmp_path):
    changes = ("train.steps=2", "train.sample_every=2", "optim.ema_decay=0")
    settings = config(tokens, tmp_path / "sharded", *changes, stage="semantic")
    launch(settings)
    train(config(tokens, tmp_path / "whole", *changes, stage="semantic"))
    ours, theirs = (
        {path.name: path.read_text() for path in tmp_path.glob(f"{name}/samples/*/*.json")}
        for name in ("sharded", "whole")
    )
    assert len(ours) == 4
    assert ours == theirs


def test_shards_compute_what_whole_weights_would(monkeypatch):
    """Sums over processes, positions and losses never in bf16."""
    monkeypatch.setenv("FSDP_VERSION", "2")
    policy = shard_policy(bf16=True).mixed_precision_policy
    assert policy.param_dtype == torch.bfloat16
    assert policy.reduce_dtype == torch.float32
    assert not policy.cast_forward_inputs
    monkeypatch.setenv("FSDP_VERSION", "1")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"FSDP 1 is not supported; .* fsdp_version: 2"):
        make_accelerator(load_config(RunConfig, None, ["out=x", "stage=fine", "data.tokens=x"]))


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_accelerates_files_are_files_of_accelerate(name):
    path = ROOT / "configs" / "accelerate" / f"{name}.yaml"
    found = load_config_from_file(str(path))
    assert found.mixed_precision == "no"
    assert f"--config_file configs/accelerate/{name}.yaml" in path.read_text()
    if name == "fsdp2":
        assert found.fsdp_config["fsdp_version"] == 2
        assert found.fsdp_config["fsdp_transformer_layer_cls_to_wrap"] == "Block"
