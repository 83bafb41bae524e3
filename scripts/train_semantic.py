"""Pretrain a small HuBERT by masked prediction of the tokens of an existing semantic tokenizer.

Iteration 1 predicts MFCC tokens; iteration 2 those that scripts.fit_kmeans made from iteration 1.
One step: crops and their labels -> mixing, noise, gain -> span mask -> MaskedPrediction -> AdamW.
Every random choice is a function of (seed, step, rank), so a resumed run equals an uninterrupted
one. Writes to `out`: config.yaml, log.jsonl, checkpoints/ and hubert/ (for scripts.fit_kmeans).
"""

import math
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from configs.load import check_same_config, load_config, save_config
from configs.semantic_schema import SemanticTrainConfig
from data.dataset import mix
from data.segments import decode_recordings, find_split, spread
from model.captured import Captured
from model.checkpoint import (
    find_checkpoint,
    read_state,
    read_tensors,
    rotate_checkpoints,
    save_checkpoint,
)
from model.hubert import HOP_LENGTH, SAMPLE_RATE, MaskedPrediction, save_hubert, span_mask
from model.optim import (
    evaluating,
    learning_rate,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    set_learning_rate,
)
from model.semantic import SemanticTokenizer, load_semantic
from scripts.cli import end_with_launcher, make_parser, run_cli
from scripts.run_log import RunLog, environment
from scripts.semantic_segments import LabelledSegments

EXAMPLES = """\
  python -m scripts.train_semantic --config configs/hubert_16khz.yaml \\
      data.audio=../shared/corpus/manifest.jsonl labels=pretrained/semantic_mfcc out=runs/hubert1
  python -m scripts.train_semantic --config configs/hubert_16khz.yaml \\
      data.audio=../shared/corpus/manifest.jsonl labels=runs/semantic1 out=runs/hubert2
  python -m scripts.train_semantic --config configs/hubert_16khz.yaml \\
      data.audio=../shared/corpus/manifest.jsonl labels=runs/semantic1 out=runs/hubert2 --resume"""
CHANGEABLE = re.compile(  # at a resume; the rest makes it another run
    r"out|labels|data\.audio|optim\..*|wandb\..*|train\.(?!batch_size|seed).*"
)


class Trainer:
    """Model, optimiser and data of one run; `unigram`: nats of guessing labels by frequency."""

    def __init__(self, config: SemanticTrainConfig, resume: bool):
        self.config, self.out = config, Path(config.out)
        if resume:
            find_checkpoint(self.out)
            check_same_config(self.out / "config.yaml", config, CHANGEABLE)
        elif self.out.is_dir() and any(self.out.iterdir()):
            raise ValueError(f"{self.out}: not empty; continue it with --resume, or set out=...")
        precision = config.train.mixed_precision
        if precision == "auto":
            precision = "bf16" if torch.cuda.is_available() else "no"
        log_with = None if config.wandb.mode == "off" else "wandb"
        self.accelerator = Accelerator(mixed_precision=precision, log_with=log_with)
        self.device, self.rank = self.accelerator.device, self.accelerator.process_index
        self.step, self.signal, self.stopping = 0, 0, False
        tokenizer = load_semantic(config.labels, self.device)
        self.labels = tokenizer.fingerprint
        if (tokenizer.sample_rate, tokenizer.hop_length) != (SAMPLE_RATE, HOP_LENGTH):
            raise ValueError(f"labels={config.labels}: not 50 frames/s at 16 kHz; choose another")
        self._build_model(tokenizer.num_tokens)
        if resume:
            self.load()
        self._load_data(tokenizer)
        if self.accelerator.is_main_process:
            save_config(config, self.out / "config.yaml")
        self.log = RunLog(config, self.accelerator, self.step)

    def _build_model(self, num_classes: int) -> None:
        set_seed(self.config.train.seed)  # the initial weights; every later draw is counter-based
        model, mult = self.config.model, self.config.loss.feature_grad_mult
        self.module = MaskedPrediction(model, num_classes, mult).to(self.device)
        if self.config.train.compile:
            self.module.compile_parts()
        one = self.accelerator.num_processes == 1
        captured = self.config.train.compile and self.device.type == "cuda" and one
        optimizer = make_optimizer(self.module, self.config.optim, capturable=captured)
        self.model, self.optimizer = self.accelerator.prepare(self.module, optimizer)
        self.update = Captured(self._update) if captured else self._update

    def _load_data(self, tokenizer: SemanticTokenizer) -> None:
        data, found = self.config.data, []
        valid = spread(find_split(data.audio, "valid"), self.config.train.num_valid_clips)
        for split in (find_split(data.audio, "train"), valid):
            found.append(LabelledSegments(decode_recordings(split, SAMPLE_RATE), tokenizer, data))
        self.segments, self.valid = found
        counts = torch.bincount(self.segments.labels, minlength=tokenizer.num_tokens) + 1.0
        self.unigram = float(-(counts / counts.sum()).log()[self.valid.labels.long()].mean())
        hours = len(self.segments.samples) / SAMPLE_RATE / 3600
        self.accelerator.print(
            f"train: {hours:.2f} h in {len(self.segments.lengths)} recordings, valid: "
            f"{len(self.valid.lengths)} clips; {tokenizer.num_tokens} labels of {tokenizer.name}; "
            f"{self.accelerator.num_processes} x {self.device}, {self.accelerator.mixed_precision}"
        )

    def _mask(self, rng: np.random.Generator, frames: Tensor) -> Tensor:
        T, loss = self.segments.length // HOP_LENGTH, self.config.loss
        draws = torch.from_numpy(rng.random((len(frames), T + 1), np.float32)).to(self.device)
        return span_mask(draws, frames, loss.mask_probability, loss.mask_span)

    def train_step(self) -> dict[str, Tensor]:
        """One optimiser step; what is logged of it, on the device."""
        config, step = self.config, self.step
        set_learning_rate(self.optimizer, learning_rate(step, config.train.steps, config.optim))
        rng = np.random.default_rng([config.train.seed, step, self.rank])
        torch.manual_seed(mix(config.train.seed, step, self.rank) >> 1)  # dropout, noise
        wav, labels, frames = self.segments.random_crops(rng, config.train.batch_size)
        mask = self._mask(rng, frames)
        self.model.train()
        values = self.update("step", wav=wav, labels=labels, frames=frames, mask=mask)
        self.step += 1
        return values

    def _update(self, _: str, wav: Tensor, labels: Tensor, frames: Tensor, mask: Tensor) -> dict:
        """The step's work on the device."""
        nats, right, penalty = self.model(wav, labels, frames, mask)
        count = mask.sum().float()
        total = self.accelerator.reduce(count, "mean")  # over processes: each frame weighs the same
        loss, optim = self.config.loss, self.config.optim
        self.accelerator.backward(nats / total + loss.feature_penalty * penalty)
        norm = self.accelerator.clip_grad_norm_(self.module.parameters(), optim.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        values = {"loss": nats / count, "accuracy": right / count, "grad_norm": norm}
        return {name: v.detach() for name, v in {**values, "feature_penalty": penalty}.items()}

    def save(self) -> None:
        """Write a checkpoint and hubert/. Every process calls it."""
        if self.accelerator.is_main_process:
            tensors = {"model": self.module.state_dict()}
            tensors["optimizer"] = optimizer_tensors(self.optimizer, self.module)
            save_checkpoint(self.out, self.step, tensors, {"labels": self.labels})
            rotate_checkpoints(self.out, 1, None)
            folder, facts = self.out / "hubert", {"step": self.step, "labels": self.labels}
            save_hubert(folder, self.config.model, self.module.weights(), **facts)
            self.log.say(f"step {self.step}: saved a checkpoint and {folder}")
        self.accelerator.wait_for_everyone()

    def load(self) -> None:
        """Continue from the run's checkpoint. ValueError: none, damaged, or of other labels."""
        folder = find_checkpoint(self.out)
        state = read_state(folder)
        if state["labels"] != self.labels:
            raise ValueError(
                f"labels={self.config.labels}: not the tokenizer that this run was begun with "
                f"(fingerprint {self.labels}, then {state['labels']}); pass that one"
            )
        self.module.load_state_dict(read_tensors(folder, "model"))
        load_optimizer_tensors(self.optimizer, self.module, read_tensors(folder, "optimizer"))
        self.step = state["step"]

    def fit(self) -> None:
        """Train to the last step or a signal; validate and save every so often and at the end."""

        def stop(number: int, _: object) -> None:
            self.signal = number

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        torch.backends.cudnn.benchmark = True  # crops are all of one shape
        train = self.config.train
        self.log.write("start", unigram=self.unigram, **environment(self.device))
        valid_at, logged_at, logged_step = time.monotonic(), time.monotonic(), self.step
        while self.step < train.steps and not self.stopping:
            values = self.train_step()
            self.log.advance()
            if self.step % train.log_every == 0 or self.step == train.steps:
                self._log_train(values, (time.monotonic() - logged_at) / (self.step - logged_step))
                logged_at, logged_step = time.monotonic(), self.step
            if self._agree(0 < train.valid_minutes < (time.monotonic() - valid_at) / 60):
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

    def _agree(self, due: bool) -> bool:
        """Whether validation is due, or (self.stopping) a signal came, on any process."""
        flags = [int(due), self.signal]
        if self.accelerator.num_processes > 1:  # all act at the same step
            flags = self.accelerator.reduce(torch.tensor(flags, device=self.device)).tolist()
        self.stopping = flags[1] > 0
        return flags[0] > 0

    def _log_train(self, tensors: dict[str, Tensor], seconds: float) -> None:
        """`seconds` per step. ValueError if the loss is not finite."""
        values = {name: float(value) for name, value in tensors.items()}
        if not math.isfinite(values["loss"]):
            problem = f"step {self.step}: the loss is not finite ({values}); "
            raise ValueError(problem + "resume from the last checkpoint with a lower optim.lr")
        values |= {"lr": float(self.optimizer.param_groups[0]["lr"]), "seconds_per_step": seconds}
        if self.device.type == "cuda":
            values["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self._record("train", values)

    def _record(self, kind: str, values: dict[str, float]) -> None:
        self.log.write(kind, step=self.step, **values)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.log.say(f"{kind} {self.step}  {shown}")

    def validate(self) -> None:
        """Nats and accuracy at masked frames of the validation clips, always the same masks."""
        if self.accelerator.is_main_process:
            number, size = len(self.valid.lengths), self.config.train.batch_size
            sums = torch.zeros(3, device=self.device)  # nats, right guesses, masked frames
            with evaluating(self.module), torch.compiler.set_stance("force_eager"):
                for start in range(0, number, size):
                    chosen = np.arange(start, min(start + size, number))
                    wav, labels, frames = self.valid.crops(chosen, np.zeros_like(chosen))
                    mask = self._mask(np.random.default_rng(start), frames)
                    nats, right, _ = self.module(wav, labels, frames, mask)
                    sums += torch.stack([nats, right, mask.sum()])
            nats, right, count = sums.tolist()
            loss, accuracy = nats / count, right / count
            self._record("valid", {"loss": loss, "unigram": self.unigram, "accuracy": accuracy})
        self.accelerator.wait_for_everyone()


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(
        "Pretrain a small HuBERT to predict a semantic tokenizer's tokens.", EXAMPLES
    )
    parser.add_argument("--config", help="YAML file; configs/hubert_16khz.yaml is for one GPU")
    parser.add_argument("--resume", action="store_true", help="continue the run in out=FOLDER")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. out=runs/x")
    parsed = parser.parse_intermixed_args(arguments)
    config = load_config(SemanticTrainConfig, parsed.config, parsed.overrides)
    end_with_launcher()
    Trainer(config, parsed.resume).fit()


if __name__ == "__main__":
    run_cli(main)
