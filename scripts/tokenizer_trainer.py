"""The loop that trains either tokenizer, the codec or the small HuBERT: train.py's smaller brother.

It validates and saves every so many minutes and at the end, stops at a signal after a checkpoint,
and resumes exactly: every random choice of a step is a function of (seed, step, rank).
"""

import math
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor

from configs.load import check_same_config, load_config, save_config
from model.captured import Captured
from model.checkpoint import (
    find_checkpoint,
    list_checkpoints,
    rotate_checkpoints,
    save_checkpoint,
)
from scripts.cli import end_with_launcher, make_parser
from scripts.run_log import RunLog, environment
from scripts.trackers import tracking

# What may differ at a resume; the rest makes it another run
CHANGEABLE = re.compile(
    r"out|labels|data\.audio|optim\..*|wandb\..*|tensorboard|train\.(?!batch_size|seed|start_from).*"
)


class TokenizerTrainer:
    """One run in config.out. A subclass says what is trained: the methods that raise here."""

    def __init__(self, config: Any, resume: bool):
        self.config, self.out = config, Path(config.out)
        checkpoint = find_checkpoint(self.out, or_older=True) if resume else None
        if resume:
            check_same_config(self.out / "config.yaml", config, CHANGEABLE)
        elif self.out.is_dir() and any(self.out.iterdir()):
            remedy = "continue it with --resume" if list_checkpoints(self.out) else "delete it"
            raise ValueError(f"{self.out}: not empty; {remedy}, or set out=...")
        precision = config.train.mixed_precision
        if precision == "auto":
            precision = "bf16" if torch.cuda.is_available() else "no"
        self.accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # else several CPU processes stay strangers
            mixed_precision=precision,
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
            **tracking(config),
        )
        self.device, self.rank = self.accelerator.device, self.accelerator.process_index
        one = self.accelerator.num_processes == 1
        self.captured = config.train.compile and self.device.type == "cuda" and one
        self.step, self.signal, self.stopping = 0, 0, False
        self.build(resume)
        update = self._update
        self.update = Captured(update) if self.captured else update
        if checkpoint:
            self.load(checkpoint)
        if self.accelerator.is_main_process:
            save_config(config, self.out / "config.yaml")
        self.log = RunLog(config, self.accelerator, self.step)

    def build(self, resume: bool) -> None:
        """Data, models, optimisers; with `resume`, `load` follows."""
        raise NotImplementedError

    def _update(self, variant: Any, **inputs: Tensor) -> dict[str, Tensor]:
        """A step's work on the device, as `Captured` wants it; what is logged of it."""
        raise NotImplementedError

    def train_step(self) -> dict[str, Tensor]:
        """Draw a batch, call `self.update`; what is logged, on the device."""
        raise NotImplementedError

    def facts(self) -> dict[str, float]:
        """What else is logged beside a step's losses."""
        raise NotImplementedError

    def scores(self) -> dict[str, float | None]:
        """Figures on the validation clips; the main process alone asks."""
        raise NotImplementedError

    def load(self, checkpoint: Path) -> None:
        """Set `step` and every tensor. ValueError: damaged, or not of this run."""
        raise NotImplementedError

    def export(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any], Path]:
        """Write what the run is for; returns a checkpoint's tensors and state, and its folder."""
        raise NotImplementedError

    def save(self) -> None:
        """A checkpoint, and the tokenizer as it is. Every process calls it."""
        if self.accelerator.is_main_process:
            tensors, state, folder = self.export()
            save_checkpoint(self.out, self.step, tensors, state)
            rotate_checkpoints(self.out, 1, None)
            self.log.say(f"step {self.step}: saved a checkpoint and {folder}")
        self.accelerator.wait_for_everyone()

    def fit(self) -> None:
        """Train to the last step or a signal; validate and save every so often and at the end."""

        def stop(number: int, _: object) -> None:
            self.signal = number

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        torch.backends.cudnn.benchmark = True  # segments are all of one shape
        train = self.config.train
        self.log.write("start", **environment(self.device))
        valid_at, logged_at, logged_step = time.monotonic(), time.monotonic(), self.step
        while self.step < train.steps and not self.stopping:
            losses = self.train_step()
            self.log.advance()
            if self.step % train.log_every == 0 or self.step == train.steps:
                self._log_losses(losses, (time.monotonic() - logged_at) / (self.step - logged_step))
                logged_at, logged_step = time.monotonic(), self.step
            due = self._agree(0 < train.valid_minutes < (time.monotonic() - valid_at) / 60)
            if due or self.stopping or self.step == train.steps:
                self._finite(losses)  # or it would replace the checkpoint to go back to
            if due:
                self.validate()
                self.save()
                valid_at = time.monotonic()
        self.save()
        if not self.stopping:
            self.validate()
        self.log.close()
        if self.stopping:
            self.log.say("stopped by a signal; the same command with --resume continues")
            sys.exit(128 + (self.signal or signal.SIGTERM))

    def validate(self) -> None:
        """Log the scores. Every process calls it."""
        if self.accelerator.is_main_process:
            self._record("valid", self.scores())
        self.accelerator.wait_for_everyone()

    def _agree(self, due: bool) -> bool:
        """Whether validation is due, or (self.stopping) a signal came, on any process."""
        flags = [int(due), self.signal]
        if self.accelerator.num_processes > 1:  # all act at the same step
            flags = self.accelerator.reduce(torch.tensor(flags, device=self.device)).tolist()
        self.stopping = flags[1] > 0
        return flags[0] > 0

    def _finite(self, losses: dict[str, Tensor]) -> dict[str, float]:
        """The losses as numbers. ValueError if one is not finite."""
        values = {name: float(value) for name, value in losses.items()}
        if not all(math.isfinite(value) for value in values.values()):
            raise ValueError(
                f"step {self.step}: a loss is not finite ({values}); resume from the last "
                "checkpoint with a lower optim.lr"
            )
        return values

    def _log_losses(self, losses: dict[str, Tensor], seconds: float) -> None:
        """`seconds` per step. ValueError if a loss is not finite."""
        values = self._finite(losses) | self.facts() | {"seconds_per_step": seconds}
        if self.device.type == "cuda":
            values["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self._record("train", values)

    def _record(self, kind: str, values: dict[str, float | None]) -> None:
        self.log.write(kind, step=self.step, **values)
        shown = (f"{name} {value:.4g}" for name, value in values.items() if value is not None)
        self.log.say(f"{kind} {self.step}  " + "  ".join(shown))


def run_trainer(
    trainer: type[TokenizerTrainer],
    schema: type,
    description: str,
    examples: str,
    arguments: list[str] | None = None,
) -> None:
    """The command line of a trainer: --config, --resume, key=value."""
    parser = make_parser(description, examples)
    parser.add_argument("--config", help="YAML file; see configs/")
    parser.add_argument("--resume", action="store_true", help="continue the run in out=FOLDER")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="e.g. train.steps=100 out=runs/x"
    )
    parsed = parser.parse_intermixed_args(arguments)
    config = load_config(schema, parsed.config, parsed.overrides)
    end_with_launcher()
    trainer(config, parsed.resume).fit()
