"""Checkpoints: a folder of safetensors and one JSON, whole or absent.

    runs/a/config.yaml                              the resolved configuration
    runs/a/checkpoints/step-00001000/model.safetensors      weights
                                     ema.safetensors        averaged weights, used for sampling
                                     optimizer.safetensors  moments, one tensor per parameter
                                     state.json             everything else, and the files' sizes

A checkpoint is written beside its final name and renamed when it is complete on disk.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs.files import fsync_folder, write_json
from configs.schema import ModelConfig
from model.backends import resolve, sampling_dtype
from model.optim import EMA, load_optimizer_tensors, optimizer_tensors
from model.sharding import copy_into, is_sharded, whole_tensors
from model.stages import Stage, stage_spec

STATE = "state.json"


def checkpoint_folder(run: str | Path, step: int) -> Path:
    return Path(run) / "checkpoints" / f"step-{step:08d}"


def save_checkpoint(
    run: str | Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]
) -> Path:
    """Write `tensors` ({file stem: {name: tensor}}) and `state` as the checkpoint of `step`.

    A checkpoint of it that is there and whole only gets the new state: a run comes to a step with
    the same tensors each time, up to the rounding of another kernel or number of processes.
    """
    final = checkpoint_folder(run, step)
    if final.exists() and damage(final) is None:
        files = read_state(final)["files"]
        write_json(final / STATE, {**state, "step": step, "files": files})
        return final
    temporary = final.with_name(f".{final.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        sizes = {}
        for stem, named in tensors.items():
            path = temporary / f"{stem}.safetensors"
            save_file({name: t.detach().cpu().contiguous() for name, t in named.items()}, path)
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
            sizes[path.name] = path.stat().st_size
        write_json(temporary / STATE, {**state, "step": step, "files": sizes})
        shutil.rmtree(final, ignore_errors=True)  # damaged
        os.replace(temporary, final)
        fsync_folder(final.parent)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{final}: not saved ({error}); the checkpoints before it are whole: make room and "
            "continue with --resume"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def list_checkpoints(run: str | Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted((Path(run) / "checkpoints").glob("step-*"))


def rotate_checkpoints(run: str | Path, num_kept: int, best_step: int | None) -> None:
    """Delete all but the newest `num_kept` whole checkpoints and the best one."""
    best = None if best_step is None else checkpoint_folder(run, best_step)
    for folder in (Path(run) / "checkpoints").glob(".step-*.part"):  # left by a kill
        shutil.rmtree(folder)
    folders = list_checkpoints(run)
    kept = [folder for folder in folders if damage(folder) is None][-num_kept:]
    for folder in folders:
        if folder not in (*kept, best):
            shutil.rmtree(folder)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None: every file is there in its full size."""
    try:
        sizes = json.loads((folder / STATE).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{STATE} is missing or unreadable"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
    return None


def find_checkpoint(run: str | Path, prefer_best: bool = False, or_older: bool = False) -> Path:
    """The newest checkpoint of a run folder (or its best; or `run` itself if it is a checkpoint).

    or_older: where the newest is damaged, the newest whole one, with a word on stderr. ValueError:
    no run there, no checkpoint yet, or a damaged one, naming the last whole one.
    """
    run = Path(run)
    if (run / STATE).is_file() or run.parent.name == "checkpoints":
        found = run
    else:
        if not run.is_dir():
            raise ValueError(f"{run}: no such run folder")
        folders = list_checkpoints(run)
        if not folders:
            raise ValueError(f"{run}: holds no checkpoint (looked for checkpoints/step-*)")
        found = folders[-1]
        if prefer_best and damage(found) is None:
            best = read_state(found).get("best_step")
            if best is not None and checkpoint_folder(run, best).is_dir():
                found = checkpoint_folder(run, best)
    if problem := damage(found):
        whole = [f for f in list_checkpoints(found.parent.parent) if f != found and not damage(f)]
        if whole and or_older:
            print(f"{found}: damaged, {problem}; going back to {whole[-1].name}", file=sys.stderr)
            return whole[-1]
        remedy = f"the last whole one is {whole[-1]}" if whole else "no other checkpoint is whole"
        raise ValueError(f"{found}: damaged checkpoint, {problem}; remove it: {remedy}")
    return found


def read_state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / STATE).read_text(encoding="utf-8"))


def read_tensors(folder: Path, stem: str) -> dict[str, Tensor]:
    """The tensors of one file of a checkpoint. ValueError if it cannot be read."""
    path = folder / f"{stem}.safetensors"
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None


def training_tensors(
    stage: Stage, optimizer: torch.optim.Optimizer, ema: EMA | None
) -> dict[str, dict[str, Tensor]]:
    """Everything tensor-valued that a resumed run needs, as `save_checkpoint` takes it.

    Whole, however the processes share it: every process calls it, the first one gets it.
    """
    tensors = {"model": stage.state_dict(), "optimizer": optimizer_tensors(optimizer, stage)}
    if ema is not None:
        tensors["ema"] = ema.shadow
    if is_sharded(stage):
        main = dist.get_rank() == 0
        tensors = {stem: whole_tensors(named, keep=main) for stem, named in tensors.items()}
    return tensors


def load_training(
    folder: Path, stage: Stage, optimizer: torch.optim.Optimizer, ema: EMA | None
) -> dict[str, Any]:
    """The inverse of `training_tensors`, in place; returns the checkpoint's state."""
    state, saved = read_state(folder), read_tensors(folder, "model")
    shapes = [{k: t.shape for k, t in d.items()} for d in (saved, stage.state_dict())]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{folder}: its model is not the configured one; restore the run's config or choose "
            "another out="
        )
    copy_into(stage, saved)
    load_optimizer_tensors(optimizer, stage, read_tensors(folder, "optimizer"))
    if ema is not None and "ema.safetensors" in state["files"]:
        ema.load(read_tensors(folder, "ema"), state["step"])
    return state


def load_stage(
    run: str | Path,
    device: torch.device | str = "cpu",
    backend: str = "auto",
    precision: str = "auto",
) -> tuple[Stage, dict[str, Any]]:
    """A trained stage in eval mode, with its averaged weights, and its checkpoint's state.

    `run` is a run folder (its best checkpoint is taken) or one checkpoint.
    """
    folder = find_checkpoint(run, prefer_best=True)
    state = read_state(folder)
    config = ModelConfig(**state["model"])
    dtype = sampling_dtype(precision, torch.device(device))
    attention = resolve(torch.device(device), dtype, config.head_dim, backend)
    stage = Stage(stage_spec(**state["spec"]), config, attention)
    weights = "ema" if "ema.safetensors" in state["files"] else "model"
    saved = read_tensors(folder, weights)
    if unknown := sorted(saved.keys() ^ stage.state_dict().keys()):
        raise ValueError(
            f"{folder} holds another version of the model (one of the two has no {unknown[0]}); "
            "sample it with the code that trained it, or train again"
        )
    stage.load_state_dict(saved)
    return stage.sampled_in(dtype).to(device).eval(), {**state, "path": str(folder)}


def check_same_data(found: Path, state: dict, header: dict, tokens: str) -> None:
    """ValueError: the checkpoint was trained on other tokens than the folder `tokens`, which has
    this header, holds."""
    for kind in ("codec", "semantic"):
        ours, theirs = header[kind], state["tokenizers"][kind]
        if ours["fingerprint"] != theirs["fingerprint"]:
            raise ValueError(
                f"{found} was trained on tokens of the {kind} tokenizer {theirs['name']} "
                f"({theirs['fingerprint']}), but {tokens} holds those of {ours['name']} "
                f"({ours['fingerprint']}); set data.tokens or out"
            )
    if state["totals"] != header["totals"]:
        raise ValueError(
            f"{found} was trained on other recordings than {tokens} holds; set data.tokens to what "
            "it was, or out to a new run"
        )


def check_same_tokens(states: dict[str, dict[str, Any]]) -> None:
    """ValueError if checkpoints ({run: state}) do not agree on what the tokens are."""
    (first, reference), *others = states.items()
    for run, state in others:
        for kind in ("codec", "semantic"):
            ours, theirs = reference["tokenizers"][kind], state["tokenizers"][kind]
            if ours["fingerprint"] != theirs["fingerprint"]:
                raise ValueError(
                    f"{first} and {run} do not belong together: their {kind} tokenizers differ "
                    f"({ours['name']} {ours['fingerprint']} and "
                    f"{theirs['name']} {theirs['fingerprint']})"
                )
        if reference["collapse_semantic"] != state["collapse_semantic"]:
            raise ValueError(
                f"{first} and {run} do not belong together: "
                "only one of them was trained with data.collapse_semantic"
            )
    coarse = {
        run: s["spec"] for run, s in states.items() if s["spec"]["name"] in ("coarse", "fine")
    }
    if len({spec["num_coarse"] for spec in coarse.values()}) > 1:
        said = " and ".join(f"{run} (num_coarse={s['num_coarse']})" for run, s in coarse.items())
        raise ValueError(f"{said} do not belong together: they divide the codebooks differently")
