"""Train a codec (EnCodec's recipe): reconstruction, discriminator, balanced losses, EMA weights.

One step: segments -> CodecTraining (SEANet, residual VQ) -> losses -> Balancer -> Muon, AdamW.
Every random choice is a function of (seed, step, rank), so a resumed run equals an uninterrupted
one.

Writes to `out`: config.yaml, log.jsonl, checkpoints/, samples/ and codec/ (the EMA weights, for
load_codec).
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.nn import functional as F

from configs.codec_schema import CodecOptimConfig, CodecTrainConfig
from data.audio import save_audio
from data.segments import RandomSegments, decode_recordings, find_split, spread
from model.checkpoint import read_state, read_tensors
from model.codec import Codec, initialise_weights, load_codec
from model.codec_training import CodecTraining
from model.discriminator import Discriminator
from model.muon import split_group
from model.optim import adamw, load_optimizer_tensors, optimizer_tensors, set_learning_rate
from scripts.cli import run_cli
from scripts.codec_losses import MEL_SCALES, Balancer, MelDistance
from scripts.codec_metrics import mean, mel_distance, stoi
from scripts.tokenizer_trainer import TokenizerTrainer, run_trainer

EXAMPLES = """\
  python -m scripts.train_codec --config configs/codec_16khz.yaml \\
      data.audio=../shared/corpus/manifest.jsonl out=runs/codec
  python -m scripts.train_codec --config configs/codec_16khz.yaml \\
      data.audio=../shared/corpus/manifest.jsonl out=runs/codec --resume
  python -m scripts.train_codec --config configs/codec_16khz.yaml data.audio=recordings \\
      train.start_from=pretrained/codec_16khz train.steps=2000 out=runs/mine \\
      loss.adversarial_from_step=500
  accelerate launch -m scripts.train_codec --config configs/codec_16khz.yaml \\
      data.audio=recordings out=runs/codec"""
MIN_FRAMES = 7  # the widest kernel over frames: padded with their own reflection
VALID_SECONDS = 4  # of each validation clip
DISCRIMINATOR_LEAD = 200  # steps it learns before its verdict counts: a blind one does harm
INITIAL_BATCHES = 16  # batches of latents that the codebooks are fitted to
MODELS = ("codec", "average", "discriminator")


def rate_share(step: int, steps: int, optim: CodecOptimConfig) -> float:
    """Linear warm-up to 1, then 1, from `decay_from` * steps on a cosine down to 0 at `steps`."""
    warmup = min(1.0, (step + 1) / max(1, optim.warmup_steps))
    start = optim.decay_from * steps
    progress = min(1.0, max(0.0, step - start) / max(1.0, steps - start))
    return warmup * 0.5 * (1 + math.cos(math.pi * progress))


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


class Trainer(TokenizerTrainer):
    """Models, optimisers and data of one run."""

    def build(self, resume: bool) -> None:
        self._load_data()
        self._build_models()
        if self.config.train.start_from and not resume:
            self._start_from(self.config.train.start_from)

    def _load_data(self) -> None:
        data, train, model = self.config.data, self.config.train, self.config.model
        found, valid = find_split(data.audio, "train"), find_split(data.audio, "valid")
        recordings = decode_recordings(found, model.sample_rate, data.speeds)
        self.valid = decode_recordings(spread(valid, train.num_valid_clips), model.sample_rate)
        least = max(MEL_SCALES[-1][0], MIN_FRAMES * model.hop_length)
        length = max(data.segment_seconds * model.sample_rate, least)
        length = (math.ceil(length / model.hop_length) + model.lookahead) * model.hop_length
        self.segments = RandomSegments(
            recordings, length, data.gain_db, train.seed, self.device, data.filter_db
        )
        self.accelerator.print(
            f"train: {len(recordings.samples) / model.sample_rate / 3600:.2f} h in "
            f"{len(recordings.names)} recordings ({len(recordings.skipped)} skipped), with every "
            f"speed of {list(data.speeds)}, "
            f"valid: {len(self.valid.names)} clips; {self.accelerator.num_processes} x "
            f"{self.device}, {self.accelerator.mixed_precision}"
        )

    def _build_models(self) -> None:
        model, loss, optim = self.config.model, self.config.loss, self.config.optim
        set_seed(self.config.train.seed)  # the initial weights; every later draw is counter-based
        self.codec = Codec(model, weight_norm=True)
        initialise_weights(self.codec)
        self.average = Codec(model, weight_norm=True).to(self.device).eval().requires_grad_(False)
        self.average.load_state_dict(self.codec.state_dict())
        compile = self.config.train.compile
        self.training = CodecTraining(
            self.codec, loss.codebook_decay, loss.dead_code_share, compile
        )
        windows, filters = loss.discriminator_windows, loss.discriminator_filters
        self.discriminator = Discriminator(windows, filters, compile)
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.model = self._prepare("codec", self.training, optim.lr, optim.muon_lr)
        self.judge = self._prepare("discriminator", self.discriminator, optim.discriminator_lr)
        names = ("time", "mel", "adversarial", "feature")
        self.balancer = Balancer({name: getattr(loss, name) for name in names}, self.device)
        self.mel = MelDistance(model.sample_rate, loss.mel_linear, compile).to(self.device)
        self.valid_mel = MelDistance(model.sample_rate).to(self.device)
        self.averaged = [list(x.state_dict().values()) for x in (self.average, self.codec)]

    def _start_from(self, folder: str) -> None:
        """The weights of another run's codec."""
        clips = self.config.train.batch_size * self.accelerator.num_processes
        lookahead = self.config.model.lookahead
        frames = (self.segments.length // self.codec.hop_length - lookahead) * clips
        self.training.start_from(load_codec(folder, self.device), frames)
        self.average.load_state_dict(self.codec.state_dict())

    def _prepare(self, name: str, module: nn.Module, lr: float, muon_lr: float = 0) -> nn.Module:
        """The module as it is to be called; adds its optimiser."""
        groups = [{"params": list(module.to(self.device).parameters()), "weight_decay": 0.0}]
        if muon_lr:
            groups = split_group(module, groups[0], muon_lr / lr)
        optimizer = adamw(groups, lr, self.config.optim.betas, self.captured)
        module, self.optimizers[name] = self.accelerator.prepare(module, optimizer)
        return module

    def export(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any], Path]:
        """The codec with the averaged weights, in codec/."""
        tensors = {name: getattr(self, name).state_dict() for name in MODELS}
        for name, optimizer in self.optimizers.items():
            tensors[f"{name}_optimizer"] = optimizer_tensors(optimizer, getattr(self, name))
        self.average.save(self.out / "codec")
        return tensors | {"balancer": self.balancer.state}, {}, self.out / "codec"

    def load(self, checkpoint: Path) -> None:
        for name in MODELS:
            getattr(self, name).load_state_dict(read_tensors(checkpoint, name))
        for name, optimizer in self.optimizers.items():
            tensors = read_tensors(checkpoint, f"{name}_optimizer")
            load_optimizer_tensors(optimizer, getattr(self, name), tensors)
        for name, value in read_tensors(checkpoint, "balancer").items():
            self.balancer.state[name].copy_(value)
        self.step = read_state(checkpoint)["step"]

    def train_step(self) -> dict[str, Tensor]:
        """One optimiser step of the codec and, mostly, of the discriminator; losses on device."""
        config, loss, step = self.config, self.config.loss, self.step
        share, optim = rate_share(step, config.train.steps, config.optim), config.optim
        set_learning_rate(self.optimizers["codec"], share * optim.lr)
        set_learning_rate(self.optimizers["discriminator"], share * optim.discriminator_lr)
        wav = self.segments.batch(step, self.rank, config.train.batch_size)
        num_codebooks, restarts, coin = step_draws(config, step, self.rank)
        num_codebooks, restarts = num_codebooks.to(self.device), restarts.to(self.device)
        started = bool(config.train.start_from)  # with codebooks
        if step == loss.quantize_from_step and not started:
            self._fit_codebooks(restarts)
        self.model.train()
        quantize = started or step >= loss.quantize_from_step
        learn = coin and step >= loss.adversarial_from_step - DISCRIMINATOR_LEAD
        variant = (quantize, learn, step >= loss.adversarial_from_step)
        losses = self.update(variant, wav=wav, num_codebooks=num_codebooks, restarts=restarts)
        self._update_average()
        self.step += 1
        return losses

    def _update(
        self, variant: tuple[bool, bool, bool], wav: Tensor, num_codebooks: Tensor, restarts: Tensor
    ) -> dict[str, Tensor]:
        """The step on the device; variant: whether to quantize, to learn to judge, to be judged."""
        quantize, learn, adversarial = variant
        judged = math.ceil(self.config.loss.judged_share * len(wav))  # clips come in random order
        decoded, commitment, error = self.model(wav, num_codebooks, restarts, quantize)
        wav = wav[..., : decoded.shape[-1]]  # the rest was looked ahead at
        losses = {"time": F.l1_loss(decoded, wav), "mel": self.mel(decoded, wav)}
        logged = {"commitment": commitment, "quantizer_error": error}
        if learn:
            logged |= self.judge(wav[:judged], decoded[:judged], learn=True)
            self.accelerator.backward(logged["discriminator"])
            self._step("discriminator")
        if adversarial:
            losses |= self.discriminator(wav[:judged], decoded[:judged], learn=False)
        gradient = self.balancer.gradient(losses, decoded, self.accelerator)
        torch.autograd.backward(
            [decoded, self.config.loss.commitment * commitment],
            [gradient, torch.ones_like(commitment)],
        )
        self._step("codec")
        return {name: value.detach() for name, value in (losses | logged).items()}

    def _step(self, name: str) -> None:
        self.optimizers[name].step()
        self.optimizers[name].zero_grad()

    @torch.no_grad()
    def _fit_codebooks(self, restarts: Tensor) -> None:
        """k-means on the latents of some batches of their own, numbered beyond the last step."""
        first, latents = self.config.train.steps, []
        for number in range(first, first + INITIAL_BATCHES):
            wav = self.segments.batch(number, self.rank, self.config.train.batch_size)
            latents.append(self.codec.encode_latent(wav).transpose(1, 2).flatten(0, 1))  # [B*T, D]
        self.training.initialise(torch.cat(latents), restarts)
        self.average.quantizer.load_state_dict(self.codec.quantizer.state_dict())
        self.log.say(f"step {self.step}: codebooks fitted to {sum(map(len, latents))} latents")

    @torch.no_grad()
    def _update_average(self) -> None:
        """EMA of the weights and codebooks; its decay grows from 0.1, so that early steps fade."""
        decay = min(self.config.optim.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(*self.averaged, 1 - decay)

    def facts(self) -> dict[str, float]:
        lr = float(self.optimizers["codec"].param_groups[0]["lr"])
        return {"usage": float(self.training.usage().mean()), "lr": lr}

    @torch.no_grad()
    def scores(self) -> dict[str, float | None]:
        """Of the EMA codec with all codebooks."""
        rate, mels, stois = self.config.model.sample_rate, [], []
        for i in range(len(self.valid.names)):
            wav = self.valid.wav(i)[:, : VALID_SECONDS * rate].to(self.device)  # [1, L]
            with torch.backends.cudnn.flags(enabled=True, benchmark=False):  # L varies
                codes = self.average.encode(wav[None])
                decoded = self.average.decode(codes, length=wav.shape[-1])[0]
            mels.append(mel_distance(self.valid_mel, decoded, wav))
            stois.append(stoi(decoded, wav, rate))
            if i < self.config.train.num_samples:
                save_audio(self.out / "samples" / f"{i}_original.wav", wav, rate)
                save_audio(self.out / "samples" / f"{i}_decoded.wav", decoded, rate)
        return {"mel": mean(mels), "stoi": mean(stois)}


def main(arguments: list[str] | None = None) -> None:
    description = "Train a neural codec on a folder of recordings."
    run_trainer(Trainer, CodecTrainConfig, description, EXAMPLES, arguments)


if __name__ == "__main__":
    run_cli(main)
