"""The state of a codec run in one safetensors file, so that a rename makes it whole or absent.

Keys: codec/..., average/..., discriminator/..., balancer/NAME, and per optimiser
optimizer/INDEX/NAME; the step is in the file's metadata. About 16 bytes a weight.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from configs.codec_schema import CodecTrainConfig
from configs.files import atomic_write
from configs.load import load_config

if TYPE_CHECKING:
    from scripts.train_codec import Trainer

MAY_CHANGE = ("optim", "train", "out")  # sections of the config that a resumed run may change
MODELS = ("codec", "average", "discriminator")
OPTIMIZERS = ("optimizer", "discriminator_optimizer")


def checkpoint_path(out: Path) -> Path:
    return out / "checkpoint" / "state.safetensors"


def save_checkpoint(out: Path, trainer: "Trainer") -> int:
    """Write the trainer's whole state atomically; returns the size in bytes."""
    tensors = {f"balancer/{name}": value for name, value in trainer.balancer.state.items()}
    for name in MODELS:
        state = getattr(trainer, name).state_dict()
        tensors |= {f"{name}/{key}": value for key, value in state.items()}
    for name in OPTIMIZERS:
        states = getattr(trainer, name).state_dict()["state"]
        for index, state in states.items():
            tensors |= {f"{name}/{index}/{key}": value for key, value in state.items()}
    tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    data = safetensors.torch.save(tensors, metadata={"step": str(trainer.step)})
    with atomic_write(checkpoint_path(out), "wb") as file:
        file.write(data)
    return len(data)


def load_checkpoint(out: Path, trainer: "Trainer") -> int:
    """Put a saved state into the trainer; returns its step. ValueError: damaged or of another."""
    path = checkpoint_path(out)
    try:
        with safe_open(path, framework="pt") as file:
            step = int(file.metadata()["step"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        for name in MODELS:
            getattr(trainer, name).load_state_dict(_under(tensors, f"{name}/"))
        for name in OPTIMIZERS:
            _load_optimizer(getattr(trainer, name), _under(tensors, f"{name}/"))
    except (SafetensorError, KeyError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: damaged or of another model ({reason})") from None
    balancer = _under(tensors, "balancer/")
    trainer.balancer.state = {k: v.to(trainer.device) for k, v in balancer.items()}
    return step


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split("/")
        state.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def check_same_run(out: Path, config: CodecTrainConfig) -> None:
    """ValueError unless `out` holds a checkpoint of a run with this model, data and losses."""
    if not checkpoint_path(out).is_file():
        raise ValueError(f"{out}: no checkpoint to resume; start without --resume")
    saved = asdict(load_config(CodecTrainConfig, out / "config.yaml"))
    for section, value in asdict(config).items():
        if section in MAY_CHANGE or section not in saved:
            continue
        for key in value:
            if key not in ("num_workers", "audio") and value[key] != saved[section][key]:
                raise ValueError(
                    f"--resume: {section}.{key} is {value[key]}, but {out / 'config.yaml'} has "
                    f"{saved[section][key]}; drop the change or start a new run"
                )
    for key in ("seed", "batch_size"):
        if getattr(config.train, key) != saved["train"][key]:
            raise ValueError(
                f"--resume: train.{key} is {getattr(config.train, key)}, but the run has "
                f"{saved['train'][key]}; drop the change or start a new run"
            )


def trim_log(log: Path, step: int) -> None:
    """Drop log lines past `step`: the steps between the checkpoint and a crash come again."""
    if not log.is_file():
        return
    lines = log.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    with atomic_write(log) as file:
        file.writelines(f"{line}\n" for line in kept)
