"""Pretrain a small HuBERT by masked prediction of the tokens of an existing semantic tokenizer.

Iteration 1 predicts MFCC tokens; iteration 2 those that scripts.fit_kmeans made from iteration 1.
One step: crops and their labels -> filter, mixing, noise -> span mask -> MaskedPrediction -> Muon
and AdamW. Every random choice is a function of (seed, step, rank), so a resumed run equals an
uninterrupted one. Writes to `out`: config.yaml, log.jsonl, checkpoints/ and hubert/ (for
scripts.fit_kmeans).
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from torch import Tensor

from configs.semantic_schema import SemanticTrainConfig
from data.dataset import mix
from data.segments import decode_recordings, find_split, spread
from model.checkpoint import read_state, read_tensors
from model.hubert import (
    HOP_LENGTH,
    SAMPLE_RATE,
    MaskedPrediction,
    loss_weights,
    save_hubert,
    span_mask,
)
from model.optim import (
    evaluating,
    learning_rate,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    set_learning_rate,
)
from model.semantic import SemanticTokenizer, load_semantic
from scripts.cli import run_cli
from scripts.semantic_segments import LabelledSegments
from scripts.tokenizer_trainer import TokenizerTrainer, run_trainer

EXAMPLES = """\
  python -m scripts.train_semantic --config configs/hubert_16khz.yaml \\
      data.audio=../shared/corpus/manifest.jsonl labels=pretrained/semantic_mfcc out=runs/hubert1
  python -m scripts.train_semantic --config configs/hubert_16khz.yaml \\
      data.audio=../shared/corpus/manifest.jsonl labels=pretrained/semantic_hubert out=runs/hubert2
  python -m scripts.train_semantic --config configs/hubert_16khz.yaml \\
      data.audio=../shared/corpus/manifest.jsonl labels=pretrained/semantic_hubert \\
      out=runs/hubert2 --resume"""


class Trainer(TokenizerTrainer):
    """Model, optimiser and data of one run; `unigram`: nats of guessing labels by frequency."""

    def build(self, resume: bool) -> None:
        labels = self.config.labels
        torch.backends.cudnn.allow_tf32 = False  # labels are to be those of a CPU
        tokenizer = load_semantic(labels, self.device)
        self.labels = tokenizer.fingerprint
        if (tokenizer.sample_rate, tokenizer.hop_length) != (SAMPLE_RATE, HOP_LENGTH):
            raise ValueError(f"labels={labels}: not 50 frames/s at 16 kHz; choose another")
        self._build_model(tokenizer.num_tokens)
        self._load_data(tokenizer)

    def _build_model(self, num_classes: int) -> None:
        set_seed(self.config.train.seed)  # the initial weights; every later draw is counter-based
        model, mult = self.config.model, self.config.loss.feature_grad_mult
        self.module = MaskedPrediction(model, num_classes, mult).to(self.device)
        if self.config.train.compile:
            self.module.compile_parts()
        optim = self.config.optim
        optimizer = make_optimizer(self.module, optim, self.captured, optim.muon_lr)
        self.model, self.optimizer = self.accelerator.prepare(self.module, optimizer)

    def _load_data(self, tokenizer: SemanticTokenizer) -> None:
        data, found = self.config.data, []
        valid = spread(find_split(data.audio, "valid"), self.config.train.num_valid_clips)
        for split, speeds in ((find_split(data.audio, "train"), data.speeds), (valid, (1.0,))):
            recordings = decode_recordings(split, SAMPLE_RATE, speeds)
            found.append(LabelledSegments(recordings, tokenizer, data, speeds))
        self.segments, self.valid = found
        counts = torch.bincount(self.segments.labels, minlength=tokenizer.num_tokens) + 1.0
        self.unigram = float(-(counts / counts.sum()).log()[self.valid.labels.long()].mean())
        hours = len(self.segments.samples) / SAMPLE_RATE / 3600
        self.accelerator.print(
            f"train: {hours:.2f} h in {len(self.segments.lengths)} recordings, with every speed of "
            f"{list(self.config.data.speeds)}; valid: "
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
        loss, optim = self.config.loss, self.config.optim
        nats, right, penalty = self.model(wav, labels, frames, mask)  # [B, T], [B, T], []
        weights = loss_weights(mask, frames, loss.unmasked)
        total = self.accelerator.reduce(weights.sum(), "mean")  # a frame weighs as much anywhere
        guessing = (nats * weights).sum() / total
        self.accelerator.backward(guessing + loss.feature_penalty * penalty)
        norm = self.accelerator.clip_grad_norm_(self.module.parameters(), optim.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        count = mask.sum()  # what is logged is of masked frames alone
        logged = {"loss": (nats * mask).sum() / count, "accuracy": (right & mask).sum() / count}
        values = {**logged, "grad_norm": norm, "feature_penalty": penalty}
        return {name: value.detach() for name, value in values.items()}

    def facts(self) -> dict[str, float]:
        return {"lr": float(self.optimizer.param_groups[0]["lr"])}

    def export(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any], Path]:
        """The model, in hubert/."""
        folder, state = self.out / "hubert", {"labels": self.labels}
        save_hubert(folder, self.config.model, self.module.weights(), step=self.step, **state)
        optimizer = optimizer_tensors(self.optimizer, self.module)
        return {"model": self.module.state_dict(), "optimizer": optimizer}, state, folder

    def load(self, checkpoint: Path) -> None:
        state = read_state(checkpoint)
        if state["labels"] != self.labels:
            raise ValueError(
                f"labels={self.config.labels}: not the tokenizer that this run was begun with "
                f"(fingerprint {self.labels}, then {state['labels']}); pass that one"
            )
        self.module.load_state_dict(read_tensors(checkpoint, "model"))
        load_optimizer_tensors(self.optimizer, self.module, read_tensors(checkpoint, "optimizer"))
        self.step = state["step"]

    def scores(self) -> dict[str, float]:
        """Nats and accuracy at masked frames, always the same masks."""
        number, size = len(self.valid.lengths), self.config.train.batch_size
        sums = torch.zeros(3, device=self.device)  # nats, right guesses, masked frames
        with evaluating(self.module), torch.compiler.set_stance("force_eager"):
            for start in range(0, number, size):
                chosen = np.arange(start, min(start + size, number))
                wav, labels, frames = self.valid.crops(chosen, np.zeros_like(chosen))
                mask = self._mask(np.random.default_rng(start), frames)
                nats, right, _ = self.module(wav, labels, frames, mask)
                sums += torch.stack([(nats * mask).sum(), (right & mask).sum(), mask.sum()])
        nats, right, count = sums.tolist()
        return {"loss": nats / count, "unigram": self.unigram, "accuracy": right / count}


def main(arguments: list[str] | None = None) -> None:
    description = "Pretrain a small HuBERT to predict a semantic tokenizer's tokens."
    run_trainer(Trainer, SemanticTrainConfig, description, EXAMPLES, arguments)


if __name__ == "__main__":
    run_cli(main)
