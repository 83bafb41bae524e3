"""Every setting of the small HuBERT behind semantic tokens: its architecture, how it is trained."""

from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING

from configs.schema import WandbConfig, check_least, check_speeds


@dataclass(frozen=True)
class SmallHubertConfig:
    """Architecture of a HuBERT (Hsu et al. 2021) at 16 kHz and 50 frames/s, in torchaudio's terms.

    Weights in millions, by default: convolutions 0.60, position 0.26, each layer 0.79. A narrow
    front is what makes it fast on a CPU: at 128, 128, 256 the convolutions take 4.6 times as long.
    """

    conv_channels: tuple[int, ...] = (64, 64, 128, 256, 256, 256, 256)  # one per convolution
    dim: int = 256  # width of the transformer and of the features
    num_layers: int = 8
    num_heads: int = 4
    ff_dim: int = 1024
    position_kernel: int = 64  # frames that the convolution which tells the position spans
    position_groups: int = 16
    norm_first: bool = True  # pre-norm: steady at high learning rates; false as HuBERT base
    dropout: float = 0.1  # on projected frames, on attention weights, on both residual branches

    def __post_init__(self) -> None:
        sizes = ("dim", "num_layers", "num_heads", "ff_dim", "position_kernel", "position_groups")
        check_least("model", self, dict.fromkeys(sizes, 1))
        if len(self.conv_channels) != 7 or min(self.conv_channels) < 1:
            raise ValueError(f"model.conv_channels={self.conv_channels}: seven numbers from 1 up")
        for key in ("num_heads", "position_groups"):
            if self.dim % getattr(self, key):
                raise ValueError(f"model.dim={self.dim}: not a multiple of model.{key}")


@dataclass(frozen=True)
class SemanticDataConfig:
    # All of it is decoded into memory, at every speed: 115 MB an hour.
    audio: str = MISSING  # a folder or a JSONL manifest; without splits, 1 in 20 is held out
    segment_seconds: float = 6.0  # of a training crop; shorter recordings are padded and masked
    mix_share: float = 0.2  # of crops that get a piece of another one over up to half of them,
    mix_snr_db: tuple[float, float] = (-5.0, 5.0)  # at this ratio (WavLM, Chen et al. 2022)
    noise_share: float = 0.2  # of crops that get white noise,
    noise_snr_db: tuple[float, float] = (5.0, 30.0)  # at this ratio
    filter_db: float = 0.0  # most that a crop's random smooth filter adds or takes anywhere
    speeds: tuple[float, ...] = (1.0,)  # at which every recording is there: 0.9, 1.1: new voices

    def __post_init__(self) -> None:
        check_speeds(self.speeds)
        if 1.0 not in self.speeds:
            raise ValueError(f"data.speeds={list(self.speeds)}: add 1.0, which gives the labels")
        check_least("data", self, {"segment_seconds": 0.2, "mix_share": 0, "noise_share": 0})


@dataclass(frozen=True)
class SemanticLossConfig:
    """Masked prediction: cross-entropy of the labels of masked frames, over cosine similarities."""

    mask_probability: float = 0.8  # spans * mask_span / frames; they overlap: 56% is masked
    mask_span: int = 10  # frames
    unmasked: float = 0.0  # weight of the loss at frames that are not masked; HuBERT: 0
    feature_penalty: float = 10.0  # weight of the mean square of the convolutions' output
    feature_grad_mult: float = 1.0  # of the gradient that reaches the convolutions; base: 0.1

    def __post_init__(self) -> None:
        check_least("loss", self, {"mask_span": 1, "mask_probability": 0, "unmasked": 0})


@dataclass(frozen=True)
class SemanticOptimConfig:
    lr: float = 5e-4  # of AdamW, which is left with what is not a matrix when
    muon_lr: float = 2e-3  # is not 0: Muon's, for convolutions, attention and feed-forward
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01  # on matrices; never on norms and biases
    warmup_steps: int = 400
    schedule: Literal["cosine", "wsd"] = "cosine"  # wsd: constant, then linear decay at the end
    decay_share: float = 0.2  # wsd only: the last share of the steps
    min_lr_share: float = 0.0  # the learning rate at the end, as a share of lr
    clip_norm: float = 1.0  # of the gradient; .inf turns it off

    def __post_init__(self) -> None:
        check_least("optim", self, {"lr": 1e-9, "muon_lr": 0, "clip_norm": 1e-6, "warmup_steps": 0})


@dataclass(frozen=True)
class SemanticRunConfig:
    steps: int = 6000
    batch_size: int = 40  # crops per step and process
    compile: bool = False  # torch.compile convolutions and layers: a slow start, then faster
    log_every: int = 50
    valid_minutes: float = 2.0  # between validations, each with a checkpoint; 0: only at the end
    num_valid_clips: int = 64  # spread evenly over the validation split, a crop of each
    seed: int = 0  # of crops, masks, dropout and the initial weights
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"  # auto: bf16 on a GPU

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "log_every", "num_valid_clips")
        check_least("train", self, dict.fromkeys(counts, 1))


@dataclass(frozen=True)
class SemanticTrainConfig:
    """All of scripts/train_semantic.py."""

    out: str = MISSING  # folder of the run; new or empty unless --resume is given
    labels: str = MISSING  # a semantic tokenizer's folder: its tokens are what is predicted
    model: SmallHubertConfig = field(default_factory=SmallHubertConfig)
    data: SemanticDataConfig = field(default_factory=SemanticDataConfig)
    loss: SemanticLossConfig = field(default_factory=SemanticLossConfig)
    optim: SemanticOptimConfig = field(default_factory=SemanticOptimConfig)
    train: SemanticRunConfig = field(default_factory=SemanticRunConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    tensorboard: bool = False  # in out/tensorboard, for `tensorboard --logdir`
