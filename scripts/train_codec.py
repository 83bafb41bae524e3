"""Train a codec (EnCodec's recipe): reconstruction, discriminator, balanced losses, EMA weights.

One step: segments -> CodecTraining (SEANet, residual VQ) -> losses -> Balancer -> AdamW. Every
random choice is a function of (seed, step, rank), so a resumed run equals an uninterrupted one.

Writes to `out`: config.yaml, log.jsonl, checkpoint/state.safetensors, codec/ (the EMA weights,
for load_codec) and samples/.
"""

import argparse
import json
import math
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from configs.codec_schema import CodecOptimConfig, CodecTrainConfig
from configs.load import load_config, save_config
from data.audio import save_audio
from data.segments import RandomSegments, Recordings, decode_recordings, find_split, spread
from model.codec import Codec, build_discriminator, initialise_weights
from model.codec_training import CodecTraining
from scripts.cli import make_parser, run_cli
from scripts.codec_checkpoint import check_same_run, load_checkpoint, save_checkpoint, trim_log
from scripts.codec_losses import Balancer, MelDistance, discriminator_loss, generator_losses
from scripts.codec_metrics import mean, mel_distance, stoi

EXAMPLES = """\
  python -m scripts.train_codec --config configs/codec_16khz.yaml \\
      data.audio=../shared/corpus/manifest.jsonl out=runs/codec
  python -m scripts.train_codec --config configs/codec_16khz.yaml \\
      data.audio=../shared/corpus/manifest.jsonl out=runs/codec train.max_minutes=30 --resume
  accelerate launch -m scripts.train_codec --config configs/codec_16khz.yaml \\
      data.audio=recordings out=runs/codec"""
VALID_SECONDS = 4.0
DISCRIMINATOR_LEAD = 200  # steps it learns before its verdict counts: a blind one does harm
INITIAL_BATCHES = 16  # batches of latents that the codebooks are fitted to


def learning_rate(step: int, peak: float, steps: int, optim: CodecOptimConfig) -> float:
    """Linear warm-up, constant, then a cosine from `decay_from` * steps down to 0 at `steps`."""
    warmup = min(1.0, (step + 1) / max(1, optim.warmup_steps))
    start = optim.decay_from * steps
    progress = min(1.0, max(0.0, step - start) / max(1.0, steps - start))
    return peak * warmup * 0.5 * (1 + math.cos(math.pi * progress))


def step_draws(config: CodecTrainConfig, step: int, rank: int) -> tuple[Tensor, Tensor, bool]:
    """num_codebooks [B] per clip, restarts [K, codebook_size], whether the discriminator learns."""
    K, B = config.model.num_codebooks, config.train.batch_size
    own = np.random.default_rng([config.train.seed, step, rank, 1])
    dropped = own.random(B) < config.loss.dropout
    num_codebooks = np.where(dropped, own.integers(1, K + 1, B), K)
    restarts = own.integers(0, 2**31, (K, config.model.codebook_size))
    shared = np.random.default_rng([config.train.seed, step, 2])  # the same on every rank
    coin = bool(shared.random() < config.loss.discriminator_probability)
    return torch.from_numpy(num_codebooks), torch.from_numpy(restarts), coin


class Trainer:
    """Models, optimisers and data of one run; `fit` runs it to its end or its time limit."""

    def __init__(self, config: CodecTrainConfig, resume: bool):
        self.config, self.out = config, Path(config.out)
        self.started = time.monotonic()
        precision = config.train.mixed_precision
        if precision == "auto":
            precision = "bf16" if torch.cuda.is_available() else "no"
        handlers = [DistributedDataParallelKwargs(broadcast_buffers=False)]
        self.accelerator = Accelerator(mixed_precision=precision, kwargs_handlers=handlers)
        self.device, self.rank = self.accelerator.device, self.accelerator.process_index
        torch.backends.cudnn.benchmark = True
        set_seed(config.train.seed)  # the initial weights; every later draw is counter-based
        self._build_models()
        self._load_data()
        self.balancer = Balancer(
            {name: getattr(config.loss, name) for name in ("time", "mel", "adversarial", "feature")}
        )
        self.step, self.stopping = 0, ""
        if resume:
            self.step = load_checkpoint(self.out, self)
            self.say(f"resumed at step {self.step}")
            if self.accelerator.is_main_process:
                trim_log(self.out / "log.jsonl", self.step)

    def _build_models(self) -> None:
        config, optim = self.config, self.config.optim
        self.codec = Codec(config.model, weight_norm=True)
        initialise_weights(self.codec)
        self.average = Codec(config.model, weight_norm=True).to(self.device).eval()
        self.average.load_state_dict(self.codec.state_dict())
        self.average.requires_grad_(False)
        loss = config.loss
        self.discriminator = build_discriminator(
            loss.discriminator_windows, loss.discriminator_filters
        )
        training = CodecTraining(self.codec, loss.codebook_decay, loss.dead_code_share)
        fused = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            training.parameters(), optim.lr, optim.betas, weight_decay=0.0, fused=fused
        )
        self.discriminator_optimizer = torch.optim.AdamW(
            self.discriminator.parameters(), optim.lr, optim.betas, weight_decay=0.0, fused=fused
        )
        prepared = self.accelerator.prepare(
            training, self.discriminator, self.optimizer, self.discriminator_optimizer
        )
        self.model, self.parallel_discriminator = prepared[:2]
        self.optimizer, self.discriminator_optimizer = prepared[2:]
        self.discriminator = self.accelerator.unwrap_model(self.parallel_discriminator)
        self.codec_tensors = list(self.codec.state_dict().values())
        self.average_tensors = list(self.average.state_dict().values())
        self.mel = MelDistance(config.model.sample_rate).to(self.device)

    def _load_data(self) -> None:
        data, rate = self.config.data, self.config.model.sample_rate
        train, valid = find_split(data.audio, "train"), find_split(data.audio, "valid")
        valid = spread(valid, self.config.train.num_valid_clips)
        recordings = decode_recordings(train, rate, data.max_hours, data.num_workers)
        self.valid = decode_recordings(valid, rate, 1.0, data.num_workers)
        hop = self.config.model.hop_length
        frames = max(math.ceil(data.segment_seconds * rate / hop), math.ceil(2048 / hop))
        self.segments = RandomSegments(
            recordings.to(self.device), frames * hop, data.gain_db, self.config.train.seed
        )
        self.say(
            f"train: {recordings.hours:.2f} h in {len(recordings.names)} recordings "
            f"({len(recordings.skipped)} skipped); valid: {len(self.valid.names)} clips; "
            f"segments of {frames * hop} samples on {self.device}, "
            f"{self.accelerator.num_processes} process(es), {self.accelerator.mixed_precision}; "
            f"{time.monotonic() - self.started:.0f} s"
        )

    def say(self, line: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(line)
            sys.stdout.flush()

    def train_step(self) -> dict[str, Tensor]:
        """One optimiser step of the codec and, mostly, of the discriminator; losses on device."""
        config, step = self.config, self.step
        for optimizer, peak in (
            (self.optimizer, config.optim.lr),
            (self.discriminator_optimizer, config.optim.discriminator_lr),
        ):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, peak, config.train.steps, config.optim)
        wav = self.segments.batch(step, self.rank, config.train.batch_size)
        num_codebooks, restarts, coin = step_draws(config, step, self.rank)
        num_codebooks, restarts = num_codebooks.to(self.device), restarts.to(self.device)
        self.model.train()
        quantize = step >= config.loss.quantize_from_step
        if step == config.loss.quantize_from_step:
            self._fit_codebooks(restarts)
        decoded, commitment, error = self.model(wav, num_codebooks, restarts, quantize)
        losses = {"time": F.l1_loss(decoded, wav), "mel": self.mel(decoded, wav)}
        logged = dict(losses)
        if coin and step >= config.loss.adversarial_from_step - DISCRIMINATOR_LEAD:
            logged["discriminator"] = self._discriminator_step(wav, decoded.detach())
        if step >= config.loss.adversarial_from_step:
            losses |= generator_losses(self.discriminator, wav, decoded)
            logged |= losses
        gradient = self.balancer.gradient(losses, decoded, self.accelerator)
        torch.autograd.backward(
            [decoded, config.loss.commitment * commitment], [gradient, torch.ones_like(commitment)]
        )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._update_average()
        self.step += 1
        logged |= {"commitment": commitment, "quantizer_error": error}
        return {name: value.detach() for name, value in logged.items()}

    @torch.no_grad()
    def _fit_codebooks(self, restarts: Tensor) -> None:
        """k-means on the latents of some batches of their own, numbered beyond the last step."""
        first, latents = self.config.train.steps, []
        for number in range(first, first + INITIAL_BATCHES):
            wav = self.segments.batch(number, self.rank, self.config.train.batch_size)
            latents.append(self.codec.encode_latent(wav).transpose(1, 2).flatten(0, 1))  # [B*T, D]
        self.accelerator.unwrap_model(self.model).initialise(torch.cat(latents), restarts)
        self.average.quantizer.load_state_dict(self.codec.quantizer.state_dict())
        self.say(f"step {self.step}: codebooks fitted to {sum(map(len, latents))} latents")

    def _discriminator_step(self, real: Tensor, fake: Tensor) -> Tensor:
        loss = discriminator_loss(self.parallel_discriminator, real, fake)
        self.accelerator.backward(loss)
        self.discriminator_optimizer.step()
        self.discriminator_optimizer.zero_grad()
        return loss

    @torch.no_grad()
    def _update_average(self) -> None:
        """EMA of the weights and codebooks; its decay grows from 0.1, so that early steps fade."""
        decay = min(self.config.optim.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.average_tensors, self.codec_tensors, 1 - decay)

    def fit(self) -> None:
        """Train to `steps`, the time limit or a signal; then validate, save and export."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: setattr(self, "stopping", "signal"))
        run, minute = self.config.train, 60.0
        bar = tqdm(total=run.steps, initial=self.step, unit="step", disable=None)
        self.logged_at, self.logged_step = time.monotonic(), self.step
        last_valid = last_save = time.monotonic()
        while self.step < run.steps and not self._should_stop():
            logged = self.train_step()
            bar.update()
            if self.step % run.log_every == 0 or self.step == run.steps:
                self._log_losses(logged)
            now = time.monotonic()
            if run.valid_minutes and now - last_valid > run.valid_minutes * minute:
                self.validate()
                last_valid = time.monotonic()
            if run.checkpoint_minutes and now - last_save > run.checkpoint_minutes * minute:
                self._save()
                last_save = time.monotonic()
        bar.close()
        self._save()
        if self.stopping == "signal":
            self.say("stopped by a signal; the same command with --resume continues")
            sys.exit(130)
        self.validate(write_samples=True)
        self._export()

    def _should_stop(self) -> bool:
        """All processes agree: at a signal or past the time limit on any of them."""
        limit = self.config.train.max_minutes * 60
        if limit and time.monotonic() - self.started > limit:
            self.stopping = self.stopping or "time"
        if self.accelerator.num_processes > 1:
            code = {"": 0, "time": 1, "signal": 2}[self.stopping]
            codes = self.accelerator.gather(torch.tensor([code], device=self.device))
            self.stopping = ("", "time", "signal")[int(codes.max())]
        return bool(self.stopping)

    def _log_losses(self, logged: dict[str, Tensor]) -> None:
        values = {name: float(value) for name, value in logged.items()}
        if not all(math.isfinite(value) for value in values.values()):
            raise ValueError(
                f"step {self.step}: a loss is not finite ({values}); resume from the last "
                "checkpoint with a lower optim.lr"
            )
        now = time.monotonic()
        speed = (self.step - self.logged_step) / (now - self.logged_at)
        self.logged_at, self.logged_step = now, self.step
        values["usage"] = float(self.accelerator.unwrap_model(self.model).usage().mean())
        values["lr"] = self.optimizer.param_groups[0]["lr"]
        if self.device.type == "cuda":
            values["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self._record({"step": self.step, "steps_per_s": speed} | values)

    def _record(self, entry: dict[str, float | None]) -> None:
        """One plain line for people, one JSON line for programs."""
        if not self.accelerator.is_main_process:
            return
        self.say("  ".join(f"{k} {_short(v)}" for k, v in entry.items() if v is not None))
        with open(self.out / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def validate(self, write_samples: bool = False) -> None:
        """Score the EMA codec with all codebooks on the validation clips, on the main process."""
        if self.accelerator.is_main_process:
            started, scores = time.monotonic(), {"valid_mel": [], "valid_stoi": []}
            rate = self.config.model.sample_rate
            for i in range(len(self.valid.names)):
                wav, decoded = reconstruct(self.average, self.valid, i, self.device)
                scores["valid_mel"].append(mel_distance(self.mel, decoded, wav))
                scores["valid_stoi"].append(stoi(decoded, wav, rate))
                if write_samples and i < self.config.train.num_samples:
                    save_audio(self.out / "samples" / f"{i}_original.wav", wav, rate)
                    save_audio(self.out / "samples" / f"{i}_decoded.wav", decoded, rate)
            means = {name: mean(values) for name, values in scores.items()}
            seconds = time.monotonic() - started
            self._record({"step": self.step} | means | {"valid_seconds": seconds})
        self.accelerator.wait_for_everyone()

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            size = save_checkpoint(self.out, self)
            self.say(f"step {self.step}: checkpoint saved ({size / 2**20:.0f} MiB)")
        self.accelerator.wait_for_everyone()

    def _export(self) -> None:
        if self.accelerator.is_main_process:
            self.average.save(self.out / "codec")
            size = sum(f.stat().st_size for f in (self.out / "codec").iterdir())
            reason = " (time limit; continue with --resume)" if self.stopping else ""
            self.say(f"step {self.step}{reason}: {self.out / 'codec'}, {size / 2**20:.2f} MiB")


def _short(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"


@torch.no_grad()
def reconstruct(
    codec: Codec, recordings: Recordings, i: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Recording i (at most 4 s) and its reconstruction, both wav [1, L] on `device`."""
    wav = recordings.wav(i, int(VALID_SECONDS * recordings.sample_rate)).to(device)
    with torch.backends.cudnn.flags(enabled=True, benchmark=False):  # no tuning per length
        return wav, codec.decode(codec.encode(wav[None]), length=wav.shape[-1])[0]


def prepare_folder(config: CodecTrainConfig, resume: bool) -> None:
    """Refuse to overwrite a run, or to resume one that differs; save the resolved config."""
    out = Path(config.out)
    if resume:
        check_same_run(out, config)
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: not empty; pass --resume to continue it, or another out=FOLDER")


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser("Train a neural codec on a folder of recordings.", EXAMPLES)
    parser.add_argument("--config", help="YAML file; configs/codec_16khz.yaml is the shipped one")
    parser.add_argument("--resume", action="store_true", help="continue the run in out=FOLDER")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="e.g. train.steps=100 out=runs/x"
    )
    parsed: argparse.Namespace = parser.parse_intermixed_args(arguments)
    config = load_config(CodecTrainConfig, parsed.config, parsed.overrides)
    prepare_folder(config, parsed.resume)
    trainer = Trainer(config, parsed.resume)
    if trainer.accelerator.is_main_process:
        save_config(config, Path(config.out) / "config.yaml")
    trainer.fit()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    run_cli(main)
