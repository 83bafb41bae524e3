"""Every setting of the neural codec: its architecture and how it is trained."""

import math
from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING

from configs.schema import WandbConfig, check_least, check_speeds


@dataclass(frozen=True)
class CodecConfig:
    """Architecture of an EnCodec (Défossez et al. 2022, sections 3.1 and 3.2) for mono audio.

    Weights at ratios [8, 5, 4, 2] and dimension 128, in millions, encoder or decoder alone:
    filters 32 lstm 2: 7.4; 24/2: 4.3; 24/1: 3.1; 20/2: 3.0. Codebooks: num * size * dimension.
    """

    sample_rate: int = 16_000  # Hz, in and out
    ratios: tuple[int, ...] = (8, 5, 4, 2)  # up-sampling in the decoder; the product is the hop
    encoder_filters: int = 24  # channels at the full rate; every down-sampling doubles them
    decoder_filters: int = 24  # may be wider or narrower than the encoder
    num_residual_layers: int = 1  # residual blocks per ratio, with dilations 1, 2, 4, ...
    num_lstm: int = 1  # LSTM layers at the frame rate, in the encoder and in the decoder
    dimension: int = 128  # width of a latent frame and of a codebook vector
    num_codebooks: int = 8
    codebook_size: int = 1024
    causal: bool = True  # the decoder can stream; false sounds better at the same size
    # Frames that the encoder hears beyond the one that it codes; the decoder waits for nothing.
    # 1 is worth 0.06 of PESQ and 0.007 of STOI on unseen speakers after 4000 steps, 2 no more.
    lookahead: int = 0
    # Latent frame z becomes z / sqrt(1 + mean(z^2)): quiet frames stay weak, none passes power 1.
    # Not in EnCodec. Without it the latents' scale ran away faster than the codebooks followed; a
    # hard z / rms(z) was stable but hides loudness, and learned slower.
    normalize_latent: bool = True

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 0 if name in ("num_lstm", "causal", "lookahead", "normalize_latent") else 1
            smallest = min(value, default=0) if name == "ratios" else value
            if smallest < least:
                raise ValueError(f"model.{name}: {value} is too small; the least is {least}")

    @property
    def hop_length(self) -> int:
        """Samples per latent frame."""
        return math.prod(self.ratios)


@dataclass(frozen=True)
class CodecDataConfig:
    # All of it is decoded into memory, at every speed: 115 MB an hour at 16 kHz.
    audio: str = MISSING  # a folder or a JSONL manifest; without splits, 1 in 20 is held out
    segment_seconds: float = 1.0  # of a training segment; shorter recordings are zero-padded
    gain_db: tuple[float, float] = (-12.0, 6.0)  # range of each segment's gain, below full scale
    filter_db: float = 0.0  # most that a segment's random smooth filter adds or takes anywhere
    speeds: tuple[float, ...] = (1.0,)  # at which every recording is there: 0.9, 1.1: new voices

    def __post_init__(self) -> None:
        check_speeds(self.speeds)


@dataclass(frozen=True)
class CodecLossConfig:
    """Weights of the losses; the balancer makes the first four shares of the gradient."""

    time: float = 0.1  # L1 between the waveforms
    mel: float = 1.0  # multi-scale mel distance
    mel_linear: float = 1.0  # within it, of the linear term beside the logarithmic one
    adversarial: float = 3.0  # hinge loss against the multi-scale STFT discriminator
    feature: float = 3.0  # L1 between the discriminator's feature maps
    commitment: float = 0.1  # pull of the encoder towards its codebook vectors
    quantize_from_step: int = 300  # unquantised before; then k-means fits the codebooks
    adversarial_from_step: int = 1000  # before, reconstruction losses alone: cheap steps
    discriminator_windows: tuple[int, ...] = (1024, 512, 256)  # STFT windows in samples, hop 1/4
    discriminator_filters: int = 32  # channels of each sub-discriminator
    discriminator_probability: float = 0.67  # share of steps that update it (EnCodec: 2/3)
    judged_share: float = 1.0  # of the clips go to the discriminator, which is most of the work
    dropout: float = 0.5  # share of clips decoded from a random number of codebooks 1..K
    dead_code_share: float = 0.1  # codes used less, relative to the average, start anew
    codebook_decay: float = 0.98  # of the codebooks' running averages

    def __post_init__(self) -> None:
        if not 0 < self.judged_share <= 1:
            raise ValueError(f"loss.judged_share={self.judged_share}: above 0, and at most 1")


@dataclass(frozen=True)
class CodecOptimConfig:
    lr: float = 3e-4  # of AdamW, which is left with what is not a matrix when
    muon_lr: float = 5e-3  # is not 0: Muon's, for the kernels of convolutions and LSTMs
    discriminator_lr: float = 3e-4
    betas: tuple[float, float] = (0.8, 0.99)
    warmup_steps: int = 200
    decay_from: float = 0.5  # from this share of the steps on, a cosine takes the rate to 0
    ema_decay: float = 0.999  # averaged weights: what is validated, exported and shipped

    def __post_init__(self) -> None:
        check_least("optim", self, {"lr": 1e-9, "muon_lr": 0, "discriminator_lr": 0})


@dataclass(frozen=True)
class CodecRunConfig:
    steps: int = 8000
    start_from: str | None = None  # a codec folder to go on from or fine-tune: its weights alone
    batch_size: int = 32  # segments per step and process
    log_every: int = 50
    valid_minutes: float = 2.0  # between validations, each with a checkpoint; 0: only at the end
    num_valid_clips: int = 32  # spread evenly over the validation split
    num_samples: int = 4  # of them written to out/samples, original and reconstruction
    seed: int = 0  # of segments, gains, dropout and the initial weights
    compile: bool = False  # and capture, on a GPU: a slow start, then twice the speed or more
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"  # auto: bf16 on a GPU

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "log_every", "num_valid_clips")
        check_least("train", self, dict.fromkeys(counts, 1) | {"num_samples": 0})


@dataclass(frozen=True)
class CodecTrainConfig:
    """All of scripts/train_codec.py."""

    out: str = MISSING  # folder of the run; new or empty unless --resume is given
    model: CodecConfig = field(default_factory=CodecConfig)
    data: CodecDataConfig = field(default_factory=CodecDataConfig)
    loss: CodecLossConfig = field(default_factory=CodecLossConfig)
    optim: CodecOptimConfig = field(default_factory=CodecOptimConfig)
    train: CodecRunConfig = field(default_factory=CodecRunConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    tensorboard: bool = False  # in out/tensorboard, for `tensorboard --logdir`
