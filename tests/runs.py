"""Small training runs and what they leave behind, for tests of train.py."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from configs.load import load_config
from configs.schema import RunConfig
from model.checkpoint import find_checkpoint, read_tensors
from train import Training, train


def config(tokens, out, *overrides, stage="coarse"):
    return load_config(
        RunConfig,
        None,
        [
            f"stage={stage}",
            f"out={out}",
            f"data.tokens={tokens}",
            "data.crop_seconds=0.4",
            "num_coarse=2",
            "model={dim: 32, num_layers: 2, num_heads: 4, head_dim: 8}",
            "optim={lr: 0.01, warmup_steps: 3, ema_decay: 0.9}",
            "train={steps: 12, batch_size: 8, log_every: 2, valid_every: 6, save_every: 4}",
            *overrides,
        ],
    )


def log_lines(out, *kinds):
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] in kinds]


def losses(out):
    """{(kind, step): loss}, the last value of each."""
    return {(x["kind"], x["step"]): x["loss"] for x in log_lines(out, "train", "valid")}


def weights(out, stem="model"):
    return read_tensors(find_checkpoint(out), stem)


def train_until(step, settings, resume=False):
    """Train, and get SIGTERM as the update that makes `step` begins."""
    update = Training.update

    def signalled(run, batches):
        if run.step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(run, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "update", signalled)
        with pytest.raises(SystemExit) as stopped:
            train(settings, resume)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert find_checkpoint(settings.out).name == f"step-{step:08d}"


def assert_same_run(a, b, stems=("model", "ema", "optimizer")):
    assert losses(a) == losses(b)
    for stem in stems:
        ours, theirs = weights(a, stem), weights(b, stem)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), stem
