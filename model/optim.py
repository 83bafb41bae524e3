"""The optimiser, its learning rate, and the averaged weights."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from configs.schema import OptimConfig
from model.muon import MuonAdamW, split_group
from model.sharding import copy_into, forget_gathered, laid_out_as


def make_optimizer(
    model: nn.Module, config: OptimConfig, capturable: bool = False, muon_lr: float = 0.0
) -> MuonAdamW:
    """Fused AdamW; weight decay on matrices, none on norms and embeddings.

    capturable: for CUDA graphs, with the learning rate in a tensor (`set_learning_rate`). muon_lr:
    that of Muon, which then takes the matrices; 0: AdamW takes everything.
    """
    embeddings = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed = [p for p in model.parameters() if p.ndim >= 2 and p not in embeddings]
    others = [p for p in model.parameters() if p.ndim < 2 or p in embeddings]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if muon_lr:
        groups[:1] = split_group(model, groups[0], muon_lr / config.lr)
    return adamw(groups, config.lr, config.betas, capturable)


def adamw(
    groups: list[dict], lr: float, betas: tuple[float, float], capturable: bool = False
) -> MuonAdamW:
    """Fused AdamW, with Muon for the groups that `split_group` made for it."""
    optimizer = MuonAdamW(groups, lr, tuple(betas), fused=True, capturable=capturable)
    if capturable:  # one tensor each: the groups' rates differ
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(lr, device=group["params"][0].device)
    set_learning_rate(optimizer, lr)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Of all groups, times a group's own ratio; in place where it is a tensor, for a captured step
    reads it there."""
    for group in optimizer.param_groups:
        rate = lr * group.get("lr_ratio", 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def learning_rate(step: int, num_steps: int, config: OptimConfig) -> float:
    """The rate of the `step`-th update (from 0): linear warm-up, then cosine or constant + decay.

    cosine reaches min_lr_share * lr at the last step; wsd stays at lr and falls there linearly
    over the last decay_share of the steps (Hu et al. 2024).
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(1, num_steps - 1 - config.warmup_steps)
        share = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    else:
        decay_steps = max(1, round(config.decay_share * num_steps))
        share = min(1.0, (num_steps - 1 - step) / decay_steps)
    return config.lr * (config.min_lr_share + (1 - config.min_lr_share) * share)


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimiser's state, named after the parameters: {"exp_avg/blocks.0...": tensor}."""
    names = {p: name for name, p in model.named_parameters()}
    return {
        f"{key}/{names[p]}": value
        for p, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]
) -> None:
    """The inverse of `optimizer_tensors`. ValueError: Muon has what AdamW had, or vice versa."""
    parameters = dict(model.named_parameters())
    muon = {p for g in optimizer.param_groups if "num_blocks" in g for p in g["params"]}
    for key, value in tensors.items():
        kind, name = key.split("/", 1)
        p = parameters[name]
        if (kind == "momentum_buffer") != (p in muon):
            begun = "with" if kind == "momentum_buffer" else "without"
            raise ValueError(f"optim.muon_lr: this run was begun {begun} Muon; go on so")
        # Fused AdamW keeps its step counter on the parameter's device, as fp32.
        step = value.to(p.device, torch.float32)
        optimizer.state[p][kind] = step if kind == "step" else laid_out_as(p, value)


class EMA:
    """An exponential moving average of a model's parameters, in fp32.

    The decay grows from 0.1 as (1 + n) / (10 + n) until it reaches `decay`, so that short runs do
    not sample from their initialisation.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.num_updates = 0
        self.shadow = {n: p.detach().float().clone() for n, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        parameters = [p.detach().float() for p in model.parameters()]
        torch._foreach_lerp_(list(self.shadow.values()), parameters, 1 - decay)

    def load(self, tensors: dict[str, Tensor], num_updates: int) -> None:
        """Continue from saved averages."""
        self.num_updates = num_updates
        for name, average in self.shadow.items():
            average.copy_(laid_out_as(average, tensors[name]))

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Within the context the model holds the averaged weights; afterwards its own again."""
        forget_gathered(model)
        own = {n: p.detach().clone() for n, p in model.named_parameters()}
        copy_into(model, self.shadow)
        try:
            yield
        finally:
            copy_into(model, own)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """eval() and no gradients inside; afterwards every submodule is back in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
