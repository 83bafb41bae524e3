"""wandb and TensorBoard, through Accelerate's trackers: a run's numbers, and clips to listen to."""

import base64
import os
import secrets
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from configs.files import atomic_write
from configs.load import flat
from scripts.figures import grey_png, spectrogram

ID_FILE = "wandb-id.txt"  # in the run's folder: a resumed run goes on in the same place


def tracking(config: Any) -> dict[str, Any]:
    """What Accelerator is to be told. ValueError: TensorBoard is asked for and not there."""
    names = [] if config.wandb.mode == "disabled" else ["wandb"]
    if config.wandb.mode != "online":  # it would report its own errors over the network
        os.environ["WANDB_ERROR_REPORTING"] = "false"
    if config.tensorboard:
        if not find_spec("tensorboard"):
            raise ValueError("tensorboard=true needs it: pip install tensorboard==2.20.0")
        names.append("tensorboard")
    return {"log_with": names or None, "project_dir": str(Path(config.out, "tensorboard"))}


def start_trackers(accelerator: Accelerator, config: Any) -> None:
    """As `tracking` named them; on the main process. The config's keys are dotted."""
    if not accelerator.log_with:
        return
    options = {"mode": config.wandb.mode, "dir": config.out, "id": "", "resume": "allow"}
    if accelerator.is_main_process and config.wandb.mode != "disabled":
        options["id"] = _wandb_id(Path(config.out, ID_FILE))
    values = {key: _plain(value) for key, value in flat(asdict(config)).items()}
    accelerator.init_trackers(config.wandb.project, values, {"wandb": options})


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str) else str(value)


def _wandb_id(file: Path) -> str:
    if not file.is_file():
        with atomic_write(file) as out:
            out.write(secrets.token_hex(4))
    return file.read_text(encoding="utf-8").strip()


def track_clips(
    accelerator: Accelerator, step: int, clips: dict[str, Tensor], sample_rate: int
) -> None:
    """Players and spectrograms of wavs [1,L], by name; on the main process."""
    if not accelerator.trackers:
        return
    pictures = {name: spectrogram(wav.cpu(), sample_rate) for name, wav in clips.items()}
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            for name, wav in clips.items():
                tracker.writer.add_audio(name, wav.cpu(), step, sample_rate)
                tracker.writer.add_image(name, pictures[name][None], step)  # [1,H,W]
        elif tracker.name == "wandb":
            import wandb

            media: dict[str, Any] = {}
            for name, wav in clips.items():
                media[name] = wandb.Audio(wav[0].cpu().numpy(), sample_rate, caption=name)
                # an image of theirs would take another package
                png = base64.b64encode(grey_png(pictures[name])).decode()
                media[f"{name} (spectrogram)"] = wandb.Html(
                    f'<img src="data:image/png;base64,{png}" alt="{name}">', inject=False
                )
            tracker.run.log(media, step=step)
