"""Every setting of the neural codec: its architecture and how it is trained."""

import math
from dataclasses import dataclass, field

from omegaconf import MISSING


@dataclass(frozen=True)
class CodecConfig:
    """Architecture of an EnCodec (Défossez et al. 2022, sections 3.1 and 3.2) for mono audio.

    Weights at ratios [8, 5, 4, 2] and dimension 128, in millions, encoder or decoder alone:
    filters 32 lstm 2: 7.4; 24/2: 4.3; 24/1: 3.1; 20/2: 3.0. Codebooks: num * size * dimension.
    """

    sample_rate: int = 16_000
    """Samples per second, in and out."""
    ratios: tuple[int, ...] = (8, 5, 4, 2)
    """Up-sampling factors of the decoder (the encoder runs them backwards); their product is the
    hop length in samples."""
    encoder_filters: int = 24
    """Channels at the full sample rate; every down-sampling doubles them."""
    decoder_filters: int = 24
    """The same for the decoder, which may be wider or narrower."""
    num_residual_layers: int = 1
    """Residual blocks per ratio, with dilations 1, 2, 4, ..."""
    num_lstm: int = 1
    """LSTM layers at the frame rate, in the encoder and again in the decoder; 0 for none."""
    dimension: int = 128
    """Width of a latent frame and of a codebook vector."""
    num_codebooks: int = 8
    """Residual codebooks K."""
    codebook_size: int = 1024
    """Vectors per codebook."""
    causal: bool = True
    """No look-ahead (streamable); false sees both sides and sounds better at the same size."""
    normalize_latent: bool = True
    """Latent frame z becomes z / sqrt(1 + mean(z^2)) before quantisation: quiet frames stay weak,
    none gets past power 1. Not in EnCodec. Without it the latents' scale ran away (up without
    commitment loss, towards 0 with it) faster than the codebooks followed; a hard z / rms(z) was
    stable but hides loudness, and learned slower."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratios", tuple(self.ratios))  # YAML and JSON bring lists
        if not self.ratios:
            raise ValueError("model.ratios: needs at least one factor, e.g. [8, 5, 4, 2]")
        for name, value in vars(self).items():
            least = 0 if name in ("num_lstm", "causal", "normalize_latent") else 1
            smallest = min(value) if name == "ratios" else value
            if smallest < least:
                raise ValueError(f"model.{name}: {smallest} is too small; the least is {least}")

    @property
    def hop_length(self) -> int:
        """Samples per latent frame."""
        return math.prod(self.ratios)


@dataclass(frozen=True)
class CodecDataConfig:
    """Which recordings, and how segments are cut from them."""

    audio: str = MISSING
    """A folder of recordings or a JSONL manifest. Without splits, one recording in 20 (chosen by
    its name) is held out for validation."""
    segment_seconds: float = 1.0
    """Length of a training segment; shorter recordings are zero-padded."""
    max_hours: float = 24.0
    """At most this much audio is decoded into memory (int16: 115 MB an hour at 16 kHz)."""
    num_workers: int = 16
    """Threads that decode at the start."""
    gain_db: tuple[float, ...] = (-12.0, 6.0)
    """Each segment is scaled by a gain drawn from this range (and never past full scale)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "gain_db", tuple(self.gain_db))
        if len(self.gain_db) != 2 or self.gain_db[0] > self.gain_db[1]:
            raise ValueError("data.gain_db: expected two numbers [lowest, highest]")
        if self.segment_seconds <= 0 or self.max_hours <= 0 or self.num_workers < 1:
            raise ValueError(
                "data: segment_seconds, max_hours and num_workers must all be positive"
            )


@dataclass(frozen=True)
class CodecLossConfig:
    """Weights of the losses; the balancer makes them shares of the decoder's gradient."""

    time: float = 0.1
    """L1 between the waveforms."""
    mel: float = 1.0
    """Multi-scale mel distance."""
    adversarial: float = 3.0
    """Hinge loss against the multi-scale STFT discriminator."""
    feature: float = 3.0
    """L1 between the discriminator's feature maps."""
    commitment: float = 0.1
    """Pull of the encoder towards its codebook vectors; outside the balancer."""
    quantize_from_step: int = 300
    """Until this step the latents pass unquantised; then k-means fits the codebooks to them."""
    adversarial_from_step: int = 1000
    """Until this step the reconstruction losses work alone, and the discriminator costs nothing."""
    discriminator_windows: tuple[int, ...] = (1024, 512, 256)
    """STFT window of each sub-discriminator, in samples; hop is a quarter of it."""
    discriminator_filters: int = 32
    """Channels of each sub-discriminator."""
    discriminator_probability: float = 0.67
    """Share of the steps that update the discriminator (EnCodec: 2/3 at 24 kHz)."""
    dropout: float = 0.5
    """Share of the clips decoded from a random number of codebooks 1..K instead of all K."""
    dead_code_share: float = 0.1
    """A code used less than this share of an average code's use restarts at a random latent."""
    codebook_decay: float = 0.98
    """Decay of the codebooks' running averages."""

    def __post_init__(self) -> None:
        windows = tuple(self.discriminator_windows)
        object.__setattr__(self, "discriminator_windows", windows)


@dataclass(frozen=True)
class CodecOptimConfig:
    """AdamW for the codec and for the discriminator, and the learning rate's course in steps."""

    lr: float = 3e-4
    """Peak learning rate of the codec."""
    discriminator_lr: float = 3e-4
    """Peak learning rate of the discriminator."""
    betas: tuple[float, ...] = (0.8, 0.99)
    """AdamW's running averages."""
    warmup_steps: int = 200
    """Linear warm-up from 0."""
    decay_from: float = 0.5
    """From this share of train.steps on, a cosine takes the rate to 0 at train.steps."""
    ema_decay: float = 0.999
    """Running average of the weights: what is validated, exported and shipped."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        if not 0 <= self.decay_from <= 1:
            raise ValueError(f"optim.decay_from: {self.decay_from} is not a share from 0 to 1")


@dataclass(frozen=True)
class CodecRunConfig:
    """Length of the run and what it writes on the way."""

    steps: int = 8000
    """Optimiser steps in all, resumed runs included."""
    batch_size: int = 32
    """Segments per step and process."""
    max_minutes: float = 0.0
    """Stop cleanly (validate, save, export) after this many minutes of this run; 0: no limit."""
    log_every: int = 50
    """Steps between log lines."""
    valid_minutes: float = 2.0
    """Minutes between validations; 0: only at the end."""
    checkpoint_minutes: float = 2.0
    """Minutes between checkpoints; 0: only at the end and on Ctrl-C or SIGTERM."""
    num_valid_clips: int = 32
    """Clips of the validation split that are scored, spread evenly over it."""
    num_samples: int = 4
    """Validation clips written to out/samples as original and reconstruction."""
    seed: int = 0
    """Decides segments, gains, dropout and the initial weights."""
    mixed_precision: str = "auto"
    """no, bf16, or auto (bf16 where the GPU has it)."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or self.log_every < 1:
            raise ValueError("train: steps, batch_size and log_every must be at least 1")
        if self.mixed_precision not in ("auto", "no", "bf16"):
            raise ValueError(
                f"train.mixed_precision: {self.mixed_precision!r} is none of auto, no, bf16"
            )


@dataclass(frozen=True)
class CodecTrainConfig:
    """All of scripts/train_codec.py."""

    out: str = MISSING
    """Folder of the run; must be new or empty unless --resume is given."""
    model: CodecConfig = field(default_factory=CodecConfig)
    data: CodecDataConfig = field(default_factory=CodecDataConfig)
    loss: CodecLossConfig = field(default_factory=CodecLossConfig)
    optim: CodecOptimConfig = field(default_factory=CodecOptimConfig)
    train: CodecRunConfig = field(default_factory=CodecRunConfig)
