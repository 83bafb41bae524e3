"""What a training run can be told: every key of every YAML in configs/, with its default."""

from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING


def check_speeds(speeds: tuple[float, ...]) -> None:
    """ValueError unless there is a speed, and every one is near enough to 1 to be speech."""
    if not speeds or not all(0.1 <= speed <= 10 for speed in speeds):
        raise ValueError(f"data.speeds={list(speeds)}: one or more numbers from 0.1 to 10")


def check_least(section: str, config: object, least: dict[str, float]) -> None:
    """ValueError where a key of `section` is below its `least` value."""
    for key, smallest in least.items():
        if getattr(config, key) < smallest:
            raise ValueError(f"{section}.{key}={getattr(config, key)}: at least {smallest}")


@dataclass(frozen=True)
class ModelConfig:
    """The transformer; by default 25 M parameters as a coarse stage."""

    dim: int = 512
    num_layers: int = 8
    num_heads: int = 8
    head_dim: int = 64
    num_kv_heads: int = 1  # 1 = multi-query; num_heads = multi-head
    ff_dim: int | None = None  # gated feed-forward width; None = 8/3 dim, rounded up to 64
    qk_norm: bool = False  # RMSNorm on queries and keys: steadier at high learning rates
    dropout: float = 0.0  # on attention weights and on both residual branches
    rotary_base: float = 10_000.0

    def __post_init__(self) -> None:
        sizes = ("dim", "num_layers", "num_heads", "head_dim", "num_kv_heads")
        check_least("model", self, dict.fromkeys(sizes, 1))


@dataclass(frozen=True)
class AttentionConfig:
    """Which kernel computes attention; never what it computes."""

    backend: Literal["auto", "einsum", "math", "efficient", "flash", "cudnn", "triton"] = "auto"


@dataclass(frozen=True)
class DataConfig:
    tokens: str = MISSING  # a folder written by scripts.prepare
    crop_seconds: float = 10.0  # longest stretch of a recording in one sequence = the context
    collapse_semantic: bool = False  # drop repeats of semantic tokens (timing becomes the model's)
    packed: bool | None = None  # clips in a row, unpadded; None: where it saves a fifth
    num_workers: int = 0  # loader processes; 0 reads in the training process


@dataclass(frozen=True)
class OptimConfig:
    lr: float = 6e-4
    muon_lr: float = 0.0  # of Muon for the blocks' matrices (README: where it pays); 0: AdamW alone
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1  # on matrices; never on norms and embeddings
    warmup_steps: int = 200
    schedule: Literal["cosine", "wsd"] = "cosine"  # wsd: constant, then linear decay at the end
    decay_share: float = 0.2  # wsd only: the last share of the steps
    min_lr_share: float = 0.1  # the learning rate at the end, as a share of lr
    clip_norm: float = 1.0  # of the gradient; .inf turns it off
    skip_factor: float = 10.0  # a step is skipped whose gradient is so many times the usual norm
    max_skipped: int = 10  # in a row: then the run stops and keeps the batch
    ema_decay: float = 0.999  # averaged weights, used for validation and sampling; 0 turns it off

    def __post_init__(self) -> None:
        if self.muon_lr and not self.lr:
            raise ValueError("optim.lr=0: Muon's rate follows it, so it must be more than 0")
        least = {"lr": 0, "muon_lr": 0, "clip_norm": 1e-6, "warmup_steps": 0, "ema_decay": 0}
        check_least("optim", self, least | {"skip_factor": 1, "max_skipped": 1})


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 5000
    batch_size: int = 32  # clips per optimiser step, over all processes and micro-batches
    num_micro_batches: int = 1  # gradient accumulation: same result, less memory
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where the GPU has it
    kernels: Literal["auto", "plain", "compiled", "triton"] = "auto"  # between matrix products
    captured: bool | None = None  # passes as CUDA graphs; None: on one GPU
    seed: int = 0
    log_every: int = 20
    valid_every: int = 500
    save_every: int = 500
    num_kept: int = 2  # newest checkpoints kept, besides the best one
    sample_every: int = 0  # write samples at fixed seeds every n steps; 0 = never
    num_samples: int = 2
    sample_seconds: float = 4.0

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "num_micro_batches", "num_kept", "num_samples")
        every = ("log_every", "valid_every", "save_every")
        check_least("train", self, dict.fromkeys((*counts, *every), 1) | {"sample_every": 0})


@dataclass(frozen=True)
class WandbConfig:
    mode: Literal["disabled", "online", "offline"] = "disabled"
    project: str = "mini-audiolm"


@dataclass(frozen=True)
class RunConfig:
    """One stage's training run."""

    stage: Literal["semantic", "coarse", "fine", "acoustic"] = MISSING
    out: str = MISSING  # the run folder
    num_coarse: int = 3  # codebooks of the coarse stage; the fine stage takes the rest
    # how codes of several codebooks follow one another: one a step, or those of a frame in one,
    # each codebook a step later than the one before; auto: delay for acoustic, flatten for others
    pattern: Literal["auto", "flatten", "delay"] = "auto"
    model: ModelConfig = field(default_factory=ModelConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    tensorboard: bool = False  # in out/tensorboard, for `tensorboard --logdir`
