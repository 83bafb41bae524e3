"""One of several CPU processes that train with sharded weights (FSDP2).

    torchrun --nproc-per-node=2 tests/sharded_run.py CONFIG [--resume] [--only-ddp] [--stop=5]

Accelerate shards on GPUs alone, so this tells it that it has some. Writes beside CONFIG what each
rank holds at the end: rank-0.safetensors, the whole weights as this rank sees them. --stop=N: each
process gets SIGTERM in the step that makes N.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from safetensors.torch import save_file

os.environ |= {
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "Block",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}

import train
from configs.load import load_config
from configs.schema import RunConfig
from model.sharding import is_sharded, whole_tensors

config, sharded = sys.argv[1], "--only-ddp" not in sys.argv
stop = next((int(word[7:]) for word in sys.argv if word.startswith("--stop=")), None)
make_accelerator = train.make_accelerator
release, update = train.Training.release, train.Training.update


def accelerator(settings: RunConfig) -> train.Accelerator:
    process = make_accelerator(settings)
    if sharded:
        process.state.fsdp_plugin = train.shard_policy(settings.train.precision == "bf16")
        AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
        assert process.is_fsdp2
    return process


def released(run: train.Training) -> None:
    assert is_sharded(run.stage) == sharded
    weights = whole_tensors(dict(run.stage.named_parameters()))
    save_file(weights, Path(config).with_name(f"rank-{os.environ['RANK']}.safetensors"))
    local = sum(p.to_local().numel() if sharded else p.numel() for p in run.stage.parameters())
    total = sum(p.numel() for p in run.stage.parameters())
    assert local < 0.6 * total or not sharded, f"{local} of {total} numbers are here"
    release(run)


def stopping(run: train.Training, batches: list) -> torch.Tensor:
    if run.step + 1 == stop:
        signal.raise_signal(signal.SIGTERM)
    return update(run, batches)


train.make_accelerator, train.Training.release = accelerator, released
train.Training.update = stopping
torch.set_num_threads(1)
train.train(load_config(RunConfig, config, []), "--resume" in sys.argv)
